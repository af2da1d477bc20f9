"""Writing whole or not at all: to a path that somebody gave, over nothing that is not ours."""

import ctypes
import errno
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_HEAD = 4096  # bytes of an old file by which its kind is known


def check_writable(
    path: str | Path, kind: str, is_kind: Callable[[bytes], bool], force: bool = False
) -> None:
    """Refuse a path that `written` could not write to, before the work of an hour is lost.

    Args:
        path: the file to be; its folder has to be there.
        kind: what is written, with its article, such as "a memory snapshot".
        is_kind: whether an old file is one of that kind, by its first bytes.
        force: replace a file of any kind.

    Raises:
        OSError: there is no such folder, the path is a folder, it cannot be written, or a file
            of another kind is there.
    """
    target = _target(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"{path}: there is no folder {target.parent}: make it, or name another file"
        )
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it")
    place = target.parent if target.is_file() or not target.exists() else target
    if not os.access(place, os.W_OK):
        raise PermissionError(f"{path}: {place} cannot be written: name another file")
    if target.is_file() and not force:
        with open(target, "rb") as file:
            head = file.read(_HEAD)
        if head and not is_kind(head):
            raise FileExistsError(
                f"{path} exists and is not {kind}: name another file, or replace it with force"
            )


@contextmanager
def written(
    path: str | Path,
    kind: str,
    is_kind: Callable[[bytes], bool],
    force: bool = False,
    mode: str = "wb",
) -> Iterator[IO[Any]]:
    """A file to write to, beside `path`, that is moved there when the context ends well.

    If it does not, what was there before stays. No folder is made. A link keeps pointing to
    the file that is replaced. A device or a pipe, such as ``/dev/stdout``, is written to.

    Args:
        path, kind, is_kind, force: as for `check_writable`.
        mode: "wb", or "w" for UTF-8 text.

    Raises:
        OSError: as `check_writable`; or there is no room. The message names the path.
    """
    check_writable(path, kind, is_kind, force)
    encoding = None if "b" in mode else "utf-8"
    target = _target(path)
    if target.exists() and not target.is_file():
        with open(target, mode, encoding=encoding) as file:
            yield file
        return
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.new")
    try:
        with open(beside, mode.replace("w", "x"), encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # so that no crash leaves an empty file in its place
        if target.exists():
            shutil.copymode(target, beside)
        os.replace(beside, target)
    except OSError as error:
        if error.filename is None or str(error.filename) == str(beside):
            raise OSError(f"{path} cannot be written: {error.strerror or error}") from None
        raise
    finally:
        beside.unlink(missing_ok=True)


def _target(path: str | Path) -> Path:
    """The file that is replaced: what a link points to, but not behind a device or a pipe."""
    return Path(os.path.realpath(path)) if os.path.isfile(path) else Path(path).absolute()


@contextmanager
def folder_beside(place: Path) -> Iterator[Path]:
    """A hidden folder beside `place` to make something in that is then moved there.

    It is removed in the end. Where a kill left one, the next one for the same place removes
    it: a folder in use is known by a lock that its process holds, which no kill can leave
    behind. On Windows such folders stay.

    Raises:
        OSError: it cannot be made.
    """
    prefix = f".{place.name}."
    while True:
        beside = Path(tempfile.mkdtemp(dir=place.parent, prefix=prefix))
        with (beside / _LOCK).open("w") as held:
            if fcntl is not None:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(held, fcntl.LOCK_EX)
            if not (beside / _LOCK).exists():  # removed before it was held
                continue
            try:
                remove_left_over(place)
                yield beside
            finally:
                shutil.rmtree(beside, ignore_errors=True)
            return


_LOCK = "in-use.lock"


def remove_left_over(place: Path) -> None:
    """Remove the folders of `folder_beside` for a place that no process holds any more."""
    for folder in place.parent.iterdir() if fcntl is not None else ():
        if not folder.name.startswith(f".{place.name}.") or not folder.is_dir():
            continue
        with suppress(OSError):
            if not (folder / _LOCK).exists():  # of an older version, or being made just now
                if time.time() - folder.stat().st_mtime > 3600:
                    shutil.rmtree(folder, ignore_errors=True)
                continue
            with (folder / _LOCK).open() as held:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


def swap(new: Path, place: Path, aside: Path) -> None:
    """Move a folder to where another one may be, which goes `aside`, and comes back on failure.

    Linux and macOS exchange the two at once, so that whatever kill comes, one is in place. Where
    the system or the file system can't, there is a moment between two moves.

    Raises:
        OSError: it cannot be moved.
    """
    while True:
        if place.exists() and _exchange(new, place):
            new.rename(aside)
            return
        with suppress(FileNotFoundError):
            place.rename(aside)
        try:
            new.rename(place)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another one came in between
                shutil.rmtree(aside, ignore_errors=True)
                continue
            if aside.exists():
                aside.rename(place)
            raise
        return


_AT_FDCWD, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2  # linux/fcntl.h, linux/fs.h, sys/stdio.h


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False where that cannot be had."""
    system: Any = ctypes.CDLL(None) if os.name == "posix" else None
    paths = os.fsencode(one), os.fsencode(other)
    if hasattr(system, "renameat2"):  # Linux, since glibc 2.28
        here = ctypes.c_int(_AT_FDCWD)
        return not system.renameat2(here, paths[0], here, paths[1], _RENAME_EXCHANGE)
    if hasattr(system, "renamex_np"):  # macOS
        return not system.renamex_np(*paths, _RENAME_SWAP)
    return False
