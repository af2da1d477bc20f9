"""For pytest: a memory budget that is kept without a GPU, by the fixture ``virtual_gpu``.

It is loaded with pytest wherever this package is installed, and imports PyTorch only for tests
that ask for the fixture. A test's card is named by ``@pytest.mark.virtual_gpu("RTX 4090")``, or
for all tests by ``virtual_gpu_card`` in pytest's configuration; else it is an RTX 4090.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from every_byte.units import grouped

if TYPE_CHECKING:
    from every_byte.gpu import VirtualGPU
    from every_byte.watch import Watch

DEFAULT = "RTX 4090"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Know the option of pytest's configuration."""
    parser.addini("virtual_gpu_card", "the card of the fixture virtual_gpu", default=DEFAULT)


def pytest_configure(config: pytest.Config) -> None:
    """Know the marker."""
    config.addinivalue_line(
        "markers",
        "virtual_gpu(card, **options): the card of the fixture virtual_gpu; options are those of "
        "every_byte.as_cuda, such as torch_version",
    )


class VirtualGPUUnderTest:
    """What the fixture ``virtual_gpu`` gives: "cuda" is a virtual card while the test runs.

    Attributes:
        gpu: the card, with ``torch.cuda``'s names.
    """

    def __init__(self, gpu: "VirtualGPU", watch: "Watch") -> None:
        self.gpu = gpu
        self._watch = watch

    def max_memory_allocated(self) -> int:
        """Peak since the test began, in bytes."""
        return self._watch.peak

    def assert_max_memory_allocated(self, below: int) -> None:
        """Keep a budget: the peak since the test began is below so many bytes.

        Raises:
            AssertionError: it is not; the message has the line and the phase at the peak. Or
                nothing was put on the card, so that there is no peak.
            TypeError: `below` is no whole number.
        """
        __tracebackhide__ = True
        if type(below) is not int:
            raise TypeError(f"below is {below!r}: expected bytes, as an int")
        watch = self._watch
        if not watch.peak:
            raise AssertionError(
                f"the test put nothing on the {self.gpu.memory.name}: expected tensors on "
                '"cuda", made in this process'
            )
        if watch.peak >= below:
            raise AssertionError(
                f"the peak is {grouped(watch.peak)} B, {watch.place.phase} at {watch.place} "
                f"({watch.place.source}): expected below {grouped(below)} B on the "
                f"{self.gpu.memory.name}"
            )


@pytest.fixture
def virtual_gpu(request: pytest.FixtureRequest) -> Iterator[VirtualGPUUnderTest]:
    """A virtual card in the place of "cuda", for the test of a memory budget.

    Raises:
        pytest.UsageError: the marker names no card, or options that there are not.
    """
    from every_byte.script import as_cuda
    from every_byte.watch import Watch

    marker = request.node.get_closest_marker("virtual_gpu")
    card = request.config.getini("virtual_gpu_card")
    options: dict[str, Any] = {}
    if marker is not None:
        (card,) = marker.args or (card,)
        options = marker.kwargs
    try:
        opened = as_cuda(card, **options)
        gpu = opened.__enter__()
    except (TypeError, ValueError) as error:
        raise pytest.UsageError(f"virtual_gpu: {error}") from None
    try:
        watch = Watch(gpu, steps=0)
        with watch.watching():
            yield VirtualGPUUnderTest(gpu, watch)
    finally:
        opened.__exit__(None, None, None)
