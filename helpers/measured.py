"""What a real card measured, for the chapters that replay the same: from ``book/records/``."""

import json
import lzma
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parent.parent / "book" / "records"
WORKLOADS = RECORDS.parent.parent / "tests" / "data" / "h200-torch-2.11" / "workloads.json.xz"
UNWATCHED = RECORDS.parent.parent / "tests" / "data" / "h100-torch-2.11" / "unwatched.json.xz"
CARD = "NVIDIA H200, torch 2.11.0"
NOT_KNOWN = "Not known."

Figures = dict[str, list[int]]
"""At each checkpoint (allocated, reserved, peak allocated, peak reserved), in bytes."""


def of_articles(*scripts: str) -> list[dict[str, Any]]:
    """What the articles' scripts print on `CARD`: a row for each of their stages, in bytes.

    Raises:
        KeyError: a script was not measured.
    """
    told = tomllib.loads((RECORDS / "articles.toml").read_text("utf-8"))["row"]
    if missing := set(scripts) - {row["script"] for row in told}:
        raise KeyError(f"{sorted(missing)[0]!r} was not measured: see book/records/articles.toml")
    return [row for row in told if row["script"] in scripts]


def of_experiments(*names: str) -> list[tuple[str, str, dict[str, int], dict[str, int]]]:
    """Experiments, their checkpoints, and both figures in bytes: measured on `CARD`, replayed.

    Raises:
        KeyError: an experiment is not in the record.
    """
    name = "nvidia-h200-torch-2.11.0.json"
    measured, replayed = (
        json.loads((folder / name).read_text("utf-8"))["experiments"]
        for folder in (RECORDS, RECORDS / "replayed")
    )
    return [
        (experiment, checkpoint, row, replayed[experiment]["checkpoints"][checkpoint])
        for experiment in names
        for checkpoint, row in measured[experiment]["checkpoints"].items()
    ]


def of_workloads() -> dict[str, Any]:
    """The runs of whole models that `CARD` measured, by name; see `helpers.workloads`.

    Each has its "checkpoints": (allocated, reserved, peak allocated, peak reserved) in bytes.
    """
    with lzma.open(WORKLOADS, "rt") as file:
        found: dict[str, Any] = json.load(file)["workloads"]
    return found


def read_unwatched(path: Path = UNWATCHED) -> dict[str, Any]:
    """What ``python -m benchmarks.unwatched`` measured on a card, and replayed.

    "machine"; "programs" by name, each with its "figures" (`Figures`) or its "error";
    "replayed" with "versions" and "programs" likewise; "least" by name: the fewest bytes that
    the replay said would do, and whether the program "ran" with them on the card and
    "ran out below" with 2 MiB less.
    """
    with lzma.open(path, "rt") as file:
        found: dict[str, Any] = json.load(file)
    return found


def unwatched_pairs(told: dict[str, Any]) -> Iterator[tuple[str, Figures, Figures]]:
    """The programs that ran on both: their names, what was measured, what is replayed."""
    for name, of in told["programs"].items():
        again = told["replayed"]["programs"].get(name, {})
        if "figures" in of and "figures" in again:
            yield name, of["figures"], again["figures"]


def peak(figures: Figures) -> int:
    """The most bytes that were allocated at any time."""
    return max(allocated for _, _, allocated, _ in figures.values())


def peak_off(measured: Figures, again: Figures) -> float:
    """How much higher the replay's peak is than the measured one, as a share of it."""
    return peak(again) / peak(measured) - 1


def of_ladder() -> dict[str, dict[str, Any]]:
    """Fine-tunings of Llama-3.1-8B that an H100 carried out, by the rungs of chapter 14.

    Each has its "peak" and "reserved" in bytes and its "seconds" a step, or the "message" of
    the error that it stopped with.
    """
    told = tomllib.loads((RECORDS / "ladder.toml").read_text("utf-8"))["rung"]
    return {rung["name"]: rung for rung in told}


def cause_of(signature: str) -> str:
    """Why an operation's replay is not what `CARD` measured; `NOT_KNOWN` if nobody knows."""
    plain = signature.replace("[", "(")  # no pattern's set of characters
    for one in tomllib.loads((RECORDS / "outliers.toml").read_text("utf-8"))["outlier"]:
        if any(fnmatch(plain, pattern.replace("[", "(")) for pattern in one["of"]):
            return str(one["cause"])
    return NOT_KNOWN


COLUMNS = ("experiment", "checkpoint", "measured (B)", "replayed, off by (B)")
"""Of the rows of `beside_replay`."""


def beside_replay(*names: str, figure: str = "memory_allocated") -> list[tuple[str, str, int, int]]:
    """Experiments, checkpoints, what was measured on `CARD`, and how much more is replayed.

    Args:
        names: of experiments.
        figure: one of ``torch.cuda``'s, such as "max_memory_allocated".

    Raises:
        KeyError: an experiment is not in the record, or has no such figure.
    """
    return [
        (name, checkpoint, row[figure], again[figure] - row[figure])
        for name, checkpoint, row, again in of_experiments(*names)
    ]
