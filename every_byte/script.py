"""An unchanged CUDA script on a virtual card: ``with every_byte.as_cuda("RTX 4090"):``.

Inside, "cuda" is a `every_byte.gpu.VirtualGPU`: a ``TorchFunctionMode`` turns the device
into the ``meta`` device that is accounted for, and lets its tensors answer as CUDA's do;
`every_byte.virtual.cuda_names` answers for ``torch.cuda``. A tensor that the script itself
puts on "meta" is on no card. All is as before once the context ends.
"""

import math
import multiprocessing
import multiprocessing.process
import os
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext, _device_constructors
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map

from every_byte.data import context_of
from every_byte.gpu import VirtualGPU
from every_byte.tracker import is_wrapper, untracked
from every_byte.virtual import autocast
from every_byte.virtual.cuda_names import cuda_names, index_of, legacy_dtype
from every_byte.virtual.values import UnknownValueError, as_indices, program_line

_CUDA, _META = torch.device("cuda", 0), torch.device("meta")
_CARD = torch.device("meta", 0)  # the card as a context; PyTorch's tensors drop the 0
_plain = torch._C.DisableTorchFunction  # what holds inside is PyTorch's own answer


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        if not device.startswith("cuda"):
            return False
        if device != "cuda" and not device.startswith("cuda:"):
            return False
        device = torch.device(device)
    if isinstance(device, torch.device) and device.type == "cuda":
        index_of(device)
        return True
    return False


def _is_meta(device: Any) -> bool:
    """Whether the script itself asks for "meta"."""
    return device == "meta" or (isinstance(device, torch.device) and device == _META)


def _whole(tensor: Tensor) -> Tensor:
    """The tensor that has the memory; itself for most.

    Of ``torch.func.vmap``, which shows a part of it, or ``grad``, a copy; of a ``DTensor``,
    this GPU's part.
    """
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    if is_traceable_wrapper_subclass(tensor):
        return _whole(getattr(tensor, tensor.__tensor_flatten__()[0][0]))
    return tensor


class _AsCuda(TorchFunctionMode):
    """Puts the virtual card in the place of the device "cuda"."""

    def __init__(self, gpu: VirtualGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def is_ours(self, tensor: Any) -> bool:
        """Whether a tensor lies on the virtual card; the script's own meta tensors don't."""
        with _plain():
            return bool(tensor.is_meta) and self.gpu.accounts_for(_whole(tensor))

    def is_on_no_card(self, tensor: Tensor) -> bool:
        """Whether a tensor is one of the script's own meta tensors."""
        if is_wrapper(type(tensor)):
            return False  # what it holds may be on the card
        with _plain():
            return bool(tensor.is_meta) and not self.gpu.accounts_for(_whole(tensor))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(self, func, args, kwargs)
        device = kwargs.get("device")
        if device is not None:
            if _is_cuda(device) or type(device) is int:
                index_of(device)
                self.gpu.check_open()
                kwargs = {**kwargs, "device": _META}
                kwargs.pop("pin_memory", None)
                kwargs.pop("generator", None)
            elif _is_meta(device):
                with untracked():
                    return func(*args, **kwargs)
        elif args and isinstance(args[0], Tensor) and self.is_on_no_card(args[0]):
            with untracked():
                return func(*args, **kwargs)
        elif args and any(map(_is_cuda, args)):
            self.gpu.check_open()
            args = tuple(_META if _is_cuda(arg) else arg for arg in args)
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if kwargs.get("generator") is not None and isinstance(kwargs["generator"], _Generator):
            kwargs = {**kwargs, "generator": None}
        return func(*args, **kwargs)


# How the card's tensors answer


def _device(mode: _AsCuda, func: Any, args: Any, kwargs: Any) -> Any:
    return _CUDA if mode.is_ours(args[0]) else func(*args)


def _answered(on_cuda: Any) -> Callable[..., Any]:
    return lambda mode, func, args, kwargs: (
        on_cuda if mode.is_ours(args[0]) else func(*args, **kwargs)
    )


def _left_alone(mode: _AsCuda, func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _to(mode: _AsCuda, func: Any, args: Any, kwargs: Any) -> Any:
    target = kwargs.get("device", args[1] if len(args) > 1 else None)
    if type(target) is int:
        index_of(target)
        target = _CUDA
    if not (_is_cuda(target) or _is_meta(target)):
        return func(*args, **kwargs)
    with _plain():
        comes_from_meta = args[0].is_meta
    if _is_meta(target):
        if not mode.is_ours(args[0]):
            with untracked():
                return func(*args, **kwargs)
        with untracked(), _plain():
            return torch.empty_like(args[0], device=_META)
    mode.gpu.check_open()
    if comes_from_meta and not mode.is_ours(args[0]):
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")
    if "device" in kwargs:
        kwargs = {**kwargs, "device": _META}
    else:
        args = (args[0], _META, *args[2:])
    return func(*args, **kwargs)


def _type(mode: _AsCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """``tensor.type("torch.cuda.FloatTensor")``, the way of before ``.to()``."""
    if len(args) == 1 and not kwargs and mode.is_ours(args[0]):
        return func(*args).replace("torch.meta.", "torch.cuda.")
    dtype = legacy_dtype(args[1]) if len(args) > 1 else None
    if dtype is None:
        return func(*args, **kwargs)
    return _to(mode, Tensor.to, (args[0], _CUDA, dtype), {})


def _cuda(mode: _AsCuda, func: Any, args: Any, kwargs: Any) -> Any:
    index_of(kwargs.get("device", args[1] if len(args) > 1 else None))
    return _to(mode, Tensor.to, (args[0], _CUDA), {})


def _repr(mode: _AsCuda, func: Any, args: Any, kwargs: Any) -> Any:
    tensor = args[0]
    if not mode.is_ours(tensor):
        return func(*args, **kwargs)
    with _plain():
        known = mode.gpu.memory.values.known(tensor)
        if known is None and tensor.dim() == 0 and tensor.is_floating_point():
            known = torch.full((), math.nan, dtype=tensor.dtype, device="cpu")
        if known is None:
            return func(*args, **kwargs).replace("device='meta'", "device='cuda:0'")
        grad = ""
        if tensor.grad_fn is not None:
            grad = f", grad_fn=<{type(tensor.grad_fn).__name__}>"
        elif tensor.requires_grad:
            grad = ", requires_grad=True"
        return f"{repr(known)[:-1]}, device='cuda:0'{grad})"


def _format(mode: _AsCuda, func: Any, args: Any, kwargs: Any) -> Any:
    if mode.is_ours(args[0]) and args[0].dim() == 0:
        return format(args[0].item(), args[1])
    return func(*args, **kwargs)


def _hooked(mode: _AsCuda, func: Any, args: Any, kwargs: Any) -> Any:
    tensor, hook = args
    return func(tensor, _in_backward(mode, hook))


def _in_backward(mode: _AsCuda, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the program's that autograd calls; there PyTorch has put modes away."""

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if any(m is mode for m in torch.overrides._get_current_function_mode_stack()):
            return function(*args, **kwargs)
        with mode:
            return function(*args, **kwargs)

    return called


def _data_ptr(mode: _AsCuda, func: Any, args: Any, kwargs: Any) -> Any:
    if not mode.is_ours(args[0]):
        return func(*args, **kwargs)
    with _plain():
        tensor = args[0]
        if not tensor.numel():
            return 0
        offset = tensor.storage_offset() * tensor.element_size()
        return tensor.untyped_storage()._cdata + offset


def _at(mode: _AsCuda, func: Any, args: Any, kwargs: Any) -> Any:
    return func(args[0], as_indices(args[0], args[1]), *args[2:])


def _set_data(mode: _AsCuda, func: Any, args: Any, kwargs: Any) -> None:
    """``tensor.data = other``, which on CUDA may take a tensor from the host, or bring it there.

    Between the host and ``meta`` PyTorch lets nobody: their tensors are of other types
    (``VariableHooks::set_data`` in torch/csrc/autograd/variable.cpp of PyTorch 2.14).

    Raises:
        NotImplementedError: the tensor has a gradient, which would stay where it was.
    """
    tensor, other = args
    with _plain():
        if tensor.is_meta is other.is_meta:
            return func(*args, **kwargs)
        if tensor.grad is not None:
            raise NotImplementedError(
                ".data = of a tensor with a gradient, from another device: set .grad to None "
                "before, or move the module by .to()"
            )
        moved = torch.Tensor._make_subclass(type(tensor), other.detach(), tensor.requires_grad)
        vars(moved).update(vars(tensor))
        torch.utils.swap_tensors(tensor, moved)


def _record_stream(mode: _AsCuda, tensor: Tensor) -> None:
    if mode.is_ours(tensor):
        mode.gpu.memory.estimates[
            "record_stream: memory is free again at once; on a card only after the other stream "
            "is done with it"
        ] = None


def _launched(mode: _AsCuda, *args: Any, **kwargs: Any) -> None:
    """A launch of a Triton kernel: it takes no memory of PyTorch's, and is not carried out.

    It may write to any of its tensors, so what was known of them is an assumption from now on.
    Of ``triton.autotune`` it is not enough: that borrows memory, and stays refused.
    """
    mode.gpu.memory.values.may_be_written(
        [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and mode.is_ours(t)],
        "a Triton kernel",
    )


def _reduce_ex(mode: _AsCuda, func: Any, args: Any, kwargs: Any) -> Any:
    if not mode.is_ours(args[0]):
        return func(*args, **kwargs)
    host = args[0].detach().cpu().requires_grad_(args[0].requires_grad)
    return host.__reduce_ex__(*args[1:])


_HANDLERS: dict[Any, Callable[..., Any]] = {
    Tensor.device.__get__: _device,
    Tensor.__getitem__: _at,
    Tensor.__setitem__: _at,
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: _answered(True),  # type: ignore[attr-defined]
    Tensor.is_meta.__get__: _answered(False),  # type: ignore[attr-defined]
    Tensor.get_device: _answered(0),
    Tensor.to: _to,
    Tensor.cuda: _cuda,
    Tensor.type: _type,
    Tensor.__repr__: _repr,
    Tensor.__format__: _format,
    Tensor.register_hook: _hooked,
    Tensor.register_post_accumulate_grad_hook: _hooked,
    Tensor.data_ptr: _data_ptr,
    Tensor.__reduce_ex__: _reduce_ex,
    torch.device: _left_alone,
    torch._C._nn._parse_to: _left_alone,
    Tensor.pin_memory: lambda mode, func, args, kwargs: args[0],
    Tensor.is_pinned: lambda *_: False,
}


class _Generator(torch._C.Generator):
    """A generator that says it is on the card; random numbers are drawn on the host."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return _CUDA


class _Generators(type):
    def __call__(cls, device: Any = "cpu") -> Any:
        return _Generator("cpu") if _is_cuda(device) else torch._C.Generator(device)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, torch._C.Generator)


class _AnyGenerator(metaclass=_Generators):
    """``torch.Generator``, of the virtual card too."""


@contextmanager
def _patched(mode: _AsCuda) -> Iterator[None]:
    """What is no function of tensors, and so is not seen by a ``TorchFunctionMode``."""

    def autocast_of(known: Callable[..., Any]) -> Callable[..., Any]:
        # Without an argument, autocast's functions ask for CUDA's.
        def asked(*args: Any) -> Any:
            if not args or isinstance(args[0], bool):
                args = ("meta", *args)
            return known(*("meta" if _is_cuda(arg) else arg for arg in args))

        return asked

    def from_data(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **kwargs: Any) -> Any:
            if _is_meta(kwargs.get("device", torch.utils._device.CURRENT_DEVICE)):
                with untracked():
                    return make(*args, **kwargs)
            return make(*args, **kwargs)

        return made

    def load(*args: Any, **kwargs: Any) -> Any:
        where = kwargs.get("map_location", args[1] if len(args) > 1 else None)
        if where is not None and not _is_cuda(where):
            return load_others(*args, **kwargs)
        waiting: dict[int, int] = {}  # storages that belong on the card, and their bytes

        def place(storage: Any, location: str) -> Any:
            # "meta" is what a tensor of this card says where torch.save asks its storage
            if where is not None or _is_cuda(location) or location == "meta":
                waiting[storage._cdata] = storage.nbytes()
            return storage

        loaded = load_others(*args[:1], *args[2:], **{**kwargs, "map_location": place})
        if isinstance(loaded, torch.TypedStorage):  # of pickle
            if loaded._cdata not in waiting:
                return loaded
            moved = torch.UntypedStorage(waiting[loaded._cdata], device=_META)
            return torch.TypedStorage(wrap_storage=moved, dtype=loaded.dtype, _internal=True)
        found: dict[int, Tensor] = {}

        def to_card(leaf: Any) -> Any:
            if isinstance(leaf, torch.nn.Module):
                tensors = [*leaf.parameters(), *leaf.buffers()]
                own = {t.untyped_storage()._cdata: t for t in tensors}
                found.update(own)
                return leaf.to(_CUDA) if own.keys() & waiting.keys() else leaf
            if not isinstance(leaf, Tensor) or leaf.untyped_storage()._cdata not in waiting:
                return leaf
            storage = leaf.untyped_storage()  # goes there as a whole, and once
            if storage._cdata not in found:
                whole = torch.empty(0, dtype=leaf.dtype, device="cpu").set_(storage)
                found[storage._cdata] = whole.to(_CUDA)
            whole = found[storage._cdata].view(leaf.dtype)
            moved = whole.as_strided(leaf.size(), leaf.stride(), leaf.storage_offset())
            return moved.requires_grad_(leaf.requires_grad)

        on_card = tree_map(to_card, loaded)
        if missing := len(waiting.keys() - found.keys()):
            raise NotImplementedError(
                f"torch.load: {missing} tensors for the card are in objects that are no dict, "
                "list, tuple or module: load with map_location='cpu', and move them by .to()"
            )
        return on_card

    def grouped(*args: Any, **kwargs: Any) -> Any:
        groups = group_others(*args, **kwargs)
        return {
            (_CUDA if device == _META else device, dtype): group
            for (device, dtype), group in groups.items()
        }

    def scatter(
        tensor: Tensor, devices: list[int], sizes: Any = None, dim: int = 0, streams: Any = None
    ) -> list[Tensor]:
        # torch/csrc/cuda/comm.cpp of PyTorch 2.14
        parts = tensor.split(sizes, dim) if sizes else tensor.chunk(len(devices), dim)
        moved = []
        for part, stream in zip(parts, streams or [None] * len(parts), strict=True):
            with torch.cuda.stream(stream):
                moved.append(part.to(_CUDA))
        return moved

    def gather(tensors: list[Tensor], dim: int, destination: int | None = None) -> Tensor:
        size = list(tensors[0].shape)
        size[dim] = sum(tensor.size(dim) for tensor in tensors)
        result = tensors[0].new_empty(size, device="cpu" if destination == -1 else _CUDA)
        parts = result.split([tensor.size(dim) for tensor in tensors], dim)
        for part, tensor in zip(parts, tensors, strict=True):
            part.copy_(tensor)
        return result

    def compile(model: Any = None, **_: Any) -> Any:
        warnings.warn(
            "torch.compile: the virtual card runs it eagerly; compiled, peaks may be lower",
            stacklevel=2,
        )
        return model if model is not None else lambda function: function

    scripts: list[str] = []

    def script(function: Any, *args: Any, **options: Any) -> Any:
        # Its compiler reads torch's functions, and would find those that are patched here.
        if str(getattr(function, "__module__", "")).startswith("torch._decomp"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                return script_others(function, *args, **options)  # of torch.func.jvp
        if not scripts:
            scripts.append("said")
            warnings.warn(
                "torch.jit.script: the virtual card runs it eagerly; compiled, peaks may be lower",
                stacklevel=2,
            )
        return function

    def ctc_loss(log_probs: Tensor, targets: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # As where no mode looks: the lengths are read on the host ("Fast path" of ctc_loss in
        # aten/src/ATen/native/LossCTC.cpp of PyTorch 2.14).
        if mode.is_ours(log_probs):
            args = tuple(a.tolist() if isinstance(a, Tensor) else a for a in args)
            kwargs = {k: a.tolist() if isinstance(a, Tensor) else a for k, a in kwargs.items()}
        return ctc_loss_of_others(log_probs, targets, *args, **kwargs)

    def set_default_tensor_type(kind: Any) -> None:
        dtype = legacy_dtype(kind)
        if dtype is None:
            set_default_type(kind)
        else:
            torch.set_default_dtype(dtype)
            torch.set_default_device(_CUDA)

    def export(*_: object, **__: object) -> None:
        raise NotImplementedError(
            "torch.export of a model on the virtual card is not replayed: export it before .cuda()"
        )

    def entered(context: Any, device: Any) -> None:
        make_context(context, device)
        if _is_cuda(device):
            context.device = _CARD

    def within(context: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_meta(context.device):
            with untracked():
                return function_of(context, func, types, args, kwargs)
        if context.device == _CARD and func in _device_constructors():
            mode.gpu.check_open()
        return function_of(context, func, types, args, kwargs)

    def address(storage: Any) -> int:
        if storage.device.type == "meta":
            return storage._cdata if storage.nbytes() else 0
        return address_of_others(storage)

    def saved_by(hooks: Any, pack: Any, unpack: Any) -> None:
        make_hooks(hooks, _in_backward(mode, pack), _in_backward(mode, unpack))

    def storage(cls: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        if device is not None:  # which the tracker then sees initialised
            kwargs["device"] = _META if _is_cuda(device) else device
        return new_storage(cls, *args, **kwargs)

    new_storage = torch.UntypedStorage.__new__
    ctc_loss_of_others, set_default_type = torch.ctc_loss, torch.set_default_tensor_type
    make_hooks = torch.autograd.graph.saved_tensors_hooks.__init__
    apply = _in_backward(mode, torch.autograd.function.BackwardCFunction.apply)
    group_others = torch._C._group_tensors_by_device_and_dtype
    script_others = torch.jit.script
    load_others, make_context = torch.load, DeviceContext.__init__
    function_of = DeviceContext.__torch_function__
    address_of_others = torch.UntypedStorage.data_ptr
    _device_constructors()
    with ExitStack() as stack:
        for owner, name in (
            *((torch, name) for name in ("is_autocast_enabled", "set_autocast_enabled")),
            *((torch, name) for name in ("get_autocast_dtype", "set_autocast_dtype")),
            (torch._C, "_is_autocast_available"),
        ):
            stack.enter_context(mock.patch.object(owner, name, autocast_of(getattr(owner, name))))
        for name in ("tensor", "as_tensor", "asarray"):
            stack.enter_context(mock.patch.object(torch, name, from_data(getattr(torch, name))))
        patches: tuple[tuple[Any, str, Any], ...] = (
            (Tensor, "record_stream", lambda tensor, stream: _record_stream(mode, tensor)),
            (Tensor, "pin_memory", lambda tensor, device=None: tensor),
            (torch._C, "_group_tensors_by_device_and_dtype", grouped),
            (torch._C, "_scatter", scatter),
            (torch._C, "_gather", gather),
            (torch, "load", load),
            (torch, "compile", compile),
            (torch.jit, "script", script),
            (torch, "ctc_loss", ctc_loss),
            (torch.export, "export", export),
            (torch, "set_default_tensor_type", set_default_tensor_type),
            (torch, "Generator", _AnyGenerator),
            (DeviceContext, "__init__", entered),
            (DeviceContext, "__torch_function__", within),
            (torch.UntypedStorage, "data_ptr", address),
            (torch.UntypedStorage, "__new__", storage),
            (torch.autograd.graph.saved_tensors_hooks, "__init__", saved_by),
            (torch.autograd.function.BackwardCFunction, "apply", apply),
        )
        if find_spec("triton") is not None:
            jit: Any = import_module("triton.runtime.jit")
            patches += ((jit.JITFunction, "run", lambda _, *a, **k: _launched(mode, *a, **k)),)
        for owner, name, patch in patches:
            stack.enter_context(mock.patch.object(owner, name, patch))
        yield


_STARTS_PYTHON = ("python", "torchrun", "accelerate", "deepspeed")


@contextmanager
def _telling_of_processes(estimates: dict[str, None]) -> Iterator[None]:
    """Note where the program starts another one, which has no virtual card.

    Not of forks: PyTorch refuses CUDA in them, or they are a DataLoader's.
    """
    start, run = multiprocessing.process.BaseProcess.start, subprocess.Popen.__init__

    def note() -> None:
        estimates[
            f"another process, started at {program_line()}: what it puts on a card is not counted"
        ] = None

    def starting(process: Any) -> None:
        method = {"SpawnProcess": "spawn", "ForkServerProcess": "forkserver"}.get(
            type(process).__name__, multiprocessing.get_start_method()
        )
        if method != "fork":
            note()
        start(process)

    def running(process: Any, args: Any, *more: Any, **options: Any) -> None:
        first = args if isinstance(args, (str, bytes, os.PathLike)) else next(iter(args), "")
        command = os.path.basename(os.fsdecode(first)).split(" ")[0]
        if command.startswith(_STARTS_PYTHON):
            note()
        run(process, args, *more, **options)

    with (
        mock.patch.object(multiprocessing.process.BaseProcess, "start", starting),
        mock.patch.object(subprocess.Popen, "__init__", running),
    ):
        yield


def unknown_number(error: Exception, gpu: VirtualGPU) -> str | None:
    """What to do where a program makes a whole number of one that was assumed; else None."""
    assumed = [one for one in gpu.memory.values.assumptions if one.answer == "nan"]
    if not assumed or str(error) != "cannot convert float NaN to integer":
        return None
    last = assumed[-1]
    return (
        f"int() of a number that depends on weights or data ({last.operation} at {last.line}), "
        "which a virtual GPU does not have: give the script a number of its own there"
    )


@contextmanager
def as_cuda(
    card: str | None = None,
    capacity: int | None = None,
    *,
    values: Literal["assume", "refuse"] = "assume",
    alloc_conf: str = "",
    context: int | None = None,
    torch_version: str | None = None,
) -> Iterator[VirtualGPU]:
    """Let the device "cuda" be a virtual card, while the context lasts; gives the card.

    Args:
        card: such as "RTX 4090"; see `every_byte.data.cards`.
        capacity: bytes that programs can have of it; the card's if None.
        values: what happens where the program reads a value that depends on weights or
            activations; "assume" goes on, and ``gpu.memory.values.assumptions`` lists it.
        alloc_conf: as of `every_byte.gpu.VirtualGPU`.
        context: bytes that the process holds beside PyTorch's; if None, a CUDA context's on
            a card that is named (`every_byte.data.Card.context`), and nothing without one.
        torch_version: whose rules the card follows, such as "2.11"; the installed one's if None.

    Raises:
        TypeError, ValueError: an argument is wrong.
        RuntimeError: another one is under way.
        UnknownValueError: the program made a whole number of one that is not known.
    """
    if any(isinstance(m, _AsCuda) for m in torch.overrides._get_current_function_mode_stack()):
        raise RuntimeError("as_cuda() is in use already: leave it before it is entered again")
    if context is None:
        context = context_of(card) if isinstance(card, str) else 0
    gpu = VirtualGPU(
        card,
        capacity,
        values=values,
        alloc_conf=alloc_conf,
        context=context,
        torch=torch_version,
        watched=False,  # as the script is where it runs without us
    )
    gpu.pass_unseen()
    gpu.device = torch.device("cuda")
    mode = _AsCuda(gpu)
    in_thread = gpu.memory.in_thread

    @contextmanager
    def in_each_thread() -> Iterator[None]:
        with in_thread(), mode:
            yield

    with ExitStack() as stack:
        # "cuda" is the virtual card, even beside a real one.
        stack.enter_context(mock.patch.object(autocast, "has_cuda", lambda: False))
        stack.enter_context(gpu)
        stack.enter_context(cuda_names(gpu))
        stack.enter_context(_patched(mode))
        stack.enter_context(_telling_of_processes(gpu.memory.estimates))
        stack.enter_context(mock.patch.object(gpu.memory, "in_thread", in_each_thread))
        clear = "_cuda_clearCublasWorkspaces"  # Lightning calls it at the end of a training
        stack.enter_context(
            mock.patch.object(torch._C, clear, gpu.clear_cublas_workspaces, create=True)
        )
        stack.enter_context(mode)
        try:
            yield gpu
        except ValueError as error:
            if (line := unknown_number(error, gpu)) is None:
                raise
            raise UnknownValueError(line) from error
