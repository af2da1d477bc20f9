"""What the formulas answer to random questions is what they answered before.

The questions are the first of those of test_estimator.py, where the estimator's page answers
the same in JavaScript; there it takes a browser, here no time. Which answers are right is for
replays and published counts to say, in test_estimate.py. Where an answer is meant to change,
``python tests/test_kept_estimates.py`` keeps the new ones.
"""

import dataclasses
import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from every_byte import estimate
from every_byte.data import cards
from every_byte.estimate import Dimensions, Serving, Setup, fit

KEPT = Path(__file__).with_name("data") / "estimates.json.gz"


def kept(kind: str) -> list[list[Any]]:
    """Questions of a kind, each with its answer at the end."""
    return list(json.loads(gzip.decompress(KEPT.read_bytes()))[kind])


def memory(sizes: dict[str, Any], setup: dict[str, Any]) -> list[Any]:
    answer = estimate.memory(Dimensions(**sizes), Setup(**setup))
    return [*dataclasses.astuple(answer)]


def help_(sizes: dict[str, Any], setup: dict[str, Any], card: str) -> list[Any]:
    dims, asked, on = Dimensions(**sizes), Setup(**setup), cards()[card]
    given = {"workspace": on.cublas_workspace, "context": on.context}
    levers = fit.levers(dims, asked, **given)
    return [
        [(lever.name, lever.saved) for lever in levers],
        fit.gpus_needed(dims, asked, on.usable, **given),
        fit.most_sequences(dims, asked, on.usable, **given),
    ]


def serve(sizes: dict[str, Any], serving: dict[str, Any], card: str) -> list[Any]:
    served = estimate.serve(Dimensions(**sizes), Serving(**serving), cards()[card])
    return [*dataclasses.astuple(served)]


ASKED = {"memory": memory, "help": help_, "serve": serve}


def answer(kind: str, *question: Any) -> Any:
    """A list, or the words of a refusal."""
    try:
        return json.loads(json.dumps(ASKED[kind](*question)))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("kind", ASKED)
def test_the_answers_are_those_that_were_kept(kind: str) -> None:
    for *question, before in kept(kind):
        assert answer(kind, *question) == before, question


def test_few_of_the_answers_are_refusals() -> None:
    answers = [before for *_, before in kept("memory")]
    assert 20 < sum(isinstance(one, str) for one in answers) < len(answers) // 3


def keep() -> None:
    """Ask anew, and keep what is answered now."""
    from test_estimator import random_pair, random_sizes

    rng = random.Random(20_260_101)
    asked: dict[str, list[list[Any]]] = {"memory": [[*random_pair(rng)] for _ in range(500)]}
    names = list(cards())
    asked["help"] = [[*pair, rng.choice(names)] for pair in asked["memory"][:40]]
    asked["serve"] = [
        [random_sizes(rng), {"quantised": q, "gpus": n, "cache_dtype": c}, rng.choice(names)]
        for q in (None, *estimate.QUANTISED)
        for n in (1, 2, 8)
        for c in (None, "fp8", "fp32")
    ]
    answered = {k: [[*one, answer(k, *one)] for one in those] for k, those in asked.items()}
    KEPT.write_bytes(gzip.compress(json.dumps(answered, separators=(",", ":")).encode(), mtime=0))


if __name__ == "__main__":
    keep()
