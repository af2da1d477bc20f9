"""Checkpoints made, damaged, interrupted and refused; models loaded from them."""

import functools
import gc
import json
import os
import re
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, core_model_loading, modeling_utils

from every_byte.estimate import dimensions, known_models, parameter_bytes
from every_byte.gpu import VirtualGPU
from every_byte.tracker import untracked
from every_byte.units import GiB, MiB
from helpers import models
from helpers.models import PRECISIONS, build, checkpoint, load, main
from helpers.placement import natural, replay_device_map, replay_to

TINY = {
    "gpt2-tiny": {"model_type": "gpt2", "max_position_embeddings": 64, "dtype": "float32"},
    "qwen2-tiny": {
        "model_type": "qwen2",
        "intermediate_size": 128,
        "num_key_value_heads": 2,
        "dtype": "bfloat16",
    },
}
SIZES = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Small models beside the published ones, several shards each, in a cache of their own."""
    for name, traits in TINY.items():
        known = {**SIZES, **traits, "tie_word_embeddings": True, "published": 0}
        source = f"https://huggingface.co/someone/{name}"
        monkeypatch.setitem(known_models(), name, {**known, "source": source})
    monkeypatch.setattr(models, "_SHARD", MiB // 8)
    monkeypatch.setenv("EVERY_BYTE_CACHE", str(tmp_path))
    transformers.utils.logging.disable_progress_bar()
    yield tmp_path / "checkpoints"


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


# Making


@pytest.mark.parametrize("name", TINY)
def test_a_checkpoint_is_made_once_and_loads_as_any_other(name: str, tiny: Path) -> None:
    folder = checkpoint(name)
    assert folder == tiny / name
    made = content(folder)
    assert sum(file.endswith(".safetensors") for file in made) > 1
    assert json.loads(made["config.json"])["dtype"] == TINY[name]["dtype"]
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert checkpoint(name) == folder
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert model.dtype == getattr(torch, str(TINY[name]["dtype"]))
    for key, parameter in model.named_parameters():
        spread = parameter.float().std().item()
        if parameter.dim() == 1:  # of a bias or a norm
            assert parameter.unique().tolist() == [float(key.endswith("weight"))]
        else:
            assert 0.015 < spread < 0.025, key


def test_the_same_weights_are_made_everywhere(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    first = content(checkpoint("gpt2-tiny"))
    torch.manual_seed(2)  # weights do not come from the caller's seed
    state = torch.get_rng_state()
    monkeypatch.setenv("EVERY_BYTE_CACHE", str(tiny))
    assert content(checkpoint("gpt2-tiny")) == first
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's seed is touched


def cut_a_shard(folder: Path) -> None:
    shard = max(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])


def cut_a_header(folder: Path) -> None:
    min(folder.glob("*.safetensors")).write_bytes(b"\x10\0\0")


def lose_a_shard(folder: Path) -> None:
    min(folder.glob("*.safetensors")).unlink()


def lose_the_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def break_the_configuration(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def be_another_model(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("wpe", "other"))


@pytest.mark.parametrize(
    "damage",
    [
        cut_a_shard,
        cut_a_header,
        lose_a_shard,
        lose_the_index,
        break_the_configuration,
        be_another_model,
    ],
)
def test_a_damaged_checkpoint_is_made_again(damage: Callable[[Path], None], tiny: Path) -> None:
    folder = checkpoint("gpt2-tiny")
    whole = content(folder)
    damage(folder)
    assert content(folder) != whole
    assert content(checkpoint("gpt2-tiny")) == whole
    assert [path.name for path in tiny.iterdir()] == ["gpt2-tiny"]


def test_shards_may_be_cut_otherwise(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint("gpt2-tiny")
    made = content(folder)
    for size in (MiB // 4, 100 * MiB):
        monkeypatch.setattr(models, "_SHARD", size)
        assert content(checkpoint("gpt2-tiny")) == made
        index = "model.safetensors.index.json"
        (folder / index).unlink()
        remade = content(checkpoint("gpt2-tiny"))
        assert remade[index] != made[index]
        assert not any(
            AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)[1].values()
        )
        made = remade
    assert len(made) == 3  # configuration, index, one shard


def test_a_checkpoint_of_another_dtype_is_made_again(tiny: Path) -> None:
    whole = content(checkpoint("qwen2-tiny"))
    for shard in (tiny / "qwen2-tiny").glob("*.safetensors"):
        save_file({k: v.half() for k, v in load_file(shard).items()}, shard, {"format": "pt"})
    assert content(tiny / "qwen2-tiny") != whole
    assert content(checkpoint("qwen2-tiny")) == whole


def at_the_second_shard(error: BaseException) -> Callable[..., None]:
    save, calls = models.save_file, []

    def fails(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise error
        save(*arguments)

    return fails


def test_an_interrupted_making_leaves_nothing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "save_file", at_the_second_shard(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        checkpoint("gpt2-tiny")
    assert list(tiny.iterdir()) == []


def test_a_disk_that_fills_up_is_one_clear_line(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = models.SafetensorError("I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(models, "save_file", at_the_second_shard(full))
    assert main(["gpt2-tiny"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"gpt2-tiny could not be written to {tiny} (I/O error: No space left on device "
        "(os error 28)): make room, or set EVERY_BYTE_CACHE to another folder"
    )
    assert list(tiny.iterdir()) == []


def test_too_little_disk_or_memory_is_said_before_anything_is_written(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Has:
        free = available = 50_000_000

    monkeypatch.setattr(models.shutil, "disk_usage", lambda _: Has)
    needs = f"gpt2-large needs 3.1 GB in {tiny}, and 0.1 GB are free: make room, or set EVERY_BYTE"
    with pytest.raises(OSError, match="^" + re.escape(needs)):
        checkpoint("gpt2-large")
    monkeypatch.undo()
    monkeypatch.setenv("EVERY_BYTE_CACHE", str(tiny.parent))
    monkeypatch.setattr(models.psutil, "virtual_memory", lambda: Has)
    with pytest.raises(MemoryError, match=r"needs 1.0 GB of memory, and 0.1 GB are free: close"):
        checkpoint("gpt2-large")
    assert list(tiny.iterdir()) == []


def test_who_comes_second_takes_what_is_there(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = models.save_file

    def another_process_is_faster(*arguments: Any) -> None:
        monkeypatch.setattr(models, "save_file", save)
        checkpoint("gpt2-tiny")
        save(*arguments)

    monkeypatch.setattr(models, "save_file", another_process_is_faster)
    whole = content(checkpoint("gpt2-tiny"))
    assert [path.name for path in tiny.iterdir()] == ["gpt2-tiny"]
    assert content(checkpoint("gpt2-tiny")) == whole


def test_the_command_says_where_they_are_and_what_is_wrong(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gpt2-tiny", "qwen2-tiny"]) == 0
    assert capsys.readouterr().out.split() == [str(tiny / "gpt2-tiny"), str(tiny / "qwen2-tiny")]
    assert main(["gpt3"]) == 1
    assert capsys.readouterr().err.startswith("model is 'gpt3': expected one of gpt2, ")
    for arguments in (["--help"], [], ["gpt2-tiny", "--weights", "best"]):
        with pytest.raises(SystemExit):
            main(arguments)


# The hub, as far as a server on this machine can play it

Answer = namedtuple("Answer", "status code")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Lets `checkpoint` ask a server here, which answers as it is told."""
    answer = [Answer(500, "")]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer[0].status)
            self.send_header("X-Error-Code", answer[0].code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def tell(status: int, code: str = "", port: int = server.server_port) -> None:
        answer[0] = Answer(status, code)
        asked = functools.partial(
            models.hub_download, endpoint=f"http://127.0.0.1:{port}", cache_dir=tmp_path / "hub"
        )
        monkeypatch.setattr(models, "hub_download", asked)

    yield tell
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "GatedRepo", "is gated: accept its terms on huggingface.co, then log in with `hf "),
        (404, "RepoNotFound", "is not there, or is private: log in with `hf auth login` if it is "),
    ],
)
def test_what_the_hub_refuses_is_one_clear_line(
    hub: Callable[..., None], status: int, code: str, expected: str
) -> None:
    hub(status, code)
    with pytest.raises(OSError, match="^" + re.escape(f"someone/gpt2-tiny on the hub {expected}")):
        checkpoint("gpt2-tiny", "hub")


def test_without_a_network_it_says_so(hub: Callable[..., None]) -> None:
    hub(0, port=9)  # nobody listens there
    with pytest.raises(OSError, match="cannot be reached: see to the network, or take weights='r"):
        checkpoint("gpt2-tiny", "hub")


def test_offline_nothing_is_asked_for(tmp_path: Path) -> None:
    code = "from helpers.models import main; raise SystemExit(main(['gpt2', '--weights', 'hub']))"
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | offline, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == (
        "openai-community/gpt2 on the hub is not in the local cache, and HF_HUB_OFFLINE forbids "
        "to fetch it\n"
    )


@pytest.mark.parametrize(
    ("attempt", "expected"),
    [
        (lambda: checkpoint("gpt3"), "model is 'gpt3': expected one of gpt2, "),
        (lambda: checkpoint("gpt2", "best"), "weights is 'best': expected 'random' or 'hub'"),
        (lambda: load("gpt2", "fp8"), "precision is 'fp8': expected one of fp32, fp16, bf16, int8"),
        (lambda: load("gpt2", "fp16", "cuda"), "path is 'cuda': expected 'device_map' or 'to'"),
        (lambda: load("gpt2", "int8", "to"), "path is 'to' for int8: expected 'device_map', since"),
    ],
)
def test_bad_input_is_one_clear_line(attempt: Callable[[], object], expected: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(expected)) as error:
        attempt()
    assert "\n" not in str(error.value)


# Loading


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_loaded_model_computes_and_its_bytes_are_on_the_gpu(name: str, precision: str) -> None:
    ids = torch.arange(8)[None]
    with VirtualGPU() as gpu, torch.no_grad():
        exact = load(name, "fp32")(ids).logits
        gc.collect()
        assert gpu.memory_allocated() == 0  # it went with the model
        model = load(name, precision)
        rows = gpu.breakdown(model)
        wanted = parameter_bytes(
            dimensions(name), "fp16", precision if precision in ("int8", "nf4") else None
        )
        if precision in ("int8", "nf4"):
            codes = 0 if precision == "int8" else 64 * len(model.on_the_virtual_gpu)
            assert wanted <= rows["parameters"] + rows["scales"] <= wanted + codes
        elif precision in models.DTYPES:
            assert rows["parameters"] == parameter_bytes(dimensions(name), precision)
        assert (rows["scales"] > 0) == (precision not in models.DTYPES)
        off = (model(ids).logits.float() - exact).square().mean().sqrt() / exact.std()
        assert off < {"fp32": 1e-6, "fp16": 0.01, "bf16": 0.05, "int8": 0.1}.get(precision, 0.5)
        assert gpu.breakdown(model)["parameters"] == rows["parameters"]  # computing moves nothing
        del model
        gc.collect()
        gpu.clear_cublas_workspaces()
        # bitsandbytes keeps its table of 256 levels for its next model.
        assert gpu.memory_allocated() == (1024 if precision == "nf4 double" else 0)


def test_without_bitsandbytes_what_is_not_quantised_loads(tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["bitsandbytes"] = None
from every_byte.estimate import known_models
known_models()["gpt2-tiny"] = {known_models()["gpt2-tiny"]}
from every_byte.gpu import VirtualGPU
from helpers.models import load
with VirtualGPU() as gpu:
    for path in ("to", "device_map"):
        model = load("gpt2-tiny", "fp16", path)
        print(gpu.breakdown(model)["parameters"])
        del model
"""
    cache = os.environ | {"EVERY_BYTE_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=cache, capture_output=True, text=True, check=True
    )
    wanted = parameter_bytes(dimensions("gpt2-tiny"), "fp16")
    assert done.stdout.split() == [str(wanted)] * 2


def test_what_stays_unquantised_has_the_dtype_that_is_asked_for() -> None:
    with VirtualGPU() as gpu:
        sums = []
        for dtype in (torch.float16, "auto"):
            model = load("gpt2-tiny", "int8", dtype=dtype)
            rows = gpu.breakdown(model)
            sums.append(rows["parameters"] + rows["scales"])
            del model
    sizes = dimensions("gpt2-tiny")
    assert sums == [parameter_bytes(sizes, dtype, "int8") for dtype in ("fp16", "fp32")]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("precision", ["fp16", "int8", "nf4"])
def test_the_order_and_the_reserved_block_are_those_of_transformers(
    name: str, precision: str
) -> None:
    """Its own loading is watched: what it reserves, and which parameter comes when."""
    reserved: list[float] = []
    order: list[str] = []
    set_parameter = core_model_loading.set_param_for_module

    def warm_up(model: Any, devices: Any, quantizer: Any) -> None:
        counted = modeling_utils.get_total_byte_count(model, dict.fromkeys(devices, 0), quantizer)
        reserved.extend(counted.values())

    def sets(model: Any, target: str, *rest: Any) -> None:
        order.append(target)
        set_parameter(model, target, *rest)

    with (
        mock.patch.object(modeling_utils, "caching_allocator_warmup", warm_up),
        mock.patch.object(core_model_loading, "set_param_for_module", sets),
        VirtualGPU() as gpu,
    ):
        model = load(name, precision)
        assert order == sorted(dict(model.named_parameters()), key=natural)
        del model
        gpu.empty_cache()
        asked: list[int] = []
        malloc = gpu.memory.malloc
        with mock.patch.object(
            gpu.memory, "malloc", side_effect=lambda n: asked.append(n) or malloc(n)
        ):
            load(name, precision)
        assert asked[0] == reserved[0] // 2 * 2


def test_the_names_are_sorted_as_transformers_sorts_them() -> None:
    with untracked():
        for name in ("gpt2", "Qwen2-0.5B"):
            names = list(dict(build(name, "meta").named_parameters()))
            theirs = sorted(names, key=core_model_loading.dot_natural_key)
            assert sorted(names, key=natural) == theirs


# gpt2-large in FP32: 774,030,080 parameters. By .to(), 72 matrices of 25 MiB lie in
# segments of 26 MiB and the embedding in one of 246 MiB, and the rests are not split off.
PARAMETERS = 774_030_080 * 4
MOVED = PARAMETERS + 72 * MiB + (246 * MiB - 257_315_840)


def test_gpt2_large_by_either_path() -> None:
    assert (MOVED, PARAMETERS) == (3_172_251_648, 3_096_120_320)
    with VirtualGPU() as gpu:
        with untracked():
            model = build("gpt2-large", "meta", torch.float32)
        twins = replay_to(model, gpu)
        assert gpu.memory_allocated() == MOVED
        del twins
        gpu.empty_cache()
        twins = replay_device_map(model, gpu, torch.float32)
        assert gpu.memory_allocated() == PARAMETERS
        assert gpu.max_memory_allocated() == MOVED
        assert gpu.breakdown()["parameters"] == PARAMETERS
        # A second one finds a free block for each of its tensors: nothing is reserved anew.
        del twins
        reserved = gpu.memory_reserved()
        twins = replay_device_map(model, gpu, torch.float32)
        assert (gpu.memory_allocated(), gpu.memory_reserved()) == (PARAMETERS, reserved)
        assert len(twins) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("capacity", "before", "expected"),
    [
        (None, 0, 1000 * MiB),  # nothing is there: all of it
        (None, 400 * MiB, 600 * MiB),  # less what is free
        (None, 600 * MiB, 0),  # most is free: nothing is asked for
        (2 * GiB, 0, int(0.8 * GiB)),  # 1.2 GiB are left alone
    ],
)
def test_the_reserved_block_leaves_out_what_is_free(
    capacity: int | None, before: int, expected: int
) -> None:
    model = torch.nn.Linear(1000 * MiB // 2, 1, bias=False, dtype=torch.float16, device="meta")
    with VirtualGPU(capacity=capacity) as gpu:
        torch.empty(before, dtype=torch.uint8, device=gpu.device)
        asked: list[int] = []
        memory = gpu.memory
        with mock.patch.object(memory, "malloc", side_effect=lambda n: asked.append(n) or 0):
            with mock.patch.object(memory, "free"):
                replay_device_map(model, gpu, torch.float16)
        assert asked == [expected // 2 * 2, 1000 * MiB]
