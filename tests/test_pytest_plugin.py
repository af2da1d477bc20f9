"""The fixture virtual_gpu: a memory budget in a user's own tests, without a GPU."""

import importlib

import pytest

pytest_plugins = ["pytester"]

TESTS = """
import pytest
import torch

def train(width):
    model = torch.nn.Linear(width, width).cuda()
    model(torch.zeros(8, width, device="cuda")).sum().backward()

def test_within(virtual_gpu):
    train(100)
    virtual_gpu.assert_max_memory_allocated(below=10**8)
    assert torch.cuda.get_device_name() == "T4"
    assert torch.cuda.max_memory_allocated() == virtual_gpu.max_memory_allocated()

def test_above(virtual_gpu):
    train(1000)
    virtual_gpu.assert_max_memory_allocated(below=10**6)

@pytest.mark.virtual_gpu("RTX 4090", capacity=2**30)
def test_marked(virtual_gpu):
    assert torch.cuda.get_device_name() == "RTX 4090"
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(2**28, device="cuda")

def test_elsewhere(virtual_gpu):
    torch.zeros(2**20)
    virtual_gpu.assert_max_memory_allocated(below=10**6)

@pytest.mark.virtual_gpu("RTX 1")
def test_unknown(virtual_gpu):
    pass

def test_without():
    assert not torch.cuda.is_available()
"""


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """What is imported meanwhile, pytester lets Python forget; PyTorch's C++ does not."""
    importlib.import_module("torch._inductor.test_operators")


def test_a_budget_is_kept_and_broken(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(TESTS)
    pytester.makeini("[pytest]\nvirtual_gpu_card = T4\naddopts = --strict-markers")
    done = pytester.runpytest_inprocess("-p", "every_byte.pytest_plugin", "-p", "no:nbval")
    done.assert_outcomes(passed=3, failed=2, errors=1)
    done.stdout.fnmatch_lines(
        [
            "*virtual_gpu: card is 'RTX 1': expected one of *",
            "*AssertionError: the peak is *B, backward at test_a_budget_is_kept_and_broken.py:6 "
            "(model(*.sum().backward()): expected below 1,000,000 B on the T4",
            "*AssertionError: the test put nothing on the T4: expected tensors on *",
        ]
    )


def test_it_brings_no_torch(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import sys\ndef test_it():\n    assert 'torch' not in sys.modules\n")
    done = pytester.runpytest_subprocess("-p", "every_byte.pytest_plugin", "-p", "no:nbval")
    done.assert_outcomes(passed=1)
