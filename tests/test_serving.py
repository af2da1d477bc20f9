"""How many users vLLM serves, against what its own logs tell, and by its own rules."""

import json
from dataclasses import replace

import pytest

from every_byte import cli
from every_byte.data import cards
from every_byte.estimate import Serving, dimensions, parameter_bytes, serve, serving
from every_byte.units import GiB

H100 = replace(cards()["H100"], available=int(79.18 * GiB))  # as the logs tell it
# Weights, peak activations and KV cache in GiB, of llm-d/llm-d-benchmark's logs
# (config_explorer/empirical-vllm-memory-results.md): an H100, utilization 0.9, of a version
# that did not take CUDA graphs off; weights of Llama-3.3-70B in 8 bits with a scale a row.
LOGS = [
    ("Llama-3.1-8B", {}, (14.99, 4.76, 51.38)),
    ("Qwen3-0.6B", {}, (1.12, 5.56, 64.45)),
    ("Qwen3-32B", {}, (61.03, 5.64, 4.45)),
    ("Llama-3.1-70B", {"gpus": 2, "quantised": "int8"}, (33.88, 4.84, 32.0)),
]


@pytest.mark.parametrize(("model", "given", "logged"), LOGS)
def test_memory_is_shared_out_as_the_logs_tell(
    model: str, given: dict[str, int], logged: tuple[float, ...]
) -> None:
    asked = Serving(utilization=90, graphs=False, length=16_000, **given)  # type: ignore[arg-type]
    found = serve(dimensions(model), asked, H100)
    weights, activations, cache = (
        n / GiB for n in (found.weights, found.activations, found.kv_cache)
    )
    assert weights == pytest.approx(logged[0], abs=0.01)
    assert activations == pytest.approx(logged[1], abs=0.03)
    assert cache == pytest.approx(logged[2], abs=0.03)


def test_what_does_not_load_has_no_room_for_a_cache() -> None:
    """Llama-3.3-70B in 8 bits on one H100: the log says -1.44 GiB for the cache."""
    sizes = dimensions("Llama-3.1-70B")
    found = serve(sizes, Serving(utilization=90, graphs=False, quantised="int8"), H100)
    assert (found.kv_cache, found.tokens, found.users) == (0, 0, 0)
    assert found.weights / GiB == pytest.approx(67.72, abs=0.03)
    short = found.allowed - found.weights - found.activations - found.non_torch
    assert short / GiB == pytest.approx(-1.44, abs=0.03)


@pytest.mark.parametrize("model", ["gpt2", "Llama-3.1-8B", "Qwen2-0.5B", "Qwen3-8B"])
def test_parts_of_the_weights_are_the_whole(model: str) -> None:
    sizes = dimensions(model)
    rotary = 0
    if not sizes.has("learned positions"):
        rotary = 2 * sizes.max_position_embeddings * sizes.head_dim
    alone = serving.weights(sizes, Serving())
    assert alone == parameter_bytes(sizes, "bf16") + rotary
    two = serving.weights(sizes, Serving(gpus=2)) - rotary
    # Norms, learned positions and some biases are on both, and words come in multiples of 64.
    assert 0 <= 2 * two - (alone - rotary) < 0.02 * alone


def test_key_value_heads_are_split_and_then_copied() -> None:
    sizes = dimensions("Llama-3.1-8B")  # 32 heads, 8 for keys and values
    tokens = [serve(sizes, Serving(gpus=n), H100).token for n in (1, 2, 8, 16)]
    assert tokens == [131_072, 65_536, 16_384, 16_384]
    with pytest.raises(ValueError, match="gpus is 3: expected a divisor of the 32 attention heads"):
        serve(sizes, Serving(gpus=3), H100)


def test_more_room_for_users() -> None:
    sizes = dimensions("Llama-3.1-8B")
    base = serve(sizes, Serving(), cards()["RTX 4090"])
    assert base.users == base.tokens // 4096 > 0
    halved = serve(sizes, Serving(cache_dtype="fp8"), cards()["RTX 4090"])
    assert base.tokens * 2 <= halved.tokens <= base.tokens * 2 + 16
    eager = serve(sizes, Serving(graphs=False), cards()["RTX 4090"])
    fewer = serve(sizes, Serving(sequences=16), cards()["RTX 4090"])
    small = serve(sizes, Serving(quantised="nf4"), cards()["RTX 4090"])
    assert min(eager.tokens, fewer.tokens, small.tokens) > base.tokens
    assert serve(sizes, Serving(length=1), H100).users == 1024  # vLLM runs no more at a time


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"utilization": 101}, "utilization is 101: expected at most 100, in percent"),
        ({"utilization": 0.9}, "utilization is 0.9: expected a whole number from 1 up"),
        ({"length": 0}, "length is 0: expected a whole number from 1 up"),
        ({"quantised": "int3"}, "quantised is 'int3': expected None or one of int8"),
        ({"graphs": 1}, "graphs is 1: expected True or False"),
    ],
)
def test_what_cannot_be_served_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Serving(**given)  # type: ignore[arg-type]


def test_a_name_is_no_card() -> None:
    with pytest.raises(ValueError, match=r"card is 'H100': expected a Card"):
        serve(dimensions("gpt2"), Serving(length=64), "H100")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="length is 4096: expected at most the 1024 positions"):
        serve(dimensions("gpt2"), Serving(), H100)


def test_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["estimate", "Llama-3.1-8B", "--vllm", "--card", "RTX 4090", "--cache-dtype", "fp8"]
    assert cli.main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    served = serve(dimensions("Llama-3.1-8B"), Serving(cache_dtype="fp8"), cards()["RTX 4090"])
    assert (told["users"], told["kv_cache"]) == (served.users, served.kv_cache)
    assert cli.main(arguments) == 0
    assert f"{served.users} users of 4,096 tokens at a time" in capsys.readouterr().out
    assert cli.main(["estimate", "Llama-3.1-70B", "--vllm", "--card", "H100"]) == 1
    assert "H100: 0 users" in capsys.readouterr().out
    for wrong in (["--vllm"], ["--vllm", "--card", "H100", "--rank", "8"]):
        assert cli.main(["estimate", "gpt2", *wrong]) == 2
    assert "rank is given: expected of dtype, quantised" in capsys.readouterr().err


@pytest.mark.parametrize(("dtype", "bits"), [("int8", 8), ("int4", 4)])
def test_each_64_numbers_of_a_quantised_cache_have_a_scale_and_a_shift(
    dtype: str, bits: int
) -> None:
    assert 64 * serving.cache_bytes(dtype) == 64 * bits // 8 + 2 + 2
