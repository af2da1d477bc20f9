"""Make and execute the notebooks: from NN_name.py, which people edit, NN_name.ipynb.

One way only. A notebook that is fresh, by the hashes that its execution left in
it, is not executed again. Where only its text or its cells' tags changed, these are
carried over and the outputs stay.
"""

import argparse
import ast
import hashlib
import itertools
import json
import os
import platform
import re
import socket
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from tools.repository import ROOT, address

STAMP = "every_byte"  # our key in a notebook's metadata
PLACEHOLDER = 'REPOSITORY = ""'  # in the set-up cell; filled in with the book's address
SETUP = re.compile(r"^# set-up(?: with (.*))?$", re.MULTILINE)  # becomes tools/setup_cell.py
PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "bitsandbytes", "matplotlib")


def sources(folder: Path) -> list[Path]:
    """The percent sources of the notebooks in a folder, in order."""
    return sorted(folder.glob("[0-9][0-9]_*.py"))


def digest(paths: Iterable[Path]) -> str:
    """SHA-256 over the contents of files, in order of their names."""
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(path.read_bytes())
    return total.hexdigest()


def helpers_of(source: Path) -> set[Path]:
    """The project's files that a Python file imports, directly or by way of another."""
    found: set[Path] = set()
    left = [source]
    while left:
        for name in _imported(left.pop()):
            module = ROOT.joinpath(*name.split("."))
            for path in (module.with_suffix(".py"), module / "__init__.py"):
                if path.is_file() and path not in found:
                    found.add(path)
                    left.append(path)
    return found


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def stamp(source: Path, repository: str | None) -> dict[str, Any]:
    """What an execution leaves in the notebook that does not depend on the machine."""
    return {
        "source_sha256": digest([source]),
        "helpers_sha256": digest(helpers_of(source)),
        "repository": repository,
    }


def made(source: Path, repository: str | None) -> NotebookNode:
    """The notebook that a percent source stands for, not executed."""
    text = SETUP.sub(_setup_cell, source.read_text("utf-8"))
    if repository:
        text = text.replace(PLACEHOLDER, f"REPOSITORY = {json.dumps(repository)}")
    notebook = jupytext.reads(text, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{source.stem.replace('_', '-')}-{number:02}"
        cell.metadata.pop("lines_to_next_cell", None)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python", "pygments_lexer": "ipython3"},
    )
    return notebook


def _setup_cell(marker: re.Match[str]) -> str:
    """The beginning of the set-up cell, with the packages that its marker asks for."""
    cell = Path(__file__).with_name("setup_cell.py").read_text("utf-8").split('"""\n\n', 1)[1]
    more = ", ".join(f'"{name}"' for name in (marker[1] or "").split())
    joined = f'"tabulate", {more}]' if more else '"tabulate"]'
    if more.count(",") > 0:  # a line of code fits the page
        joined = f'"tabulate"]\nPACKAGES += [{more}]'
    return cell.replace('"tabulate"]', joined).rstrip("\n")


def carried(source: Path, notebook: NotebookNode) -> NotebookNode | None:
    """An executed notebook with its source's text and tags of today, and its own outputs.

    Outputs belong to the code that made them, so that must be the same, cell by cell and
    in the same order. What the helpers were then stays as the execution left it.

    Returns:
        None if it needs an execution: the code changed, or the notebook is not whole.
    """
    left = notebook.metadata.get(STAMP, {})
    new = made(source, left.get("repository"))
    old, code = ([c for c in n.cells if c.cell_type == "code"] for n in (notebook, new))
    if not old or [cell.source for cell in old] != [cell.source for cell in code]:
        return None
    for before, cell in zip(old, code, strict=True):
        cell.outputs, cell.execution_count = before.outputs, before.execution_count
    new.metadata[STAMP] = left | {"source_sha256": digest([source])}
    return None if problems(source, new) else new


def problems(source: Path, notebook: NotebookNode) -> list[str]:
    """Why a notebook is not what its source would give today; nothing if it is."""
    left = notebook.metadata.get(STAMP, {})
    expected = made(source, left.get("repository"))
    found = []
    if left.get("source_sha256") != digest([source]):
        found.append("it was not executed since its source changed")
    if [_essence(c) for c in notebook.cells] != [_essence(c) for c in expected.cells]:
        found.append("its cells are not those of its source")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in code]
    if counts != list(range(1, len(code) + 1)):
        found.append(f"its cells were not executed in order: {counts}")
    outputs = [output for cell in code for output in cell.outputs]
    if not outputs:
        found.append("it has no outputs")
    if any(output.output_type == "error" for output in outputs):
        found.append("a cell ended in an error")
    if any(output.get("name") == "stderr" for output in outputs):
        found.append("a cell wrote to stderr")
    if not found and left.get("outputs_sha256") != outputs_digest(notebook):
        found.append("an output is not what its execution wrote")
    return found


def outputs_digest(notebook: NotebookNode) -> str:
    """SHA-256 over the outputs of all cells.

    Where a machine's noise forbids that nbval compares a cell, this says that what is stored is
    what an execution printed whose assertions held.
    """
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(outputs, sort_keys=True).encode()).hexdigest()


def _essence(cell: NotebookNode) -> tuple[str, str, str, dict[str, Any]]:
    return cell.id, cell.cell_type, cell.source, dict(cell.metadata)


def execute(source: Path, repository: str | None) -> NotebookNode:
    """Make a notebook and run it in a kernel of this environment, beside its source.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = made(source, repository)
    cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    number = itertools.count(1)

    def progress(**_: object) -> None:
        end = "\r" if sys.stdout.isatty() else "\n"
        print(f"{source.stem}: cell {next(number)} of {cells}", end=end, flush=True)

    client = NotebookClient(
        notebook,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        timeout=1800,
        resources={"metadata": {"path": str(source.parent)}},
        extra_arguments=["--log-level=ERROR"],  # no warning of local, unencrypted transport
        on_cell_execute=progress,
    )
    client.execute()
    notebook.metadata.pop("widgets", None)
    notebook.metadata.language_info = made(source, None).metadata.language_info
    notebook.metadata[STAMP] = stamp(source, repository) | {
        "outputs_sha256": outputs_digest(notebook),
        "device": _device(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
    }
    return notebook


def check_loopback() -> None:
    """A kernel is talked to by way of 127.0.0.1: see that this works, before it fails wordless.

    Raises:
        OSError: it does not.
    """
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=10).close()
    except OSError as error:
        raise OSError(
            f"127.0.0.1 cannot be used ({error.strerror or error}): a notebook's kernel needs "
            "this machine's loopback device, such as after `ip link set lo up`"
        ) from None


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}"
    return "virtual GPU"


def _write(path: Path, notebook: NotebookNode) -> None:
    """Write beside, then move into place: an interruption leaves the old file."""
    beside = path.with_suffix(".ipynb.new")
    nbformat.validate(notebook)
    try:
        beside.write_text(nbformat.writes(notebook) + "\n", "utf-8")
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="make notebooks", description=__doc__)
    parser.add_argument(
        "name", nargs="?", help="one notebook, such as 04_mlp_adam_vs_sgd; else all"
    )
    parser.add_argument("--force", action="store_true", help="execute fresh notebooks too")
    parser.add_argument(
        "--text",
        action="store_true",
        help="execute nothing: only carry text and tags over, also where a helper changed",
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "notebooks", help="where they are")
    options = parser.parse_args(arguments)

    chosen = sources(options.folder)
    if not chosen:
        print(f"--folder {options.folder} holds no NN_name.py: name another", file=sys.stderr)
        return 2
    if options.name:
        stem = Path(options.name).stem
        chosen = [source for source in chosen if source.stem == stem]
        if not chosen:
            known = ", ".join(source.stem for source in sources(options.folder))
            print(f"NB is {options.name!r}: expected one of {known}", file=sys.stderr)
            return 2
    try:
        repository = address()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for source in chosen:
        target = source.with_suffix(".ipynb")
        if not options.force and _is_fresh(source, target, repository):
            print(f"{source.stem}: fresh")
            continue
        text = None if options.force else _carried(source, target)
        if text and (
            options.text or stamp(source, repository).items() <= text.metadata[STAMP].items()
        ):
            try:
                _write(target, text)
            except OSError as error:
                print(_unwritten(target, error), file=sys.stderr)
                return 1
            print(f"{source.stem}: text and tags carried, outputs as they were")
            continue
        if options.text:
            print(
                f"{source.stem}: its code changed, so --text leaves it as it was", file=sys.stderr
            )
            return 1
        if not os.access(target.parent, os.W_OK):  # asked before an execution, not after it
            print(f"{target.parent} cannot be written: nothing was executed", file=sys.stderr)
            return 1
        try:
            check_loopback()
            notebook = execute(source, repository)
        except OSError as error:
            print(f"{source.name} was not executed: {error}", file=sys.stderr)
            return 1
        except CellExecutionError as error:
            print(
                f"\n{source.name}: a cell failed; {target.name} is as it was.\n{error}",
                file=sys.stderr,
            )
            return 1
        try:
            _write(target, notebook)
        except OSError as error:
            print(_unwritten(target, error), file=sys.stderr)
            return 1
        print(f"{source.stem}: made")
    return 0


def _unwritten(target: Path, error: OSError) -> str:
    return f"\n{target} cannot be written ({error.strerror}): it is as it was"


def _read(target: Path) -> NotebookNode | None:
    try:
        return nbformat.read(target, as_version=4)
    except (FileNotFoundError, nbformat.reader.NotJSONError):
        return None


def _is_fresh(source: Path, target: Path, repository: str | None) -> bool:
    notebook = _read(target)
    if notebook is None or problems(source, notebook):
        return False
    return stamp(source, repository).items() <= notebook.metadata[STAMP].items()


def _carried(source: Path, target: Path) -> NotebookNode | None:
    notebook = _read(target)
    return carried(source, notebook) if notebook else None


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted: notebooks not finished are as they were", file=sys.stderr)
        sys.exit(130)
