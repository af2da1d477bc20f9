"""What the tracker writes down, what it counts, and where it stops."""

import gc
import threading
from collections.abc import Callable
from itertools import count

import pytest
import torch

from every_byte.gpu import VirtualGPU
from every_byte.tracker import is_accounted, uncounted, untracked
from every_byte.units import MiB


def test_a_recording_ends_at_its_limit(gpu: VirtualGPU) -> None:
    places = count()
    with gpu.record(where=lambda: next(places), limit=4) as timeline:
        kept = [torch.empty(128 * n, device=gpu.device) for n in range(1, 4)]
        timeline.look(0)
        seen = timeline.highest_where
        kept += [torch.empty(128 * n, device=gpu.device) for n in range(4, 9)]
        kept.clear()
    assert [step.total for step in timeline.steps] == [0, 512, 1536, 3072]
    assert timeline.where == [0, 1, 2, 3] and seen is None
    assert (timeline.highest.total, timeline.highest_at, timeline.highest_where) == (3072, 4, 4)
    assert timeline.is_cut


def test_past_its_limit_a_recording_has_no_highest(gpu: VirtualGPU) -> None:
    with gpu.record(where=lambda: "here", limit=1) as timeline:
        kept = torch.empty(128, device=gpu.device)
        timeline.look(0)
        del kept
    assert timeline.highest == {} and timeline.highest_where is None
    assert timeline.is_cut


def test_a_recording_without_a_look_has_no_highest(gpu: VirtualGPU) -> None:
    with gpu.record(limit=100) as timeline:
        kept = torch.empty(128, device=gpu.device)
        assert not timeline.is_cut
    assert (timeline.highest, timeline.highest_at, timeline.highest_where) == ({}, 0, None)
    assert timeline.where == [] and not timeline.is_cut
    assert [step.total for step in timeline.steps] == [0, 512]
    del kept


@pytest.mark.parametrize(
    "make",
    [
        lambda device: torch.tensor([0.0] * 2**19, device=device),
        lambda device: torch.as_tensor([0.0] * 2**19, device=device),
        lambda device: torch.UntypedStorage(2 * MiB, device=device),
        lambda device: torch.empty(2**19, device=device),
    ],
    ids=["tensor", "as_tensor", "storage", "operation"],
)
def test_memory_runs_out_in_pytorchs_words(make: Callable[[torch.device], object]) -> None:
    with VirtualGPU(capacity=MiB) as gpu:
        with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory\. Tried"):
            make(gpu.device)
        assert gpu.memory_allocated() == 0


def test_a_resize_runs_out_in_pytorchs_words() -> None:
    with VirtualGPU(capacity=4 * MiB) as gpu:
        storage = torch.empty(1, device=gpu.device).untyped_storage()
        with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory\. Tried"):
            storage.resize_(8 * MiB)
        assert gpu.memory_allocated() == 512
        storage.resize_(1000)
        assert gpu.memory_allocated() == 1024


def test_a_recording_follows_a_resize(gpu: VirtualGPU) -> None:
    storage = torch.empty(128, device=gpu.device).untyped_storage()
    with gpu.record() as timeline:
        storage.resize_(4096)
    assert [step["activations"] for step in timeline.steps] == [512, 4096]
    assert [step["workspaces"] for step in timeline.steps] == [0, 0]


def test_what_no_tracker_saw_made_is_not_counted(gpu: VirtualGPU) -> None:
    counted = torch.empty(256, device=gpu.device)
    gc.collect()
    before = uncounted(gpu.device)  # of other tests of this process
    with untracked():
        unseen = torch.empty(300, device=gpu.device)
        assert not is_accounted(counted)  # nobody looks here
    assert is_accounted(counted) and not is_accounted(unseen)
    assert uncounted(gpu.device) == before + 1200
    with pytest.raises(RuntimeError, match="1,200 bytes no one accounts for"):
        torch.add(counted[:1], 1, out=unseen)
    around: list[object] = [unseen]
    around.append(around)
    del unseen, around  # a cycle, which only the collector ends
    assert uncounted(gpu.device) == before


def test_a_gpu_opened_again_inside_of_untracked_looks_again() -> None:
    gpu = VirtualGPU().open()
    with untracked():
        gpu.close()
        with gpu:
            kept = torch.empty(128, device=gpu.device)
            assert gpu.memory_allocated() == 512
    del kept


def test_what_comes_from_the_host_is_a_batch_and_a_copy_on_the_card_is_not(gpu: VirtualGPU) -> None:
    batch = torch.empty(128).to(gpu.device)
    copy = batch.double()
    weight = torch.nn.Parameter(copy)
    other = weight.half()  # and not under autocast
    found = gpu.breakdown()
    assert (found["batch"], found["activations"]) == (batch.nbytes, copy.nbytes + other.nbytes)
    assert found["cast weights"] == 0


def test_a_thread_that_outlives_the_gpu_goes_on_as_without_one() -> None:
    closed, made = threading.Event(), list[torch.Tensor]()

    def run() -> None:
        closed.wait(60)
        made.append(torch.zeros(3, dtype=torch.float64))

    with VirtualGPU():
        thread = threading.Thread(target=run)
        thread.start()
    closed.set()
    thread.join(60)
    assert made[0].dtype is torch.float64
