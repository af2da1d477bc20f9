"""Levers: each is noticed where it applies, and saves what it should once it is pulled."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import every_byte
from every_byte import levers
from every_byte.units import MiB


def run(program: Callable[[], object], *pulled: str) -> tuple[dict[str, str], int]:
    """What could be changed in a program, and its peak in bytes."""
    with every_byte.as_cuda("T4") as gpu:
        with levers.noticing() as noticed, levers.applied(list(pulled)):
            program()
        return noticed, gpu.max_memory_allocated()


def saved(program: Callable[[], object], lever: str) -> int:
    """Bytes of the peak that a lever takes away; it is noticed before."""
    noticed, before = run(program)
    assert lever in noticed
    _, after = run(program, lever)
    return before - after


def layers(n: int = 4) -> nn.Module:
    return nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(n))).cuda()


def test_without_gradients_nothing_is_kept_for_backward() -> None:
    def program() -> None:
        model, x = layers(), torch.zeros(1024, 1024, device="cuda")
        model(x)

    # Of four results of 4 MiB two live at once: a layer's own, and the one before.
    assert saved(program, "no-grad") == (4 - 2) * 4 * MiB


def test_gradients_set_to_none_are_not_there_in_the_next_forward() -> None:
    def program() -> None:
        model, x = layers(), torch.zeros(8192, 1024, device="cuda")
        optimizer = torch.optim.SGD(model.parameters())
        for _ in range(2):
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    # At the peak, where backward begins, the layers have no gradients yet.
    assert saved(program, "set-to-none") == 4 * 4 * MiB


def llama(**options: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        intermediate_size=2048,
        **options,
    )
    return transformers.LlamaForCausalLM(config).cuda().train()  # type: ignore[no-any-return]


def train(model: nn.Module, length: int) -> None:
    ids = torch.zeros(1, length, dtype=torch.long, device="cuda")
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters()).step()


def test_checkpoints_keep_only_what_enters_each_layer() -> None:
    kept = saved(lambda: train(llama(), 2048), "checkpointing")
    entering = 2048 * 512 * 4
    # Of each layer but the one in work at least the MLP's three results of 4 x the width go.
    assert kept > 3 * 3 * 4 * entering


def test_sdpa_makes_no_matrix_of_all_pairs() -> None:
    scores = 8 * 1024 * 1024 * 4  # heads x length x length
    kept = saved(lambda: train(llama(attn_implementation="eager"), 1024), "sdpa")
    assert kept >= 4 * scores  # the probabilities of four layers
