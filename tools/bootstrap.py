"""Make .venv in the project's root and install requirements.lock and the project into it.

    python3 tools/bootstrap.py

.venv/installed records what a finished environment was made from: as long as that is unchanged,
this does nothing. Only a finished environment is updated in place. One that was interrupted, moved
or made by another Python is made afresh, from pip's cache as far as that goes; one that works waits
in .venv.before, and comes back if that fails.

Standard library only, in syntax that every Python since 3.6 can read: whoever runs this with one
that is too old gets a sentence and not a SyntaxError. The slower imports wait until needed.
"""

import argparse
import hashlib
import os
import re
import sys
from pathlib import Path

INPUTS = ("requirements.lock", "requirements.txt", "pyproject.toml")
PYTHON = "Scripts/python.exe" if os.name == "nt" else "bin/python"
# On Linux 6.3 GiB when finished, and until then 3.1 GiB of downloads.
GIB_NEEDED = 10 if sys.platform == "linux" else 3
PROBE = "iniconfig"  # 8 kB, and the same file for every platform


class Stop(Exception):
    """What went wrong and what to do about it, in one line."""


def check_python() -> None:
    if sys.version_info < (3, 11):
        raise Stop(
            "this is Python {}.{}.{}, but 3.11 or newer is needed: install one and name it, for "
            "example make book PYTHON=python3.12".format(*sys.version_info[:3])
        )


def check_venv() -> None:
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        raise Stop(
            "this Python cannot make environments ({}): on Debian and Ubuntu, apt install "
            "python3-venv (or python{}.{}-venv)".format(error, *sys.version_info[:2])
        )


def check_disk(root: Path, works: bool) -> None:
    import shutil

    free = shutil.disk_usage(str(root)).free
    there = 0
    for folder, _, names in os.walk(root / ".venv"):
        there += sum(os.lstat(os.path.join(folder, name)).st_size for name in names)
    if not works:  # will be deleted first
        free += there
    if free < GIB_NEEDED * 2**30:
        enough = works and free + there >= GIB_NEEDED * 2**30
        raise Stop(
            f"{free / 2**30:.1f} GiB of disk are free for .venv in {root}, but {GIB_NEEDED} GiB "
            f"are needed: make room{', or remove .venv itself,' if enough else ''} and run this "
            "again"
        )


def pip(root: Path, *arguments: str, **options):
    import signal
    import subprocess

    if os.name != "nt":
        # A terminal sends Ctrl-C to pip too, whose traceback could then surround the one line of
        # this process. It ends pip anyway.
        options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)
    command = [str(root / ".venv" / PYTHON), "-m", "pip", "--disable-pip-version-check"]
    return subprocess.run([*command, *arguments], check=False, cwd=str(root), **options)


def pip_works(root: Path) -> bool:
    try:
        return pip(root, "--version", capture_output=True).returncode == 0
    except OSError:
        return False


def make_venv(root: Path) -> None:
    import subprocess
    import venv

    try:
        builder = venv.EnvBuilder(clear=True, symlinks=os.name != "nt", with_pip=True)
        builder.create(str(root / ".venv"))
    except (ValueError, subprocess.CalledProcessError) as error:
        raise Stop(f"could not make .venv: {error}")


def put_back(root: Path) -> None:
    """Undo what a run left that was killed between setting .venv aside and its replacement."""
    import shutil

    venv, before = root / ".venv", root / ".venv.before"
    if before.is_dir():
        if (venv / "installed").is_file():
            shutil.rmtree(str(before))
        else:
            shutil.rmtree(str(venv), ignore_errors=True)
            before.rename(venv)


def check_index(root: Path, lock: str) -> None:
    """Download one tiny package: offline, pip would try for long, with pages of warnings."""
    import tempfile

    entry = re.search(rf"^{PROBE}==.*\n(?: +--hash=.*\n)+", lock, re.MULTILINE)
    if not entry:
        raise Stop(f"requirements.lock lacks {PROBE}, which this tries the package index with")
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder, "wanted.txt")
        wanted.write_text(entry.group())
        options = ["--no-input", "--no-deps", "--require-hashes", "--retries=1", "--timeout=15"]
        options += ["--dest", folder, "-r", str(wanted)]
        done = pip(root, "download", *options, capture_output=True, text=True, errors="replace")
    if done.returncode:
        # When it retries, pip names the cause; its last error says only that it found nothing.
        causes = re.findall(r"connection broken by '(.*)':", done.stderr)
        causes = causes or re.findall(r"ERROR: (.*)", done.stderr) or [done.stderr]
        cause = re.sub("<.*?>: ", "", causes[-1])
        raise Stop(
            f"no package index could be reached ({cause}): the first run for a lock needs "
            "the network, later runs do not"
        )


def install(root: Path) -> None:
    import shutil

    # The downloads fill some computers' /tmp, and an interrupted run would leave them there.
    folder = root / ".venv" / "tmp"
    folder.mkdir(exist_ok=True)
    options = {"env": dict(os.environ, TMPDIR=str(folder))}
    quiet = [] if sys.stdout.isatty() else ["--quiet", "--progress-bar=off"]
    for what in ("--require-hashes -r requirements.lock", "--no-deps --no-build-isolation -e ."):
        if pip(root, "install", *quiet, *what.split(), **options).returncode:
            raise Stop(f"pip install {what} failed: mend what it says above, then run this again")
    shutil.rmtree(str(folder))


def bootstrap(root: Path) -> None:
    check_python()
    for name in INPUTS:
        if not (root / name).is_file():
            raise Stop(f"there is no {name} in {root}: is this the whole project?")
    lock = (root / "requirements.lock").read_text(encoding="utf-8")
    digest = hashlib.sha256(lock.encode()).hexdigest()
    # As UTF-8 whatever the locale is: in C a path with an umlaut could not be written down.
    where = os.fsencode(str(root)).decode("utf-8", "backslashreplace")
    maker = "Python {}.{}.{} in {}".format(*sys.version_info[:3], where)
    put_back(root)
    stamp = root / ".venv" / "installed"
    found = stamp.read_text(encoding="utf-8").splitlines() if stamp.is_file() else []
    if found == [digest, maker] and (root / ".venv" / PYTHON).exists():
        return

    import shutil

    check_venv()
    works = pip_works(root)
    keep = works and found[1:] == [maker]
    if not keep:
        check_disk(root, works)
    # What works is not given up before the index is known to answer.
    if not works:
        stamp.unlink(missing_ok=True)
        make_venv(root)
    try:
        check_index(root, lock)
    except Stop:
        if not works:
            shutil.rmtree(str(root / ".venv"))
        raise
    if keep:
        stamp.unlink(missing_ok=True)
    elif works:
        (root / ".venv").rename(root / ".venv.before")
    try:
        if works and not keep:
            make_venv(root)
        fill(root, lock, keep)
        unnamed = stamp.with_suffix(".new")
        unnamed.write_text(f"{digest}\n{maker}\n", encoding="utf-8")
        unnamed.replace(stamp)
    finally:
        put_back(root)


def fill(root: Path, lock: str, keep: bool) -> None:
    count = len(re.findall(r"^[\w.-]+==", lock, re.MULTILINE))
    size = "about 6 GB with the CUDA libraries; " if sys.platform == "linux" else ""
    if keep:
        print("Updating .venv to what requirements.lock says now ...", flush=True)
    else:
        print(
            f"Installing up to {count} packages into .venv ({size}once for this lock) ...",
            flush=True,
        )
    install(root)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    above = Path(__file__).resolve().parent.parent
    parser.add_argument("--root", type=Path, default=above, help="default: %(default)s")
    try:
        bootstrap(parser.parse_args().root.resolve())
    except KeyboardInterrupt:
        if sys.stdout.isatty():
            print("\033[?25h", end="")  # the cursor, which pip's progress bar had hidden
        print("bootstrap: interrupted; run it again to go on", file=sys.stderr)
        return 130
    except (Stop, OSError) as error:
        print("bootstrap: " + " ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
