"""The command every-byte: what it prints, its exit status, and files that mean no good."""

import json
import os
import pickle
import subprocess
import sys
import urllib.request
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from every_byte import cli
from every_byte.commands import Refused, replay
from every_byte.commands.replay import read
from every_byte.data import cards, catalogue, unknown_card
from every_byte.estimate import dimensions, fit, memory
from every_byte.estimate.presets import PRESETS
from every_byte.gpu import VirtualGPU
from every_byte.units import MiB


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_module_is_the_command() -> None:
    code = "import sys; from every_byte.cli import main; sys.exit(main())"
    module, command = run("-m", "every_byte", "--help"), run("-c", code, "--help")
    assert module.stdout == command.stdout and module.returncode == 0
    assert module.stdout.startswith("usage: every-byte [-h] COMMAND")
    for name in cli.COMMANDS:
        assert f"\n    {name}" in module.stdout


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name != "record"])
def test_each_has_help_and_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_run_says_whose_rights_a_script_has(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "The script is really run, with your rights and no sandbox" in said


def test_estimates_and_replays_need_no_torch() -> None:
    code = """
import sys
from every_byte import cli
assert cli.main(["estimate", "gpt2", "--length", "64", "--json"]) == 0
assert cli.main(["replay", "no such file"]) == 2
assert "torch" not in sys.modules
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_a_record_is_made_where_the_experiments_are(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its arguments are the module's, which is not a part of the package."""
    assert cli.main(["record", "--all", "--list"]) == 0
    said = capfd.readouterr().out.split()
    assert {"mlp-adam", "run-llama1b-bf16", "operation-aten.topk.default"} <= set(said)
    assert cli.main(["record", "--only", "no such"]) == 2
    assert "--only is 'no such'" in capfd.readouterr().err
    monkeypatch.setattr("every_byte.commands.record.find_spec", lambda name: None)
    assert cli.main(["record"]) == 2
    assert "expected a checkout of the book" in capfd.readouterr().err


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main([*arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    return said.err


# every-byte estimate


def test_an_estimate_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dtype", "bf16", "--batch", "2", "--length", "512", "--checkpointing"]
    assert cli.main(["estimate", "Llama-3.2-1B", *arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    setup = replace(PRESETS["full"][1], batch=2, length=512, checkpointing=True)
    found = memory(dimensions("Llama-3.2-1B"), setup)
    assert told["total"] == found.total == sum(told["parts"].values())
    assert told["parts"]["parameters"] == found.parameters
    assert (told["held"], told["peak"], told["needed"]) == (found.held, found.peak, found.needed)
    assert told["setup"]["checkpointing"] is True and told["setup"]["amp"] is None
    assert told["card"] is told["fits"] is None
    assert told["levers"] and all(lever["saved"] > 0 for lever in told["levers"])


def test_an_estimate_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--optimizer", "sgd", "--dtype", "fp32", "--length", "512"]
    assert cli.main(["estimate", "gpt2", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    # 124,439,808 parameters of 4 bytes, and as many gradients.
    assert lines[0].split() == ["parameters", "0.498", "GB", "497,759,232", "B"]
    assert lines[1].split() == ["gradients", "0.498", "GB", "497,759,232", "B"]


@pytest.mark.parametrize(("model", "status"), [("gpt2", 0), ("Llama-3.1-8B", 1)])
def test_whether_it_fits(model: str, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["estimate", model, "--card", "rtx 4090", "--length", "1024"]
    assert cli.main([*arguments, "--json"]) == status
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] is not bool(status)
    assert (told["card"], told["capacity"]) == ("RTX 4090", cards()["RTX 4090"].usable)
    assert told["verdict"] == ("does not fit" if status else "fits")
    assert cli.main(arguments) == status
    assert f"RTX 4090: it {'does not fit' if status else 'fits'}, " in capsys.readouterr().out


def test_what_cannot_be_estimated(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "estimate", "gpt5")
    assert said.startswith("every-byte estimate: model is 'gpt5': expected one of gpt2, ")
    said = refusal(capsys, "estimate", "gpt2", "--length", "9", "--card", "H300")
    assert said.startswith("every-byte estimate: card is 'H300': expected one of ")
    said = refusal(capsys, "estimate", "gpt2", "--quantised", "int8")
    assert "rank is 0: expected 1 or more" in said


@pytest.mark.parametrize("preset", PRESETS)
def test_what_you_want_to_do(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    """QLoRA of Llama-3.1-8B fits on 24 GiB; full fine-tuning says what would make it fit."""
    status = cli.main(["estimate", "Llama-3.1-8B", "--for", preset, "--gib", "24", "--json"])
    told, setup = json.loads(capsys.readouterr().out), PRESETS[preset][1]
    sizes, card = dimensions("Llama-3.1-8B"), unknown_card(24 * 2**30)
    capacity, of_card = card.usable, {"workspace": card.cublas_workspace, "context": card.context}
    assert told["needed"] == memory(sizes, setup, **of_card).needed
    assert status == (0 if told["needed"] <= capacity else 1)
    assert preset != "qlora" or status == 0
    assert told["most_sequences"] == fit.most_sequences(sizes, setup, capacity, **of_card)
    ways = fit.shortest(sizes, setup, capacity, **of_card)
    assert [tuple(way["names"]) for way in told["combinations"]] == [way.names for way in ways]
    assert bool(ways) == bool(status)


CONFIG = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def test_a_config_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, asked = tmp_path / "config.json", []
    path.write_text(json.dumps(CONFIG))
    assert cli.main(["estimate", "--config", str(path), "--json"]) == 0
    mine = json.loads(capsys.readouterr().out)
    # Embedding and head; four square matrices and three of the MLP; norms.
    count = 2 * 1000 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    assert mine["parts"]["parameters"] == 2 * count

    def urlopen(address: str, timeout: float) -> BytesIO:
        asked.append(address)
        return BytesIO(path.read_bytes())

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    assert cli.main(["estimate", "me/mine", "--hub", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"] == mine["parts"]
    address = "https://huggingface.co/me/mine/resolve/main/config.json"
    assert asked == [address]
    # Without an option: a path that is there, or its folder; else the hub.
    for model in (str(path), str(tmp_path), "me/mine"):
        assert cli.main(["estimate", model, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["parts"] == mine["parts"]
    assert asked == [address, address]

    def nothing(address: str, timeout: float) -> BytesIO:
        raise URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", nothing)
    assert "give the path of its config.json" in refusal(capsys, "estimate", "me/mine")
    # What is in the list needs no network, by the hub's name either.
    for model in ("Qwen3-0.6B", "Qwen/Qwen3-0.6B"):
        assert cli.main(["estimate", model, "--json"]) == 0
        listed = json.loads(capsys.readouterr().out)["parts"]
        assert listed["parameters"] == 2 * 596_049_920
    path.write_text(json.dumps(CONFIG | {"mlp_bias": True}))
    assert "mlp_bias is True: expected none" in refusal(capsys, "estimate", "--config", str(path))
    path.write_text("{")
    assert "cannot be read" in refusal(capsys, "estimate", "--config", str(path))
    assert "a name, or --config" in refusal(capsys, "estimate")
    assert "expected org/name" in refusal(capsys, "estimate", "../x", "--hub")


def test_help_names_the_models(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["estimate", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert f"The list: {', '.join(catalogue())}".replace(" ", "") in told.replace(" ", "")
    assert "--amp AMP the dtype that autocast computes in" in told


# every-byte replay


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot of a training step, as the virtual GPU writes it."""
    path = tmp_path_factory.mktemp("recorded") / "snapshot.pickle"
    with VirtualGPU(alloc_conf="expandable_segments:True") as gpu:
        gpu.record_memory_history()
        with gpu.device:
            model = nn.Linear(1000, 1000)
            model(torch.randn(64, 1000)).sum().backward()
        gpu.dump_snapshot(path)
    return path


def test_a_recorded_step_replays(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["replay", str(recorded), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["agrees"] is True and told["mismatch"] is None
    assert told["alloc_conf"] == "expandable_segments:True"
    assert told["peak_reserved"] % (2 * MiB) == 0
    assert told["peak_reserved"] >= told["peak_allocated"] > 3 * 4_000_000
    assert cli.main(["replay", str(recorded)]) == 0
    assert "The replay agrees with every event" in capsys.readouterr().out


def test_other_settings_do_not_agree(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["replay", str(recorded), "--alloc-conf", ""]) == 1
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("The replay diff")]
    assert "the replay takes segment_alloc of 20,971,520 B" in line and ", not segment_map" in line


def test_json_says_the_same(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_json = tmp_path / "snapshot.json"
    as_json.write_text(json.dumps(pickle.loads(recorded.read_bytes())))
    printed = []
    for path in (recorded, as_json):
        assert cli.main(["replay", str(path), "--json"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


class Hostile:
    """Runs a command when a pickle of it is loaded."""

    def __init__(self, told: Path) -> None:
        self.told = told

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.told),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_is_executed(
    protocol: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, path = tmp_path / "made", tmp_path / "hostile.pickle"
    content = {"device_traces": [[]], "segments": [], "more": Hostile(made)}
    path.write_bytes(pickle.dumps(content, protocol))
    said = refusal(capsys, "replay", str(path))
    assert "it asks for " in said and "mkdir, and is not read further" in said
    assert not made.exists()
    pickle.loads(path.read_bytes())
    assert made.exists()


def test_damaged_at_any_place(recorded: Path, tmp_path: Path) -> None:
    content = recorded.read_bytes()
    path = tmp_path / "cut.pickle"
    for length in range(0, len(content) - 1, max(1, len(content) // 200)):
        path.write_bytes(content[:length])
        with pytest.raises(Refused, match="cannot be read"):
            read(path)


def laughs(times: int) -> Any:
    """Lists of lists of one list: a few bytes, and ever more to go through."""
    found: Any = []
    for _ in range(times):
        found = [found] * 100
    return found


@pytest.mark.parametrize(
    ("content", "says"),
    [
        # A table of 2**29 places for what is to be found again: 4 GiB.
        (b"\x80\x04]r\xff\xff\xff\x1f.", "its 9 bytes ask for more memory than 256.00 MiB"),
        (b"\x80\x04\x8e" + (2**33).to_bytes(8, "little") + b"x.", "cannot be read ("),
        (b"[" * 100_000, "cannot be read (maximum recursion depth"),
        (b'{"device_traces": ' + b"9" * 5000, "cannot be read (Exceeds the limit"),
        (pickle.dumps({"device_traces": laughs(2), "segments": []}), "says 10,100 events and"),
        (pickle.dumps({"device_traces": [[laughs(20)]], "segments": []}), "expected, not [[[[[["),
        (pickle.dumps({"device_traces": [[10**5000]], "segments": []}), "more digits than Python"),
        (
            pickle.dumps({"device_traces": [[{"action": "a\x1b[2J"}]], "segments": []}),
            "event 0 has action 'a\\x1b[2J'",
        ),
        (
            pickle.dumps({"device_traces": [[{"size": 2**63}]], "segments": []}),
            "event 0 has size 9223372036854775808",
        ),
        (
            pickle.dumps(
                {
                    "device_traces": [[]],
                    "segments": [],
                    "allocator_settings": {"PYTORCH_ALLOC_CONF": [1]},
                }
            ),
            "PYTORCH_ALLOC_CONF is [1]",
        ),
        (b"cos\x1b[2J\nsystem\n.", "it asks for os[2J.system, and is not read further"),
    ],
)
def test_what_a_file_asks_for_is_bounded_by_its_bytes(
    content: bytes, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hostile"
    path.write_bytes(content)
    assert says in refusal(capsys, "replay", str(path))


def test_a_file_without_end_is_not_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(replay, "LARGEST_FILE", 1000)
    assert "/dev/zero is larger than 1000 bytes: expec" in refusal(capsys, "replay", "/dev/zero")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=100))
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(content)
    try:
        read(path)
    except Refused as error:
        assert "\n" not in str(error)


NUMBERS = st.sampled_from([-1, 0, 1, 512, 1000, 2 * MiB, 20 * MiB, 10**30])
ACTIONS = st.sampled_from(
    [
        *("alloc", "free_requested", "free_completed", "segment_alloc", "segment_free"),
        *("segment_map", "segment_unmap", "oom", "snapshot", "", None),
    ]
)
VALUES = st.one_of(NUMBERS, st.none(), st.just("text"), st.lists(NUMBERS, max_size=1))
EVENTS = st.fixed_dictionaries(
    {"action": ACTIONS, "size": NUMBERS}, optional={"addr": NUMBERS, "stream": VALUES}
)


@settings(max_examples=300, deadline=None)
@given(st.lists(EVENTS, min_size=1, max_size=12), VALUES)
def test_any_trace_is_replayed_or_refused(
    tmp_path_factory: pytest.TempPathFactory, events: list[dict[str, Any]], segments: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    content = {"device_traces": [events], "segments": [] if segments is None else segments}
    path.write_text(json.dumps(content))
    assert cli.main(["replay", str(path)]) in (0, 1, 2)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([], "it has no device_traces and segments"),
        ({"device_traces": [[]], "segments": []}, "no device has events"),
        ({"device_traces": 1, "segments": []}, "device_traces: a list was expected, not int"),
        ({"device_traces": [[1]], "segments": []}, "a dict was expected, not 1"),
        (
            {"device_traces": [[{"action": "alloc", "size": "8"}]], "segments": []},
            "event 0 has size '8'",
        ),
        (
            {"device_traces": [[{"action": "alloc", "size": 8}]], "segments": []},
            "event 0 of the trace has no 'addr'",
        ),
    ],
)
def test_what_is_no_snapshot(
    content: Any, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "no.json"
    path.write_text(json.dumps(content))
    assert says in refusal(capsys, "replay", str(path))


def test_one_of_several_devices(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = pickle.loads(recorded.read_bytes())
    snapshot["device_traces"] *= 2
    path = tmp_path / "two.json"
    path.write_text(json.dumps(snapshot))
    assert "devices 0, 1 have events: choose one by --device" in refusal(
        capsys, "replay", str(path)
    )
    assert "device is 2: the file has 2 devices" in refusal(
        capsys, "replay", str(path), "--device", "2"
    )
    assert cli.main(["replay", str(path), "--device", "0"]) == 0
    assert cli.main(["replay", str(path), "--device", "1"]) == 1  # the segments are device 0's


def test_no_such_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, "replay", "nowhere") == (
        "every-byte replay: nowhere: No such file or directory\n"
    )
