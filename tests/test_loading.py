"""Models that transformers loads straight onto the virtual card, in a script's own words."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from every_byte import as_cuda
from helpers.measured import of_experiments

transformers = pytest.importorskip("transformers")
FOUR: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from helpers.hollow import hollow

    return hollow("Qwen2-0.5B", tmp_path_factory.mktemp("checkpoints") / "Qwen2-0.5B")


@pytest.mark.parametrize(("precision", "bits"), [("nf4", FOUR), ("int8", {"load_in_8bit": True})])
def test_a_quantised_load_takes_what_it_took_on_the_card(
    folder: Path, precision: str, bits: dict[str, bool]
) -> None:
    """Allocated, reserved and their peaks on an H200, to the byte."""
    settings = transformers.BitsAndBytesConfig(**bits)
    with as_cuda("H200", torch_version="2.11") as gpu:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float16, device_map="cuda", quantization_config=settings
        )
        gc.collect()
        found = {
            "memory_allocated": gpu.memory_allocated(),
            "memory_reserved": gpu.memory_reserved(),
            "max_memory_allocated": gpu.max_memory_allocated(),
            "max_memory_reserved": gpu.max_memory_reserved(),
            "by_kind": {kind: n for kind, n in gpu.breakdown(model).items() if n},
        }
        del model
    ((_, _, measured, _),) = of_experiments(f"load-Qwen2-0.5B-{precision}-device_map")
    assert found == measured


def test_a_hollow_checkpoint_is_of_full_size_and_takes_no_space(folder: Path) -> None:
    status = (folder / "model.safetensors").stat()
    assert status.st_size > 2 * 494_032_768 > 100 * 512 * status.st_blocks
