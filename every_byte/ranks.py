"""One GPU of many: distributed training whose other processes are only pretended.

`one_of` opens a process group in which this process has rank 0 and nobody answers:
collective operations return at once, with what lies in memory by chance. What the
GPU allocates does not depend on that, so ``fully_shard`` and its kin take here what
they take on one GPU of a cluster, without the cluster: on a CUDA device measured,
on a virtual GPU replayed. Streams have their own blocks in either.

Not part of it: what NCCL takes for itself, outside of PyTorch's allocator.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore

from every_byte.gpu import GPU, open_gpu
from every_byte.tracker import untracked
from every_byte.virtual.streams import streams_of

_COLLECTIVES = ("_allgather_base_", "_reduce_scatter_base_", "allreduce_", "broadcast_")


@contextmanager
def one_of(gpus: int) -> Iterator[DeviceMesh]:
    """Let the GPU in use be the first of as many, each with a process of its own.

    Yields:
        The mesh of all of them, for ``fully_shard(..., mesh=mesh)``.

    Raises:
        ValueError: `gpus` is no whole number, or below 1.
        RuntimeError: a process group is open already.
    """
    if type(gpus) is not int or gpus < 1:
        raise ValueError(f"gpus is {gpus!r}: expected a whole number from 1 up")
    if dist.is_initialized():
        raise RuntimeError("a process group is open: end it with destroy_process_group() first")
    gpu = open_gpu()
    with ExitStack() as stack:
        if gpu.device.type == "meta":
            # FSDP asks for the module of a device kind, such as torch.cuda, and
            # refuses to train on meta, where others forgot to make their weights.
            there = mock.patch.object(torch, gpu.device.type, streams_of(gpu.memory), create=True)
            stack.enter_context(there)
            willing = mock.patch.object(FSDPParamGroup, "_validate_no_meta_params", lambda _: None)
            stack.enter_context(willing)
            look = _looking_again(FSDPParam.reset_sharded_param)
            stack.enter_context(mock.patch.object(FSDPParam, "reset_sharded_param", look))
            library = stack.enter_context(torch.library._scoped_library("c10d", "IMPL"))
            for name in _COLLECTIVES:  # in PyTorch 2.8 meta has none
                if not torch._C._dispatch_has_kernel_for_dispatch_key(f"c10d::{name}", "Meta"):
                    operation = getattr(torch.ops.c10d, name).default
                    on_the_host = partial(operation._op_dk, torch._C.DispatchKey.CPU)
                    library.impl(name, on_the_host, "Meta")
        for name in ("unshard", "wait_for_unshard"):
            work = _gathering(getattr(FSDPParamGroup, name), gpu)
            stack.enter_context(mock.patch.object(FSDPParamGroup, name, work))
        # A DTensor tries operations on fake tensors of the whole's size: on no GPU.
        name = "_propagate_tensor_meta_non_cached"
        tried = untracked()(getattr(ShardingPropagator, name))
        stack.enter_context(mock.patch.object(ShardingPropagator, name, tried))
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
        stack.callback(dist.destroy_process_group)
        yield init_device_mesh(gpu.device.type, (gpus,))


def _gathering(work: Callable[..., Any], gpu: GPU) -> Callable[..., Any]:
    """The same work; what it makes on the GPU is gathered from others."""

    @wraps(work)
    def gathering(*args: Any, **kwargs: Any) -> Any:
        with gpu.label("gathered"):
            return work(*args, **kwargs)

    return gathering


def _looking_again(reset: Callable[[Any], None]) -> Callable[[Any], None]:
    """The same, for ``meta``, too: parameters may have come onto the GPU by ``to_empty``.

    FSDP looks for that (``reset_sharded_param`` in ``_fsdp_param.py``), but not on meta. The
    first GPU's part is never padded: nobody has more rows.
    """

    @wraps(reset)
    def resetting(parameter: Any) -> None:
        reset(parameter)
        with torch.no_grad():
            parameter._sharded_param_data = parameter.sharded_param.to_local().view(-1)

    return resetting
