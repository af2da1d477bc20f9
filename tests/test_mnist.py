"""The embedded digits: real, unpacked once, and whole."""

from pathlib import Path

import pytest
import torch

from helpers import mnist as module
from helpers.mnist import is_whole_idx, mnist


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EVERY_BYTE_CACHE", str(tmp_path))
    return tmp_path


def test_the_digits_are_there_in_full_shape(cache: Path) -> None:
    train, test = mnist(train=True), mnist(train=False)
    assert (len(train), len(test)) == (8000, 2000)
    image, label = train[0]
    assert image.shape == (1, 28, 28) and image.dtype == torch.float32
    assert 0 <= label <= 9
    counts = torch.bincount(train.targets) + torch.bincount(test.targets)
    assert counts.min() > 850 and counts.max() < 1150
    pixels = train.data.float() / 255  # MNIST's own statistics, which the transform names
    assert pixels.mean() == pytest.approx(0.1307, abs=0.002)
    assert pixels.std() == pytest.approx(0.3081, abs=0.002)


def test_they_are_unpacked_once(cache: Path) -> None:
    mnist()
    raw = cache / "mnist-10k" / "MNIST" / "raw"
    times = {path.name: path.stat().st_mtime_ns for path in raw.iterdir()}
    assert len(times) == 4
    mnist()
    assert {path.name: path.stat().st_mtime_ns for path in raw.iterdir()} == times


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_cache_is_remade(cache: Path, damage: str) -> None:
    first = mnist()[0][0]
    images = cache / "mnist-10k" / "MNIST" / "raw" / "train-images-idx3-ubyte"
    content = images.read_bytes()
    if damage == "cut":
        images.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        images.write_bytes(content[:400] + bytes(600) + content[1000:])
    else:
        images.unlink()
    assert torch.equal(mnist()[0][0], first)
    assert images.read_bytes() == content


def test_an_interrupted_write_leaves_the_old_file(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = cache / "file"
    target.write_bytes(b"old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module._replace(target, b"new")
    assert [path.read_bytes() for path in cache.iterdir()] == [b"old"]


def test_without_a_network_the_full_set_falls_back_with_a_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    assert len(mnist(full=True)) == 8000
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("The full MNIST could not be downloaded")
    assert said[-1].endswith("going on with the 10,000 embedded digits.")


def test_a_cache_folder_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EVERY_BYTE_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(OSError, match="set EVERY_BYTE_CACHE to a folder that can be written"):
        mnist()


def test_an_idx_file_is_whole_or_not(tmp_path: Path) -> None:
    path = tmp_path / "labels"
    whole = b"\0\0\x08\x01" + (3).to_bytes(4, "big") + b"\1\2\3"
    for content, expected in (
        (whole, True),
        (whole[:-1], False),
        (whole + b"\0", False),
        (whole[:6], False),
        (b"\0\0", False),
        (b"PK" + whole[2:], False),
    ):
        path.write_bytes(content)
        assert is_whole_idx(path) is expected
