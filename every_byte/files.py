"""Writing to a path that somebody gave: whole or not at all, and over nothing that is not ours."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

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
