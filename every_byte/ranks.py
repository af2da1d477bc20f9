"""One GPU of many: distributed training whose other processes are only pretended.

`one_of` opens a process group in which this process has rank 0 and nobody answers:
collective operations return at once, with what lies in memory by chance. What the
GPU allocates does not depend on that, so ``fully_shard`` and its kin take here what
they take on one GPU of a cluster, without the cluster: on a CUDA device measured,
on a virtual GPU replayed. Streams have their own blocks in either.

Not part of it: what NCCL takes for itself, outside of PyTorch's allocator.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.nn.parallel import DistributedDataParallel
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
    with _ready(gpu), ExitStack() as stack:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
        stack.callback(dist.destroy_process_group)
        yield init_device_mesh(gpu.device.type, (gpus,))


@contextmanager
def first_of(gpus: int) -> Iterator[None]:
    """Let a script that opens its process group itself be the first of as many processes.

    Of several, it finds what ``torchrun`` sets in the environment. Every group that it opens is
    the fake one, whatever backend it asks for. Objects that others would send are this process's
    own. Of the processes that ``torch.multiprocessing.spawn`` would start it is the first, too.

    Raises:
        NotImplementedError: the script, inside, asks for another number of processes.
    """
    begin, new = dist.init_process_group, dist.new_group

    def check(asked: object, by: str) -> None:
        if isinstance(asked, int) and asked > 1 and asked != gpus:
            raise NotImplementedError(
                f"{by} of {asked} processes is not replayed for {gpus}: run it with --gpus {asked}"
            )

    def init_process_group(backend: Any = None, *_: object, **options: Any) -> None:
        check(options.get("world_size"), "init_process_group")
        begin("fake", store=FakeStore(), rank=0, world_size=gpus)

    def spawn(
        fn: Callable[..., Any],
        args: Any = (),
        nprocs: int = 1,
        join: bool = True,
        *_: Any,
        **__: Any,
    ) -> Any:
        check(nprocs, "torch.multiprocessing.spawn")
        fn(0, *args)
        return None if join else SimpleNamespace(join=lambda *_, **__: True, processes=[])

    def new_group(*args: Any, **kwargs: Any) -> Any:
        return new(*args[:2], **{k: v for k, v in kwargs.items() if k not in _OF_BACKENDS})

    def all_gather_object(object_list: list[Any], obj: Any, *_: object, **__: object) -> None:
        object_list[:] = [obj] * len(object_list)

    def gather_object(obj: Any, object_gather_list: Any = None, *_: object, **__: object) -> None:
        if object_gather_list is not None:
            all_gather_object(object_gather_list, obj)

    def alone(*_: object, **__: object) -> None:
        pass  # the first process sends; or waits for the others

    rank = {
        **dict.fromkeys(("RANK", "LOCAL_RANK", "GROUP_RANK"), "0"),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(gpus)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    patches = {
        "init_process_group": init_process_group,
        "new_group": new_group,
        "all_gather_object": all_gather_object,
        "gather_object": gather_object,
        "broadcast_object_list": alone,
        "barrier": alone,
        "is_nccl_available": lambda: True,
    }
    with (
        _ready(open_gpu()),
        mock.patch.dict(os.environ, rank if gpus > 1 else {}),
        ExitStack() as stack,
    ):
        for name, patch in patches.items():
            for module in (dist, distributed_c10d):
                stack.enter_context(mock.patch.object(module, name, patch))
        # All have the same model; FSDP's default mesh is the accelerator's.
        for owner, name, answer in (
            (torch.nn.parallel.distributed, "_verify_param_shape_across_processes", None),
            (torch._C, "_get_accelerator", torch.device("cuda")),
        ):
            stack.enter_context(mock.patch.object(owner, name, lambda *_, answer=answer: answer))
        for name in ("spawn", "start_processes"):
            stack.enter_context(mock.patch.object(torch.multiprocessing, name, spawn))
        changed: tuple[tuple[Any, str, Any], ...] = (
            (DistributedDataParallel, "__init__", _replica(open_gpu())),
            (
                DistributedDataParallel,
                "register_comm_hook",
                _refused("register_comm_hook", "leave it out, or run the script with --gpus 1"),
            ),
            (
                FullyShardedDataParallel,
                "__init__",
                _refused(
                    "FullyShardedDataParallel",
                    "take fully_shard, its newer form (of Accelerate: fsdp_version=2)",
                ),
            ),
            *(
                (FSDPState, name, _as_the_script(getattr(FSDPState, name)))
                for name in ("_pre_backward", "_root_post_backward_final_callback")
            ),
            (FSDPParamGroup, "post_backward", _as_the_script(FSDPParamGroup.post_backward)),
        )
        for owner, name, patch in changed:
            stack.enter_context(mock.patch.object(owner, name, patch))
        try:
            yield
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _replica(gpu: GPU) -> Callable[..., None]:
    """DDP's ``__init__``: its buckets are gradients, and stay as they are, since nobody answers."""
    make, register = DistributedDataParallel.__init__, DistributedDataParallel.register_comm_hook

    def unanswered(state, bucket):  # type: ignore[no-untyped-def]  # DDP checks what is said
        done: Any = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    def made(replica: Any, *args: Any, **kwargs: Any) -> None:
        with gpu.label("gradients"):
            make(replica, *args, **kwargs)
        register(replica, None, unanswered)

    return made


def _refused(name: str, instead: str) -> Callable[..., None]:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError(f"{name} of a script is not replayed: {instead}")

    return refuse


def _as_the_script(work: Callable[..., Any]) -> Callable[..., Any]:
    """The same in autograd's callbacks, too, where PyTorch has put away the modes of now."""
    modes = list(torch.overrides._get_current_function_mode_stack())

    @wraps(work)
    def working(*args: Any, **kwargs: Any) -> Any:
        present = torch.overrides._get_current_function_mode_stack()
        with ExitStack() as stack:
            for mode in modes:
                if not any(mode is other for other in present):
                    stack.enter_context(mode)
            return work(*args, **kwargs)

    return working


_OF_BACKENDS = frozenset(("backend", "pg_options", "device_id", "use_local_synchronization"))


@contextmanager
def _ready(gpu: GPU) -> Iterator[None]:
    """Let PyTorch's distributed training work with a fake group on this GPU."""
    with ExitStack() as stack:
        if gpu.memory.device.type == "meta":
            # FSDP asks for the module of a device kind, such as torch.cuda, and
            # refuses to train on meta, where others forgot to make their weights.
            there = mock.patch.object(torch, "meta", streams_of(gpu.memory), create=True)
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
        yield


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
