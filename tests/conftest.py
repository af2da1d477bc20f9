"""What tests share: a virtual GPU; the built book, and a browser."""

import importlib
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # what not every test needs; the engine's run where the book's is missing
    from playwright.sync_api import Browser
    from xdist.remote import Producer
    from xdist.scheduler import LoadFileScheduling

    from every_byte.gpu import VirtualGPU

ROOT = Path(__file__).parent.parent
PAGES = [
    *(f"book/{source.stem}.html" for source in sorted((ROOT / "book").glob("*.md"))),
    *(f"notebooks/{source.stem}.html" for source in sorted((ROOT / "notebooks").glob("*.ipynb"))),
    "genindex.html",
    "search.html",
    "404.html",
]


def pytest_configure(config: pytest.Config) -> None:
    """The notebooks' kernels share their imports. Ctrl-C ends what tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("nbval", False):
        from tools.kernels import fork_kernels

        fork_kernels()


# Several GB of RAM each: one after the other.
LARGE = ("05_activations_and_peaks", "07_gpt2_large", "08_qwen2")


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(
    config: pytest.Config, log: "Producer"
) -> "LoadFileScheduling | None":
    """Files are spread over the processes, the large notebooks to the same one."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "large" if Path(file).stem in LARGE else file

    return Scheduling(config, log)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for a `page` is run for every page of the book."""
    if "page" in metafunc.fixturenames:
        metafunc.parametrize("page", PAGES)


@pytest.fixture
def gpu() -> "Iterator[VirtualGPU]":
    """A virtual GPU without bounds, open and empty."""
    from every_byte.gpu import VirtualGPU

    with VirtualGPU() as opened:
        yield opened


@pytest.fixture(scope="module")
def extension(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The book's extension that a file of tests names in `EXTENSION`, as Sphinx imports it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "book" / "_ext")
        yield importlib.import_module(request.module.EXTENSION)


@pytest.fixture(scope="session")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The book, built with warnings as errors, of a clone that has no address.

    It is built once: processes that test side by side wait for the first of them.
    """
    from filelock import FileLock

    from tools.book import build

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with FileLock(shared / "book.lock"), pytest.MonkeyPatch.context() as patch:
        built = shared / "book" / "_build" / "html"
        if not built.exists():
            patch.delenv("REPOSITORY", raising=False)
            patch.setattr("tools.repository._origin", lambda root: "")
            build(shared / "book")
        return built


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """A Chromium of this machine; without one its tests are skipped, unless it is required."""
    found = (shutil.which(name) for name in ("chromium", "google-chrome", "chromium-browser"))
    path = next(filter(None, found), None)
    if path is None:
        missing = "no Chromium on this machine: install one, such as Debian's package chromium"
        if os.environ.get("REQUIRE_CHROMIUM"):
            pytest.fail(missing)
        pytest.skip(missing)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        with playwright.chromium.launch(executable_path=path, args=["--no-sandbox"]) as launched:
            yield launched
