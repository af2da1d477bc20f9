"""``every-byte run``: a CUDA script of your own, unchanged, on a virtual card."""

import argparse
import dataclasses
import importlib.util
import os
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any
from unittest import mock

from every_byte.commands import DONE, NO, Refused, Subparsers, print_json, subcommand
from every_byte.data import cards

if TYPE_CHECKING:
    from every_byte.watch import Watch

DOES_NOT_FIT, INTERRUPTED = 3, 130
UNBOUNDED = 2**50  # bytes
LAUNCHERS = (
    *("torchrun", "accelerate", "deepspeed", "torch.distributed.run", "torch.distributed.launch"),
    *("accelerate.commands.launch", "deepspeed.launcher.runner"),
)


def add(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subcommand(
        subparsers,
        "run",
        run,
        "run a CUDA script on a virtual card, and say what its memory is for",
        "The script runs unchanged, as __main__; it is ended after some optimizer steps. Ctrl-C "
        "ends it with a report of what it did until then. Exits with the script's status, or "
        "with 3 where memory runs out, 2 where it put nothing on the card. Arguments of the "
        "script that begin with a dash stand after --. The script is really run, with your rights "
        "and no sandbox: what it writes, deletes or sends, it does; run no script that you would "
        "not run with python.",
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
        "--gpus",
        type=int,
        default=1,
        help="be rank 0 of as many, as for scripts that torchrun or accelerate launch starts",
    )
    parser.add_argument(
        "--values",
        choices=("assume", "refuse"),
        default="assume",
        help="where the script reads a value that is not computed: go on, and list it; or stop",
    )
    parser.add_argument(
        "--levers",
        action="store_true",
        help="run the script again with one thing changed each time, and say what each saves",
    )
    parser.add_argument(
        "--lever",
        action="append",
        default=[],
        metavar="NAME",
        help="run it with this change, one of those that --levers names; may be repeated",
    )
    parser.add_argument(
        "--report", type=Path, help="write the report and its timeline as one HTML file"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="let --report and --snapshot replace a file of another kind",
    )
    parser.add_argument("--snapshot", type=Path, help="write what PyTorch's memory viewer reads")
    parser.add_argument("--unbounded", action="store_true", help=argparse.SUPPRESS)
    parse = parser.parse_known_args

    def parse_before_dashes(args: Any = None, namespace: Any = None) -> Any:
        """What stands after -- is the script's, whatever it looks like."""
        args = list(sys.argv[1:] if args is None else args)
        end = args.index("--") if "--" in args else len(args)
        found, unknown = parse(args[:end], namespace)
        found.arguments = [*found.arguments, *args[end + 1 :]]
        found.unknown = unknown
        return found, []

    parser.parse_known_args = parse_before_dashes  # type: ignore[method-assign]


def run(options: argparse.Namespace) -> int:
    """Run the script, and print the report."""
    if options.card not in cards():
        raise Refused(f"--card is {options.card!r}: expected one of {', '.join(cards())}")
    for name, least in (("steps", 0), ("gpus", 1)):
        if getattr(options, name) < least:
            raise Refused(f"--{name} is {getattr(options, name)}: expected {least} or more")
    if options.unknown:
        raise Refused(
            f"{options.unknown[0]} is no option of every-byte run: arguments of the script that "
            f"begin with a dash stand after --, as in train.py --card T4 -- {options.unknown[0]}"
        )
    if options.script in LAUNCHERS:
        raise Refused(
            f"{options.script} starts processes of its own, which have no virtual card: name the "
            "script itself, and with --gpus how many they are"
        )
    code = None if options.module else _code(options.script)
    import torch

    from every_byte import levers, page, ranks
    from every_byte.commands.extensions import is_refused, needs_a_gpu
    from every_byte.files import check_writable
    from every_byte.gpu import is_snapshot
    from every_byte.report import Report
    from every_byte.script import as_cuda, unknown_number
    from every_byte.virtual.values import UnknownValueError
    from every_byte.watch import EnoughSteps, Watch

    for name in options.lever:
        if name not in levers.LEVERS:
            raise Refused(f"--lever is {name!r}: expected one of {', '.join(levers.LEVERS)}")
    if options.report is not None:
        try:
            page.check(options.report, options.force)
        except OSError as error:
            raise Refused(f"--report: {error}".replace("with force", "with --force")) from None

    if options.snapshot:
        try:
            check_writable(options.snapshot, "a memory snapshot", is_snapshot, options.force)
        except OSError as error:
            raise Refused(f"--snapshot: {error}".replace("with force", "with --force")) from None

    where, environment = Path.cwd(), dict(os.environ)
    status, fits, failed = DONE, True, False
    with ExitStack() as stack:
        card = as_cuda(
            options.card,
            UNBOUNDED if options.unbounded else None,
            values=options.values,
            torch_version=options.torch,
            alloc_conf=_alloc_conf(levers.LEVERS[name].alloc_conf for name in options.lever),
        )
        gpu = stack.enter_context(card)
        if options.snapshot:
            gpu.record_memory_history()
        watch = Watch(gpu, options.steps, say=_say)
        try:
            with (
                _interruptible(watch),
                watch.watching(),
                ranks.first_of(options.gpus),
                levers.noticing() as noticed,
                levers.applied(options.lever),
                _as_main(options),
            ):
                _execute(options, code, watch)
        except EnoughSteps:
            pass
        except KeyboardInterrupt:
            status = INTERRUPTED
        except SystemExit as end:
            status = _status(end.code)
            failed = status != DONE
        except torch.OutOfMemoryError as error:
            _show(error)
            status, fits = DOES_NOT_FIT, False
        except UnknownValueError as error:
            raise Refused(str(error)) from None
        except Refused:
            raise
        except Exception as error:
            status, failed = NO, True
            line = needs_a_gpu(error) or is_refused(error) or unknown_number(error, gpu)
            if line is not None:
                print(f"every-byte run: {line}", file=sys.stderr)
            else:
                _show(error)
        if options.snapshot:
            try:
                gpu.dump_snapshot(where / options.snapshot, force=options.force)
            except OSError as error:
                raise Refused(f"--snapshot: {error}") from None
        report = Report.of(
            watch, fits, interrupted=status == INTERRUPTED, failed=failed, gpus=options.gpus
        )
    if fits and not report.peak:
        line = f"{options.script} put nothing on the card"
        if status == INTERRUPTED:
            _say(f"every-byte run: {line} until it was interrupted")
        if status != DONE:
            return status  # an error has been shown
        others = "".join(f"; {text}" for text in report.estimates)  # such as another process
        raise Refused(f'{line}, so there is nothing to judge: it made no tensor on "cuda"{others}')
    if options.levers and not (failed or report.interrupted):
        report = levers.try_levers(
            report, noticed, lambda more: _again(options, more), where, environment, _say
        )
    if options.json:
        print_json({**dataclasses.asdict(report), "others": report.others()})
    else:
        print(f"\n{report}")
    if options.report is not None:
        name = options.script if options.module else Path(options.script).name
        try:
            page.write(where / options.report, report, watch.timeline, name, options.force)
        except OSError as error:
            raise Refused(f"--report: {error}") from None
    return status


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _alloc_conf(more: Iterator[str]) -> str:
    """The allocator's settings: the environment's, as PyTorch reads them, and some more."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    set_ = next((os.environ[name] for name in names if os.environ.get(name)), "")
    return ",".join(filter(None, [set_, *more]))


def _again(options: argparse.Namespace, more: list[str]) -> list[str]:
    """The arguments of every-byte that run the same script, with some more."""
    own = ["run", options.script, "--card", options.card, "--steps", str(options.steps)]
    own += ["--values", options.values, "--gpus", str(options.gpus)]
    own += ["-m"] if options.module else []
    own += ["--torch", options.torch] if options.torch else []
    own += [part for name in options.lever for part in ("--lever", name)]
    return [*own, *more, "--", *options.arguments]


def _code(script: str) -> Any:
    """The script, compiled.

    Raises:
        Refused: it cannot be read, or has a syntax error.
    """
    try:
        return compile(Path(script).read_bytes(), os.path.abspath(script), "exec")
    except OSError as error:
        raise Refused(f"{script}: {error.strerror or error}; expected a Python script") from None
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""
        raise Refused(f"{script}{line}: {error.msg}") from None
    except ValueError as error:
        raise Refused(f"{script} is no Python script: {error}") from None


@contextmanager
def _interruptible(watch: "Watch") -> Iterator[None]:
    """Let Ctrl-C end the script, wherever it is, and not what is done afterwards.

    Python drops a KeyboardInterrupt in a finalizer; then the next allocation raises it.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    tell = sys.unraisablehook

    def dropped(what: Any) -> None:
        if issubclass(what.exc_type, KeyboardInterrupt):
            watch.interrupted = True
        else:
            tell(what)

    with mock.patch.object(sys, "unraisablehook", dropped):
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _as_main(options: argparse.Namespace) -> ExitStack:
    """The script's own sys.argv and sys.path; with --json its output goes to standard error."""
    stack = ExitStack()
    stack.enter_context(mock.patch.object(sys, "argv", [options.script, *options.arguments]))
    first = str(Path.cwd() if options.module else Path(options.script).resolve().parent)
    stack.enter_context(mock.patch.object(sys, "path", [first, *sys.path]))
    if options.json:
        stack.enter_context(redirect_stdout(sys.stderr))
    return stack


def _execute(options: argparse.Namespace, code: Any, watch: "Watch") -> None:
    """Run the script to its end; then nothing more of it can be interrupted."""
    try:
        if options.module:
            _execute_module(options.script)
        else:
            main = type(sys)("__main__")
            main.__dict__.update(
                __file__=os.path.abspath(options.script), __builtins__=__builtins__
            )
            with _module_of_main(main):
                exec(code, main.__dict__)
                watch.look_for_leaks()
    finally:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler and (
            threading.current_thread() is threading.main_thread()
        ):
            signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _module_of_main(main: ModuleType) -> Iterator[None]:
    """Let it be ``__main__``. What is imported meanwhile stays imported, once."""
    before = sys.modules["__main__"]
    sys.modules["__main__"] = main
    try:
        yield
    finally:
        sys.modules["__main__"] = before


def _execute_module(name: str) -> None:
    """As ``python -m``.

    Raises:
        Refused: there is no such module.
    """
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError) as error:
        raise Refused(f"-m {name}: {error}") from None
    if spec is None:
        raise Refused(f"-m {name}: there is no such module on Python's path")
    runpy.run_module(name, run_name="__main__", alter_sys=True)


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
