"""PyTorch's private names that this package uses, in one table, and what it changes while open.

PyTorch may rename a private name in any version. `PRIVATE_NAMES` says for each what it is
for, what breaks without it, and with which versions it was tried. A test holds the table
against the code, so a new version of PyTorch is checked by reading its failures.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from typing import Any, Literal, cast
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import optimizer  # deleted from torch.optim, but a module
from torch.utils import _foreach_utils
from torch.utils._pytree import tree_leaves

from every_byte.tracker import is_accounted, is_tracked, untracked


@dataclass(frozen=True)
class PrivateName:
    """A name of PyTorch's that its documentation does not promise.

    Attributes:
        name: dotted, as it is reached from ``torch``.
        purpose: what it is used for.
        without: what breaks without it.
        needed_by: the virtual GPU, `every_byte.one_of`, the CUDA device, or only for speed.
        checked: PyTorch's versions that the tests have passed with.
    """

    name: str
    purpose: str
    without: str
    needed_by: Literal["virtual", "ranks", "cuda", "speed"] = "virtual"
    checked: tuple[str, ...] = ("2.8", "2.14", "2.15")


PRIVATE_NAMES = (
    # The tracker
    PrivateName(
        "torch.utils._python_dispatch.TorchDispatchMode",
        "sees each operation, with its arguments and results",
        "nothing is accounted for",
    ),
    PrivateName(
        "torch.utils._python_dispatch.TorchDispatchMode._should_skip_dynamo",
        "keeps the import of the tracker from importing torch._dynamo",
        "nothing but time and RAM",
        "speed",
        checked=("2.14", "2.15"),
    ),
    PrivateName(
        "torch._C._storage_Use_Count",
        "tells whether a storage is dead, or in a cycle that Python's garbage collector takes",
        "what torch.save wrote leaves the account too early with PyTorch 2.8",
    ),
    PrivateName(
        "torch.UntypedStorage._new_with_weak_ptr",
        "finds such a storage again",
        "what torch.save wrote leaves the account too early with PyTorch 2.8",
    ),
    PrivateName(
        "torch.utils._python_dispatch.is_traceable_wrapper_subclass",
        "finds the parts of a DTensor, for breakdown()",
        "a DTensor's bytes count as activations",
    ),
    PrivateName(
        "torch.utils._python_dispatch.is_traceable_wrapper_subclass_type",
        "leaves a DTensor's operations to be seen on its parts",
        "a DTensor counts as a whole",
    ),
    PrivateName(
        "torch._subclasses.fake_tensor.FakeTensor",
        "tells a tensor of shapes alone from one that carries out operations on tensors it holds",
        "what such a tensor holds is counted by nobody, or shapes are counted",
    ),
    PrivateName(
        "torch._subclasses.fake_tensor.FakeTensorMode",
        "makes such tensors of shapes alone, on no GPU",
        "torch.export's shapes are counted",
    ),
    PrivateName(
        "torch._subclasses.functional_tensor.FunctionalTensor",
        "is one that holds such a tensor",
        "a program that torch.export made cannot be decomposed",
    ),
    PrivateName(
        "torch._C._get_dispatch_mode",
        "tells whether make_fx writes down operations, by _TorchDispatchModeKey",
        "what the replay makes in an operation's place is written down, too",
    ),
    PrivateName(
        "torch.utils._pytree.tree_leaves",
        "finds the tensors in results and arguments",
        "nothing is accounted for",
    ),
    PrivateName(
        "torch.utils._device._device_constructors",
        "is filled before torch.tensor is replaced",
        "torch.tensor() pays no heed to a device context",
    ),
    PrivateName(
        "torch.UntypedStorage._cdata",
        "tells whether two tensors share a storage",
        "views count twice",
    ),
    PrivateName(
        "torch.ops.aten.add.Tensor._can_decompose",
        "tells composite operations from kernels",
        "a timeline has steps within kernels",
    ),
    PrivateName(
        "torch.ops.aten.add.Tensor._op_dk",
        "carries out a composite operation as C++ composes it",
        "in inference mode temporaries are not seen",
    ),
    PrivateName(
        "torch._C.DispatchKey",
        "names the dispatcher's keys",
        "autocast and inference mode are not replayed",
    ),
    PrivateName(
        "torch._C._dispatch_has_kernel_for_dispatch_key",
        "asks which operators the installed version has for a key",
        "operators that a version lacks raise at open()",
    ),
    PrivateName(
        "torch._C._current_graph_task_id",
        "tells whether backward runs in this thread",
        "temporaries count as activations, backward takes no workspace of its own",
    ),
    # What is done in place where nobody watches
    PrivateName(
        "torch._C._current_autograd_node",
        "tells which node of autograd makes a tensor, with its _sequence_nr and name",
        "gradients are never added in place: peaks of backward are too high",
    ),
    PrivateName(
        "torch.Tensor._use_count",
        "tells whether autograd alone holds a gradient",
        "gradients are never added in place: peaks of backward are too high",
    ),
    PrivateName(
        "torch._prims_common",
        "tells whether a gradient fills its block, by is_non_overlapping_and_dense or _or_false",
        "expanded gradients would be added to in place",
    ),
    # Autocast
    PrivateName(
        "torch._C._is_autocast_available",
        'lets torch.autocast("meta") be asked for',
        "autocast is refused",
    ),
    PrivateName(
        "torch._C._IncludeDispatchKeyGuard",
        "lets operations come to autocast's kernels, in each thread",
        "autocast casts nothing",
    ),
    PrivateName(
        "torch._C._ExcludeDispatchKeyGuard",
        "keeps autocast's kernels from calling themselves",
        "autocast recurses without end",
    ),
    PrivateName(
        "torch._C.DispatchKeySet",
        "makes a set of one key, for the guard",
        "autocast recurses without end",
    ),
    PrivateName(
        "torch.ops.aten.add.Tensor._schema",
        "tells an operator's arguments by name",
        "autocast cannot ask for a result in FP32",
    ),
    PrivateName(
        "torch.Tensor._is_view",
        "tells what autocast keeps a cast of",
        "casts of views are kept, unlike on CUDA",
    ),
    PrivateName(
        "torch.amp.GradScaler._maybe_opt_step",
        "takes the step though an infinity cannot be looked for",
        "GradScaler raises at step()",
    ),
    # Kernels
    PrivateName(
        "torch._C._get_sdp_priority_order",
        "tells in which order CUDA tries attention's kernels",
        "attention is not replayed",
    ),
    PrivateName(
        "torch.library._scoped_library",
        "registers kernels for as long as a GPU is open",
        "composite operations are made as on the host",
    ),
    # While a virtual GPU is open
    PrivateName(
        "torch.utils._foreach_utils",
        "holds the kinds of device for optimizers' foreach and fused kernels",
        "optimizers loop over tensors, with other temporaries than on CUDA",
    ),
    PrivateName(
        "torch.utils._foreach_utils._get_foreach_kernels_supported_devices",
        "puts meta among the devices for foreach",
        "optimizers loop over tensors, with other temporaries than on CUDA",
    ),
    PrivateName(
        "torch.utils._foreach_utils._get_fused_kernels_supported_devices",
        "puts meta among the devices for fused",
        "fused=True is refused",
    ),
    PrivateName(
        "torch._dynamo",
        "is imported before a GPU is open, since optimizers and meta kernels import it later",
        "the first step takes a second longer",
    ),
    PrivateName(
        "torch.nn.Module._apply",
        "lets .to() keep a module's Parameters on the way to meta",
        "optimizers made before .to() hold the host's Parameters",
    ),
    PrivateName(
        "torch.Tensor._make_subclass",
        "shows bitsandbytes' 4-bit parameters, where they are made",
        "a 4-bit model takes what it takes in FP32, without a word",
    ),
    # One of many GPUs
    PrivateName(
        "torch.distributed.fsdp._fully_shard._fsdp_param_group.FSDPParamGroup",
        "labels what FSDP gathers, and lets it train on meta",
        "gathered parameters count as activations",
        "ranks",
    ),
    PrivateName(
        "torch.distributed.fsdp._fully_shard._fsdp_param_group.FSDPParamGroup"
        "._validate_no_meta_params",
        "is left out: meta is the virtual GPU's device",
        "FSDP refuses to train",
        "ranks",
    ),
    PrivateName(
        "torch.distributed.fsdp._fully_shard._fsdp_param.FSDPParam",
        "looks again for its part of a parameter, in reset_sharded_param, and keeps it in "
        "_sharded_param_data",
        "FSDP gathers from a model made in untracked(), which is refused",
        "ranks",
    ),
    PrivateName(
        "torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState",
        "has its backward counted as the script's, in _pre_backward and "
        "_root_post_backward_final_callback",
        "a script that shards stops in backward",
        "ranks",
    ),
    PrivateName(
        "torch.distributed.tensor._sharding_prop.ShardingPropagator",
        "tries operations on fake tensors of the whole's size",
        "their bytes count",
        "ranks",
    ),
    PrivateName(
        "torch.distributed.tensor._sharding_prop.ShardingPropagator"
        "._propagate_tensor_meta_non_cached",
        "is where they are tried: on no GPU",
        "their bytes count",
        "ranks",
    ),
    PrivateName(
        "torch.testing._internal.distributed.fake_pg.FakeStore",
        "pretends the other processes",
        "one_of() cannot open a process group",
        "ranks",
    ),
    PrivateName(
        "torch.nn.parallel.distributed._verify_param_shape_across_processes",
        "is left out: the other processes of DistributedDataParallel are pretended",
        "DistributedDataParallel waits for what nobody sends",
        "ranks",
    ),
    PrivateName(
        "torch._C._get_accelerator",
        "names the device of collectives that name none",
        "a script's init_process_group() finds no device",
        "ranks",
    ),
    # Values, and an unchanged CUDA script
    PrivateName(
        "torch._C._TorchDispatchModeKey",
        "names the mode of make_fx",
        "what the replay makes in an operation's place is written down, too",
    ),
    PrivateName(
        "torch._C.DisableTorchFunction",
        "asks a tensor for its own device, where meta tensors say that they are CUDA's",
        "as_cuda() accounts for nothing",
    ),
    PrivateName(
        "torch.utils._python_dispatch._disable_current_modes",
        "computes known values on the host, out of sight",
        "the host's copies count, or are computed without end",
    ),
    PrivateName(
        "torch.utils._pytree.tree_map",
        "puts known values in the tensors' place",
        "no value is known",
    ),
    PrivateName(
        "torch._C._nn._parse_to",
        "is left to read the device that a script names",
        "model.to('cuda') fails in as_cuda()",
    ),
    PrivateName(
        "torch._C._group_tensors_by_device_and_dtype",
        "groups tensors by the device that they say they are on, for optimizers",
        "foreach optimizers mix devices in as_cuda()",
    ),
    PrivateName(
        "torch._C._functorch",
        "finds the tensor behind one of torch.func.vmap's, which has no storage: "
        "is_functorch_wrapped_tensor, get_unwrapped",
        "torch.func.vmap fails in as_cuda()",
    ),
    PrivateName(
        "torch._C._scatter",
        "brings a batch to DataParallel's card, on its stream",
        "DataParallel fails in as_cuda() where its batch is on the host",
    ),
    PrivateName(
        "torch._C._gather",
        "brings the gradient of such a batch back",
        "DataParallel fails in as_cuda() where its batch has a gradient",
    ),
    PrivateName(
        "torch._C.Generator",
        "is the class of random generators, which a script may make for cuda",
        "torch.Generator(device='cuda') fails in as_cuda()",
    ),
    PrivateName(
        "torch._decomp",
        "has functions that torch.func.jvp compiles: they are left to torch.jit.script",
        "torch.func.jvp and hessian fail in as_cuda()",
    ),
    PrivateName(
        "torch.overrides._get_current_function_mode_stack",
        "tells whether as_cuda() is in use already",
        "two of them map devices twice",
    ),
    PrivateName(
        "torch.cuda._lazy_init",
        "has nothing to wake in as_cuda(); likewise _is_compiled",
        "scripts that call it fail in as_cuda()",
    ),
    PrivateName(
        "torch.cuda.memory._dump_snapshot",
        "writes the virtual card's snapshot in as_cuda()",
        "a script writes none",
    ),
    # A CUDA device
    PrivateName(
        "torch.cuda.memory._snapshot",
        "is GPU.snapshot() there",
        "no snapshot of a CUDA device",
        "cuda",
    ),
    PrivateName(
        "torch.cuda.memory._record_memory_history",
        "is GPU.record_memory_history() there",
        "no history of a CUDA device",
        "cuda",
    ),
    PrivateName(
        "torch._C._cuda_clearCublasWorkspaces",
        "is GPU.clear_cublas_workspaces() there",
        "workspaces of a CUDA device stay",
        "cuda",
    ),
)


def find(name: str) -> Any:
    """What a dotted name of PyTorch's stands for.

    Raises:
        AttributeError, ImportError: the installed PyTorch has no such name.
    """
    head, *parts = name.split(".")
    found, path = import_module(head), head
    for part in parts:
        path += f".{part}"
        found = getattr(found, part) if hasattr(found, part) else import_module(path)
    return found


def check() -> None:
    """See that PyTorch has the names that a virtual GPU needs.

    Raises:
        RuntimeError: it lacks one.
    """
    for private in PRIVATE_NAMES:
        if private.needed_by != "virtual":
            continue
        try:
            find(private.name)
        except (AttributeError, ImportError):
            raise RuntimeError(
                f"PyTorch {torch.__version__} has no {private.name}, which {private.purpose}: "
                f"without it {private.without}; install a version of PyTorch that it was checked "
                f"with, {' or '.join(private.checked)}"
            ) from None


@contextmanager
def optimizers_as_on_cuda() -> Iterator[None]:
    """Let optimizers choose their algorithm for ``meta`` as they do for CUDA."""
    with ExitStack() as stack:
        for name in (
            "_get_foreach_kernels_supported_devices",
            "_get_fused_kernels_supported_devices",
        ):
            devices = [*getattr(_foreach_utils, name)(), "meta"]
            for module in (_foreach_utils, optimizer):
                stack.enter_context(mock.patch.object(module, name, devices.copy))
        yield


@contextmanager
def modules_move_as_on_cuda(quantising: bool) -> Iterator[None]:
    """Let ``.to()`` keep a module's Parameters, and what is tied, as it does on CUDA.

    Within a device PyTorch does so by ``param.data = ``; on the way between the host and
    ``meta`` only if told to swap them.

    Args:
        quantising: whether bitsandbytes' parameters are quantised on the way; refused if not.
    """
    future = torch.__future__
    apply = torch.nn.Module._apply
    swaps = future.get_swap_module_params_on_conversion()

    def applied(module: Any, fn: Any, recurse: bool = True) -> Any:
        before = future.get_swap_module_params_on_conversion()
        own = list(module.parameters(recurse=False))
        if any(map(_is_quantised, own)):
            with untracked():
                comes = _is_meta(fn(torch.empty(0)))
            if comes and quantising and is_tracked():
                for parameter in own:  # PyTorch could not swap them
                    if _is_quantised(parameter):
                        _quantise(parameter, fn)
                    elif not _is_meta(parameter):
                        moved = torch.nn.Parameter(fn(parameter.data), parameter.requires_grad)
                        torch.utils.swap_tensors(parameter, moved)
                own = []
            for parameter in own if comes else ():
                refuse_quantised(parameter)
        done = []
        if own:
            with torch.no_grad():
                done.append(fn(own[0]))
            future.set_swap_module_params_on_conversion(
                swaps or _is_meta(done[0]) is not _is_meta(own[0])
            )

        def once(tensor: torch.Tensor) -> torch.Tensor:
            return done.pop() if done and tensor is own[0] else fn(tensor)

        try:
            return apply(module, once, recurse)
        finally:
            future.set_swap_module_params_on_conversion(before)

    with mock.patch.object(torch.nn.Module, "_apply", applied), _tables_of_a_gpu():
        yield


def _is_meta(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of the ``meta`` device, whatever it says in an unchanged CUDA script."""
    with torch._C.DisableTorchFunction():
        return tensor.is_meta


def _is_quantised(parameter: torch.Tensor) -> bool:
    """Whether a parameter is of bitsandbytes' and on the host."""
    return type(parameter).__module__ == "bitsandbytes.nn.modules" and not _is_meta(parameter)


def _quantise(parameter: Any, to_card: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Let a parameter of bitsandbytes' on the host become what it is on the card.

    ``_quantize`` of ``Params4bit`` and ``Int8Params`` in ``bitsandbytes/nn/modules.py`` of
    0.50, which sets ``.data``: from the host to ``meta`` PyTorch lets nobody.
    """
    kind = type(parameter)
    functional: Any = import_module("bitsandbytes.functional")
    on_host = parameter.data.contiguous()
    if kind.__name__ == "Params4bit" and not parameter.bnb_quantized:
        data, state = functional.quantize_4bit(
            to_card(on_host),
            blocksize=parameter.blocksize,
            compress_statistics=parameter.compress_statistics,
            quant_type=parameter.quant_type,
            quant_storage=parameter.quant_storage,
        )
        told = {"quant_state": state, "bnb_quantized": True}
        if parameter.module is not None:
            parameter.module.quant_state = state
    elif (
        kind.__name__ == "Int8Params"
        and on_host.is_floating_point()
        and not parameter.has_fp16_weights
    ):
        data, scales, _ = functional.int8_vectorwise_quant(to_card(on_host.to(torch.float16)))
        told = {"CB": data, "SCB": scales}
    else:
        refuse_quantised(parameter)
        return
    quantised = kind(data, requires_grad=parameter.requires_grad)
    vars(quantised).update(vars(parameter) | told)
    torch.utils.swap_tensors(parameter, quantised)


@contextmanager
def _tables_of_a_gpu() -> Iterator[None]:
    """Let bitsandbytes' tables of levels on the device, which it keeps, end with the GPU."""

    def taken() -> dict[str, torch.Tensor]:
        known = getattr(sys.modules.get("bitsandbytes.functional"), "name2qmap", {})
        return {name: known.pop(name) for name, table in list(known.items()) if table.is_meta}

    before = taken()
    try:
        yield
    finally:
        taken()
        if before:
            sys.modules["bitsandbytes.functional"].name2qmap.update(before)


PAGED = (
    "a paged optimizer's states: counted as on the host; while there is room, CUDA keeps them on "
    "the card, beside PyTorch's memory"
)


@contextmanager
def paged_states_lie_on_the_host(estimates: dict[str, None]) -> Iterator[None]:
    """Let bitsandbytes' paged optimizers keep their states where no allocator counts them.

    On a card ``cudaMallocManaged`` gives them, and PyTorch has a tensor of the host around them
    (``get_paged`` in ``bitsandbytes/functional.py`` of 0.50).
    """

    def get_paged(*shape: int, dtype: torch.dtype = torch.float32, device: object = None) -> Any:
        estimates[PAGED] = None
        tensor: Any = torch.empty(shape, dtype=dtype, device="cpu")  # no page of it is touched
        tensor.is_paged, tensor.page_deviceid = True, 0
        return tensor

    def on_paged(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def called(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            return None if tensor.is_paged else function(tensor, *args, **kwargs)

        return called

    def prepare(*_: object) -> None:
        functional: Any = sys.modules.get("bitsandbytes.functional")
        if functional is None or functional.get_paged is get_paged:
            return
        stack.enter_context(mock.patch.object(functional, "get_paged", get_paged))
        for name in ("fill", "prefetch_tensor"):
            function = on_paged(getattr(functional, name))
            stack.enter_context(mock.patch.object(functional, name, function))

    with ExitStack() as stack:
        stack.callback(optimizer.register_optimizer_step_pre_hook(prepare).remove)
        yield


@contextmanager
def recurrent_weights_are_flat() -> Iterator[None]:
    """Let recurrent layers keep their weights in one block, as cuDNN has them.

    ``flatten_parameters`` does so on CUDA alone.
    """
    flatten = torch.nn.RNNBase.flatten_parameters

    def flattened(module: torch.nn.RNNBase) -> None:
        weights = [weight for layer in module.all_weights for weight in layer]
        first = weights[0]
        if (
            not is_tracked()
            or not all(_is_meta(w) and w.dtype is first.dtype for w in weights)
            or not torch.backends.cudnn.enabled
        ):
            return flatten(module)
        with torch.no_grad():
            flat = first.new_zeros(sum(weight.numel() for weight in weights))
            at = 0
            for weight in weights:
                weight.data = flat[at : at + weight.numel()].view_as(weight)
                at += weight.numel()

    with mock.patch.object(torch.nn.RNNBase, "flatten_parameters", flattened):
        yield


def refuse_quantised(parameter: object) -> None:
    """Refuse a parameter of bitsandbytes' that is about to leave the host.

    Raises:
        NotImplementedError: it is such a parameter.
    """
    kind = type(parameter)
    if kind.__module__.startswith("bitsandbytes.") and not cast(torch.Tensor, parameter).is_meta:
        raise NotImplementedError(
            f"a {kind.__name__} comes from the host, which bitsandbytes quantises on its way to a "
            "CUDA device: that is not replayed; every_byte.estimate tells what such weights take"
        )


@contextmanager
def four_bits_are_refused() -> Iterator[None]:
    """Refuse bitsandbytes' 4-bit parameters that lie on ``meta`` before they are quantised.

    There bitsandbytes never quantises them, as it does on the way to a CUDA device: a model
    that transformers loads in 4 bits would take what it takes in FP32.
    """
    make = torch.Tensor._make_subclass

    def made(cls: type, data: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # In an unchanged CUDA script its device is CUDA, and bitsandbytes quantises it.
        if cls.__name__ == "Params4bit" and data.is_meta and data.is_floating_point():
            if is_accounted(data):
                raise NotImplementedError(
                    f"a Params4bit of {data.dtype} on a virtual GPU: bitsandbytes quantises none "
                    "there, so its bytes would be wrong; load the model in untracked() on the host"
                )
        return make(cls, data, *args, **kwargs)

    with mock.patch.object(torch.Tensor, "_make_subclass", made):
        yield


@contextmanager
def fake_tensors_take_nothing() -> Iterator[None]:
    """Let the tensors of ``FakeTensorMode`` be on no GPU: they are shapes, made on ``meta``.

    ``torch.export``, ``make_fx`` and DTensor try operations on them.
    """
    made = untracked()(FakeTensorMode.__torch_dispatch__)
    with mock.patch.object(FakeTensorMode, "__torch_dispatch__", made):
        yield


@contextmanager
def no_fast_path(estimates: dict[str, None]) -> Iterator[None]:
    """Let ``nn.MultiheadAttention`` and ``nn.TransformerEncoder`` go their usual way in inference.

    There a card takes fused kernels and, for padded batches, nested tensors
    (``torch/nn/modules/transformer.py`` of PyTorch 2.14); neither is replayed.
    """
    known = torch.backends.mha.get_fastpath_enabled

    def none() -> bool:
        if known() and is_tracked() and not torch.is_grad_enabled():
            estimates[
                "nn.TransformerEncoder and nn.MultiheadAttention in inference: replayed without "
                "PyTorch's fast path; a card has other temporaries there"
            ] = None
        return False

    with mock.patch.object(torch.backends.mha, "get_fastpath_enabled", none):
        yield


_LAYOUTS = {
    torch: (
        *("sparse_coo_tensor", "sparse_csr_tensor", "sparse_csc_tensor", "sparse_bsr_tensor"),
        *("sparse_bsc_tensor", "sparse_compressed_tensor"),
        *("quantize_per_tensor", "quantize_per_channel"),
    ),
    torch.nested: ("nested_tensor", "as_nested_tensor"),
}


@contextmanager
def only_dense_tensors() -> Iterator[None]:
    """Refuse what makes tensors of other layouts, and quantised ones, by its own name.

    Some of it PyTorch refuses on ``meta`` with an internal assertion.
    """

    def refusing(name: str, make: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(make)
        def made(*args: Any, **kwargs: Any) -> Any:
            device = kwargs.get("device")
            there = any(
                isinstance(leaf, torch.Tensor) and _is_meta(leaf) for leaf in tree_leaves(args)
            ) or (device is not None and torch.device(device).type in ("meta", "cuda"))
            if there and is_tracked() and kwargs.get("layout") is not torch.jagged:
                raise NotImplementedError(
                    f"torch.{name} on a virtual GPU: only dense tensors are accounted for, and "
                    "nested ones of layout=torch.jagged; take one of these"
                )
            return make(*args, **kwargs)

        return made

    with ExitStack() as stack:
        for module, names in _LAYOUTS.items():
            for name in names:
                shown = f"nested.{name}" if module is torch.nested else name
                patch = refusing(shown, getattr(module, name))
                stack.enter_context(mock.patch.object(module, name, patch))
        yield


@contextmanager
def nothing_is_compiled() -> Iterator[None]:
    """Let ``torch.compile`` give back what it is given, and say so.

    Inductor's kernels are made for a device with values; what they borrow is not replayed.
    """

    @wraps(torch.compile)
    def compile(model: Any = None, **options: Any) -> Any:
        if model is None:
            return lambda decorated: compile(decorated, **options)
        warnings.warn(
            "torch.compile does nothing on a virtual GPU: the figures are those of eager mode",
            stacklevel=2,
        )
        return model

    with mock.patch.object(torch, "compile", compile):
        yield
