"""What is written to a path that somebody gave: whole or not at all, over nothing foreign."""

import ast
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from every_byte import files
from every_byte.files import check_writable, folder_beside, swap, written


def is_note(head: bytes) -> bool:
    return head.startswith(b"note")


def write(path: Path, text: str = "note 2", force: bool = False) -> None:
    with written(path, "a note", is_note, force, mode="w") as file:
        file.write(text)


def test_it_writes_a_new_file_and_replaces_one_of_its_kind(tmp_path: Path) -> None:
    target = tmp_path / "note.txt"
    write(target, "note 1: ä")
    assert target.read_text("utf-8") == "note 1: ä"
    write(target)
    assert target.read_text() == "note 2"
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_it_replaces_no_file_of_another_kind_unless_forced(tmp_path: Path) -> None:
    target = tmp_path / "thesis.tex"
    target.write_text("four years of work")
    with pytest.raises(FileExistsError, match=r"thesis\.tex exists and is not a note: name ano"):
        write(target)
    assert target.read_text() == "four years of work"
    write(target, force=True)
    assert target.read_text() == "note 2"


def test_an_empty_file_is_of_every_kind(tmp_path: Path) -> None:
    target = tmp_path / "made-by-mktemp"
    target.touch()
    write(target)
    assert target.read_text() == "note 2"


def test_it_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere: make it"):
        write(tmp_path / "nowhere" / "note.txt")
    with pytest.raises(IsADirectoryError, match="is a folder: name a file in it"):
        write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_fails_in_the_middle_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "note.txt"
    target.write_text("note 1")
    with pytest.raises(KeyboardInterrupt), written(target, "a note", is_note, mode="w") as file:
        file.write("no")
        raise KeyboardInterrupt
    assert target.read_text() == "note 1"
    with (
        pytest.raises(OSError, match=r"note\.txt cannot be written: No space left on device"),
        written(target, "a note", is_note, mode="w"),
    ):
        raise OSError(28, os.strerror(28))
    assert target.read_text() == "note 1"
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_a_link_stays_a_link_and_a_mode_its_mode(tmp_path: Path) -> None:
    target, link = tmp_path / "note.txt", tmp_path / "link"
    target.write_text("note 1")
    target.chmod(0o640)
    link.symlink_to(target)
    write(link)
    assert link.is_symlink() and target.read_text() == "note 2"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_a_device_is_written_to(tmp_path: Path) -> None:
    check_writable("/dev/null", "a note", is_note)
    write(Path("/dev/null"))
    reading, writing = os.pipe()
    write(Path(f"/dev/fd/{writing}"))
    assert os.read(reading, 100) == b"note 2"
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


KILLED = """
import os, pathlib, signal, sys
from every_byte.files import folder_beside
with folder_beside(pathlib.Path(sys.argv[1])) as beside:
    (beside / "shard").write_bytes(bytes(1000))
    print(beside.name, flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


def test_what_a_kill_leaves_the_next_run_removes(tmp_path: Path) -> None:
    """But not what another process is at, nor what it does not know."""
    place = tmp_path / "gpt2"
    (tmp_path / ".gpt2.of-another-program").mkdir()
    command = [sys.executable, "-c", KILLED, str(place)]
    killed = subprocess.run([*command, "killed"], capture_output=True, text=True, check=False)
    left = tmp_path / killed.stdout.strip()
    assert (left / "shard").exists()
    process = subprocess.Popen([*command, "at work"], stdin=-1, stdout=-1, text=True)
    with process:
        assert process.stdin is not None and process.stdout is not None
        at_work = tmp_path / process.stdout.readline().strip()
        assert not left.exists()
        with folder_beside(place) as beside:
            assert (at_work / "shard").exists() and beside.exists()
        process.stdin.close()
    assert [path.name for path in tmp_path.iterdir()] == [".gpt2.of-another-program"]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_folder_takes_another_ones_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    if not at_once:  # as where a file system cannot exchange two folders
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    place = tmp_path / "book"
    for text in ("first", "second"):
        with folder_beside(place) as beside:
            new = beside / "new"
            new.mkdir()
            (new / "page").write_text(text)
            swap(new, place, beside / "old")
            assert (beside / "old" / "page").exists() is (text == "second")
        assert (place / "page").read_text() == text
    with folder_beside(place) as beside, pytest.raises(FileNotFoundError):
        swap(beside / "none", place, beside / "old")
    assert (place / "page").read_text() == "second"


@pytest.mark.skipif(sys.platform != "linux", reason="macOS exchanges likewise, Windows does not")
def test_at_no_moment_is_there_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, new = tmp_path / "book", tmp_path / "new"
    for folder in (place, new):
        folder.mkdir()
        (folder / "page").write_text(folder.name)
    seen = []
    rename = Path.rename

    def renamed(path: Path, target: Path) -> Path:
        seen.append((place / "page").read_text())
        done = rename(path, target)
        seen.append((place / "page").read_text())
        return done

    monkeypatch.setattr(Path, "rename", renamed)
    swap(new, place, tmp_path / "old")
    assert set(seen) == {"new"} and (tmp_path / "old" / "page").read_text() == "book"


def test_each_fault_stands_in_the_table_of_promises() -> None:
    root = Path(__file__).parent.parent
    tests = ast.parse((root / "tests" / "faults" / "test_faults.py").read_text("utf-8")).body
    names = {t.name for t in tests if isinstance(t, ast.FunctionDef) and t.name[:5] == "test_"}
    table = (root / "CONTRIBUTING.md").read_text("utf-8")
    assert set(re.findall(r"\| `(test_\w+)` \|", table)) == names
