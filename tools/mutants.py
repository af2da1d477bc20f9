"""Change the engine's core in one place at a time: which change does no test notice?

cosmic-ray finds the places and makes the changes. Of each part's places a sample with a fixed
seed is changed, one change in each, in a copy of the project. A change is shown to the tests
that run its line, the quickest first: in a process forked from one that has PyTorch already, so
that each takes seconds. Needs POSIX's fork. See tests/mutants.md.
"""

import argparse
import ast
import difflib
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from tools.repository import ROOT

FORK = multiprocessing.get_context("fork")
COPY = ROOT / "mutants"
TESTED = COPY / "tested.json"  # of each test its seconds and lines of code; the modules imported
SAID = COPY / "said.txt"  # by the last run of pytest

# The parts, each with the tests that stand for it.
PARTS = {
    "allocator": ("every_byte/allocator", ["allocator", "placement", "replay", "edges"]),
    "estimate": (
        "every_byte/estimate",
        ["kept_estimates", "estimate", "fit", "serving", "catalogue", "edges"],
    ),
    "tracker": ("every_byte/tracker.py", ["tracker", "gpu", "edges", "in_place", "cuda_kernels"]),
    "kernels": (
        "every_byte/virtual/kernels",
        ["kernels", "cuda_kernels", "measured", "quantised", "unwatched"],
    ),
}
LONGEST = 2.0  # seconds of the processor for a test that is asked
PATIENCE = 20.0  # seconds for all tests of a change; beyond it those that take longest are left
# What is the same program wherever small integers, None and the like are compared.
SAME = ("_Eq_Is", "_NotEq_IsNot", "_Is_Eq", "_IsNot_NotEq")
# Whose modules the forked processes find imported.
SHARED = {
    *("pytest", "_pytest", "hypothesis", "nbval", "nbformat", "filelock", "sortedcontainers"),
    *("torch", "numpy", "transformers", "tokenizers", "safetensors", "huggingface_hub"),
}


class Change(NamedTuple):
    """One change in one place: the file in the copy, its text with the change, the line."""

    file: str
    line: int
    text: str
    lines: str


class Asked:
    """A plugin of pytest: what each test took, and which lines it ran."""

    def __init__(self, coverage: Any) -> None:
        self.coverage = coverage
        self.seconds: dict[str, float] = {}
        self.since = 0.0

    def pytest_runtest_setup(self, item: Any) -> None:
        """The lines that follow are this test's."""
        self.coverage.switch_context(item.nodeid)
        self.seconds[item.nodeid], self.since = 0.0, time.process_time()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test that fails or is skipped says nothing."""
        took = time.process_time() - self.since
        self.seconds[report.nodeid] += took if report.passed else float("inf")
        self.since += took


class Chosen:
    """A plugin of pytest: these tests alone, in this order."""

    def __init__(self, names: list[str]) -> None:
        self.at = {name: at for at, name in enumerate(names)}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Drop what was not chosen."""
        items[:] = sorted((i for i in items if i.nodeid in self.at), key=self._place)

    def _place(self, item: Any) -> int:
        return self.at[item.nodeid]


def _pytest(arguments: list[str], plugin: object) -> int:
    import pytest

    options = ["-q", "--tb=no", "-p", "no:xdist"]
    with SAID.open("w") as said, redirect_stdout(said), redirect_stderr(said):
        return int(pytest.main([*options, *arguments], plugins=[plugin]))


def _look(source: str, files: list[str]) -> None:
    """Run the tests as they are, and write what each took, ran and imported."""
    import coverage

    sys.dont_write_bytecode = False  # so that those that follow are quick
    measured = coverage.Coverage(
        data_file=None, include=[f"{COPY}/{source}", f"{COPY}/{source}/**"]
    )
    measured.start()
    asked = Asked(measured)
    status = _pytest(files, asked)
    if status > 1:  # more than a test that failed
        sys.exit(status)
    measured.stop()
    data = measured.get_data()
    lines: dict[str, dict[str, list[int]]] = defaultdict(dict)
    for path in data.measured_files():
        for line, contexts in data.contexts_by_lineno(path).items():
            for test in filter(None, contexts):
                lines[test].setdefault(str(Path(path).relative_to(COPY)), []).append(line)
    tests = {n: (s, lines[n]) for n, s in asked.seconds.items() if s <= LONGEST and n in lines}
    shared = [name for name in sys.modules if name.partition(".")[0] in SHARED]
    TESTED.write_text(json.dumps([tests, shared]), "utf-8")


def _ask(tests: list[str]) -> None:
    """Run the tests with the change; the exit status is pytest's."""
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
    os._exit(_pytest(["-x", *files], Chosen(tests)))


def _forked(target: Callable[..., None], *arguments: object, seconds: float) -> int | None:
    """The exit status of a process; None if it took too long and was ended."""
    process = FORK.Process(target=target, args=arguments)
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    return process.exitcode


def _statement(tree: ast.Module, line: int) -> range | None:
    """The lines of a line's statement, or of its head; None where it is run by the import."""
    inside, lines = False, range(0)
    for node in ast.walk(tree):  # from the outside in
        if not isinstance(node, ast.stmt):
            continue
        assert node.end_lineno is not None
        body = getattr(node, "body", None)
        end = body[0].lineno if body else node.end_lineno + 1
        if isinstance(node, ast.FunctionDef):
            inside |= end <= line <= node.end_lineno
        elif node.lineno <= line < max(end, node.lineno + 1):
            lines = range(node.lineno, max(end, node.lineno + 1))
    return lines if inside and lines else None


def _annotations(tree: ast.Module) -> set[tuple[int, int]]:
    """Where the parts of annotations begin: they are not run."""
    found: set[tuple[int, int]] = set()
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            if (annotation := getattr(node, name, None)) is not None:
                for part in ast.walk(annotation):
                    if isinstance(part, ast.expr):
                        found.add((part.lineno, part.col_offset))
                        if isinstance(part, ast.BinOp):  # cosmic-ray's place of the operator
                            assert part.left.end_col_offset is not None
                            found.add((part.left.end_lineno or 0, part.left.end_col_offset + 1))
    return found


def changes(source: str, count: int, seed: int) -> Iterator[Change]:
    """One change in each of `count` places of a part, of all its places if there are fewer."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    operators = {
        name: get_operator(name)()
        for name in operator_names()
        if not name.endswith(SAME) and not get_operator(name).arguments()
    }
    places: dict[tuple[str, tuple[int, int]], list[tuple[str, int]]] = defaultdict(list)
    start = COPY / source
    for path in sorted(start.rglob("*.py")) if start.is_dir() else [start]:
        text = path.read_text("utf-8")
        unrun = _annotations(ast.parse(text))
        nodes = list(ast_nodes(get_ast(text)))
        for name, operator in operators.items():
            found = (place for node in nodes for place, _ in operator.mutation_positions(node))
            for occurrence, place in enumerate(found):
                if place not in unrun:
                    key = str(path.relative_to(COPY)), place
                    places[key].append((name, occurrence))
    chance = random.Random(seed)
    order = sorted(places)
    chance.shuffle(order)
    print(f"{source}: {len(order):,} places, {sum(map(len, places.values())):,} changes")
    for file, place in order[:count]:
        name, occurrence = chance.choice(places[file, place])
        before = (COPY / file).read_text("utf-8")
        after = mutate_code(before, operators[name], occurrence)
        try:
            compile(after, file, "exec")
        except SyntaxError:  # nothing that a test is needed for
            continue
        parts = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
        yield Change(file, place[0], after, "\n".join(list(parts)[3:]))


def _tests(change: Change, tested: dict[str, tuple[float, dict[str, list[int]]]]) -> list[str]:
    """The tests that run the changed statement, the quickest first."""
    lines = _statement(ast.parse((COPY / change.file).read_text("utf-8")), change.line)
    chosen = {
        name: seconds
        for name, (seconds, files) in tested.items()
        if (ran := files.get(change.file)) and (lines is None or not set(lines).isdisjoint(ran))
    }
    names, total = [], 0.0
    for name in sorted(chosen, key=lambda name: chosen[name]):
        total += chosen[name]
        if total > PATIENCE:
            break
        names.append(name)
    return names


def run(part: str, count: int, seed: int) -> Counter[str]:
    """Try a sample of a part's changes, and print those that no test notices."""
    source, names = PARTS[part]
    files = [f"tests/test_{name}.py" for name in names]
    if _forked(_look, source, files, seconds=1800) != 0:
        raise SystemExit(f"{part}: the tests cannot be run: see {SAID}")
    tested, shared = json.loads(TESTED.read_text("utf-8"))
    for name in shared:
        try:
            import_module(name)
        except ImportError:  # made while it ran
            pass
    if _forked(_ask, sorted(tested, key=lambda name: tested[name][0]), seconds=1800) != 0:
        raise SystemExit(f"{part}: a test fails without a change: see {SAID}")
    became: Counter[str] = Counter()
    for change in changes(source, count, seed):
        tests = _tests(change, tested)
        fate = _fate(change, tests) if tests else "not run"
        became[fate] += 1
        if fate != "killed":
            where = f"{change.file}:{change.line}"
            print(f"{fate}, {len(tests)} tests: {where}\n{change.lines}", flush=True)
        print(f"{part}: {became.total()} of {count}", end="\r", file=sys.stderr, flush=True)
    print(f"{part}: {became.total()} tried: {dict(became)}", flush=True)
    return became


def _fate(change: Change, tests: list[str]) -> str:
    path = COPY / change.file
    before = path.read_text("utf-8")
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
        compiled.unlink()  # it may be as old, and of a source as long
    path.write_text(change.text, "utf-8")
    try:
        status = _forked(_ask, tests, seconds=30 + 5 * PATIENCE)
    finally:
        path.write_text(before, "utf-8")
    return "survived" if status == 0 else "killed"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; else all")
    parser.add_argument("--count", type=int, default=150, help="places of each part")
    parser.add_argument("--seed", type=int, default=20)
    chosen = parser.parse_args(arguments)
    unknown = [part for part in chosen.parts if part not in PARTS]
    if unknown:
        parser.error(f"{unknown[0]!r} is unknown: expected {', '.join(PARTS)}")
    shutil.rmtree(COPY, ignore_errors=True)
    # Of the settings of biome it takes one file alone, in the project itself.
    left = shutil.ignore_patterns(
        *(".*", "mutants", "_build", "*.ipynb", "__pycache__", "biome.json")
    )
    shutil.copytree(ROOT, COPY, ignore=left)
    os.chdir(COPY)
    sys.path.insert(0, str(COPY))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(COPY), os.environ.get("PYTHONPATH", "")])
    became = sum(
        (run(part, chosen.count, chosen.seed) for part in chosen.parts or PARTS), Counter()
    )
    print(f"killed {became['killed'] / max(became.total(), 1):.1%} of {became.total()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
