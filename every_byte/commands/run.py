"""``every-byte run``: a CUDA script of your own, unchanged, on a virtual card."""

import argparse
import dataclasses
import runpy
import sys
import traceback
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock

from every_byte.commands import DONE, NO, Refused, Subparsers, print_json, subcommand
from every_byte.data import cards

DOES_NOT_FIT, INTERRUPTED = 3, 130


def add(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subcommand(
        subparsers,
        "run",
        run,
        "run a CUDA script on a virtual card, and say what its memory is for",
        "The script runs unchanged, as __main__; it is ended after some optimizer steps. Exits "
        "with the script's status, or with 3 where memory runs out. Arguments of the script "
        "that begin with a dash stand after --.",
    )
    parser.add_argument("script", help="a file, or a module's name with -m")
    parser.add_argument("arguments", nargs="*", help="of the script")
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is a module")
    parser.add_argument("--card", required=True, help='such as "RTX 4090"')
    parser.add_argument("--torch", help='the PyTorch whose rules the card follows, such as "2.11"')
    parser.add_argument(
        "--steps", type=int, default=3, help="optimizer steps to run; 0: to the script's end"
    )
    parser.add_argument(
        "--values",
        choices=("assume", "refuse"),
        default="assume",
        help="where the script reads a value that is not computed: go on, and list it; or stop",
    )
    parser.add_argument("--snapshot", type=Path, help="write what PyTorch's memory viewer reads")
    parser.add_argument("--force", action="store_true", help="replace a file of another kind")
    parse = parser.parse_known_args

    def parse_before_dashes(args: Any = None, namespace: Any = None) -> Any:
        """What stands after -- is the script's, whatever it looks like."""
        args = list(sys.argv[1:] if args is None else args)
        end = args.index("--") if "--" in args else len(args)
        found, unknown = parse(args[:end], namespace)
        found.arguments = [*found.arguments, *args[end + 1 :]]
        return found, unknown

    parser.parse_known_args = parse_before_dashes  # type: ignore[method-assign]


def run(options: argparse.Namespace) -> int:
    """Run the script, and print the report."""
    if options.card not in cards():
        raise Refused(f"--card is {options.card!r}: expected one of {', '.join(cards())}")
    if options.steps < 0:
        raise Refused(f"--steps is {options.steps}: expected 0 or more")
    code = None if options.module else _code(options.script)
    import torch

    from every_byte.files import check_writable
    from every_byte.gpu import is_snapshot
    from every_byte.report import EnoughSteps, Report, Watch
    from every_byte.script import as_cuda
    from every_byte.virtual.values import UnknownValueError

    if options.snapshot:
        try:
            check_writable(options.snapshot, "a memory snapshot", is_snapshot, options.force)
        except OSError as error:
            raise Refused(f"--snapshot: {error}".replace("with force", "with --force")) from None
    status, fits = DONE, True
    with ExitStack() as stack:
        card = as_cuda(options.card, values=options.values, torch_version=options.torch)
        gpu = stack.enter_context(card)
        if options.snapshot:
            gpu.record_memory_history()
        watch = Watch(gpu, options.steps)
        try:
            with watch.watching(), _as_main(options):
                _execute(options, code)
        except EnoughSteps:
            pass
        except KeyboardInterrupt:
            status = INTERRUPTED
        except SystemExit as end:
            status = _status(end.code)
        except torch.OutOfMemoryError as error:
            _show(error)
            status, fits = DOES_NOT_FIT, False
        except UnknownValueError as error:
            raise Refused(str(error)) from None
        except Exception as error:
            _show(error)
            status = NO
        if options.snapshot:
            try:
                gpu.dump_snapshot(options.snapshot, force=options.force)
            except OSError as error:
                raise Refused(f"--snapshot: {error}") from None
        report = Report.of(watch, fits)
    if options.json:
        print_json({**dataclasses.asdict(report), "others": report.others()})
    else:
        print(f"\n{report}")
    return status


def _code(script: str) -> Any:
    """The script, compiled.

    Raises:
        Refused: it cannot be read, or has a syntax error.
    """
    try:
        return compile(Path(script).read_bytes(), script, "exec")
    except OSError as error:
        raise Refused(f"{script}: {error.strerror or error}; expected a Python script") from None
    except SyntaxError as error:
        raise Refused(f"{script}, line {error.lineno}: {error.msg}") from None
    except ValueError as error:
        raise Refused(f"{script} is no Python script: {error}") from None


def _as_main(options: argparse.Namespace) -> ExitStack:
    """The script's own sys.argv and sys.path; with --json its output goes to standard error."""
    stack = ExitStack()
    stack.enter_context(mock.patch.object(sys, "argv", [options.script, *options.arguments]))
    first = str(Path.cwd() if options.module else Path(options.script).resolve().parent)
    stack.enter_context(mock.patch.object(sys, "path", [first, *sys.path]))
    if options.json:
        stack.enter_context(redirect_stdout(sys.stderr))
    return stack


def _execute(options: argparse.Namespace, code: Any) -> None:
    if options.module:
        runpy.run_module(options.script, run_name="__main__", alter_sys=True)
        return
    main = type(sys)("__main__")
    main.__dict__.update(__file__=options.script, __builtins__=__builtins__)
    with mock.patch.dict(sys.modules, {"__main__": main}):
        exec(code, main.__dict__)


def _status(code: Any) -> int:
    if code is None or isinstance(code, int):
        return code or DONE
    print(code, file=sys.stderr)
    return NO


def _show(error: BaseException) -> None:
    """The traceback, from the script's own first line on."""
    entry: TracebackType | None = error.__traceback__
    while entry is not None and entry.tb_frame.f_globals.get("__name__") != "__main__":
        entry = entry.tb_next
    traceback.print_exception(type(error), error, entry or error.__traceback__)
