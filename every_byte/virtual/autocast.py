"""CUDA's autocast and gradient scaling, replayed on PyTorch's ``meta`` device.

PyTorch refuses ``torch.autocast("meta")``, and its autocast leaves meta tensors
alone. `cuda_autocast` does to them what CUDA's does: each operator of its lists has
a kernel at an autocast key of the dispatcher, before autograd, that casts what the
operator is given. So operators are also reached that composite ones such as
``cross_entropy_loss`` call from C++. The key is that of Graphcore's IPU, which
PyTorch has and does nothing with; its default dtype is FP16, as CUDA's.

Source: ``aten/src/ATen/autocast_mode.h`` and ``autocast_mode.cpp``. Not replayed:
``_cudnn_rnn`` (meta has no cuDNN), ``linalg_matrix_sqrth``, and named tensors.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache, partial, wraps
from typing import Any
from unittest import mock

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

_STAND_IN, _KEY_NAME = "ipu", "AutocastIPU"
_KEY = getattr(torch._C.DispatchKey, _KEY_NAME)

POLICIES: dict[str, tuple[str, ...]] = {
    "lower_precision_fp": (
        *"_convolution _convolution.deprecated conv1d conv2d conv3d conv_tbc".split(),
        *"conv_transpose1d conv_transpose2d.input conv_transpose3d.input convolution".split(),
        *"cudnn_convolution cudnn_convolution_transpose prelu addmm addmv addr matmul".split(),
        *"einsum mm mv linalg_vecdot linear addbmm baddbmm bmm chain_matmul".split(),
        *"linalg_multi_dot _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell".split(),
        *"gru_cell rnn_tanh_cell rnn_relu_cell _scaled_dot_product_flash_attention".split(),
        "scaled_dot_product_attention",
    ),
    "fp32": (
        *"acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh".split(),
        *"tan pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar softplus layer_norm".split(),
        *"native_layer_norm rms_norm group_norm frobenius_norm.dim nuclear_norm".split(),
        *"nuclear_norm.dim cosine_similarity poisson_nll_loss cosine_embedding_loss".split(),
        *"nll_loss nll_loss2d hinge_embedding_loss kl_div l1_loss smooth_l1_loss".split(),
        *"huber_loss mse_loss margin_ranking_loss multilabel_margin_loss".split(),
        *"soft_margin_loss triplet_margin_loss multi_margin_loss".split(),
        *"binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp".split(),
        *"upsample_nearest1d upsample_nearest2d upsample_nearest3d".split(),
        *(f"_upsample_nearest_exact{n}d" for n in (1, 2, 3)),
        *"upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d".split(),
        *"_upsample_bilinear2d_aa _upsample_bicubic2d_aa".split(),
    ),
    "fp32_set_opt_dtype": (
        *"prod prod.dim_int softmax.int log_softmax.int cumprod cumsum".split(),
        *"linalg_vector_norm linalg_matrix_norm linalg_matrix_norm.str_ord".split(),
        *"sum sum.dim_IntList".split(),
    ),
    "fp32_append_dtype": ("norm.Scalar", "norm.ScalarOpt_dim"),
    "promote": (
        *"addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put".split(),
        *"tensordot scatter_add".split(),
    ),
    "banned": ("binary_cross_entropy",),
}
"""Operators by what CUDA's autocast does to them, under PyTorch's names for both.

``lower_precision_fp``: casts what they are given to autocast's dtype. ``fp32``: to
FP32. ``fp32_set_opt_dtype``, ``fp32_append_dtype``: asks for a result in FP32.
``promote``: casts to the widest dtype among what they are given. ``banned``: refuses.
All other operators run in the dtypes that they are given."""

_casts = WeakTensorKeyDictionary()  # a parameter: its cast, until the outermost context ends


def _eligible(value: object) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.is_meta
        and value.is_floating_point()
        and value.dtype is not torch.float64
    )


def _cached_cast(dtype: torch.dtype, value: Any) -> Any:
    """A tensor, or a list of them, in `dtype`; casts of parameters are kept for reuse."""
    if isinstance(value, (list, tuple)):
        return [_cached_cast(dtype, each) for each in value]
    if not _eligible(value) or value.dtype is dtype:
        return value
    if not (
        torch.is_autocast_cache_enabled()
        and dtype is torch.get_autocast_dtype("meta")
        and value.dtype is torch.float32
        and value.requires_grad
        and value.is_leaf
        and not value._is_view()
    ):
        return value.to(dtype)
    if value not in _casts:
        _casts[value] = value.to(dtype)
    return _casts[value]


# The policies: each calls an operator with the arguments that autocast gives it.


def _run_in(dtype: torch.dtype, operator: Any, args: Any, kwargs: Any) -> Any:
    # From the last to the first: PyTorch's C++ compiler evaluates arguments so.
    cast = [_cached_cast(dtype, value) for value in reversed(args)]
    return operator(*reversed(cast), **kwargs)


def _lower_precision_fp(operator: Any, args: Any, kwargs: Any) -> Any:
    return _run_in(torch.get_autocast_dtype("meta"), operator, args, kwargs)


def _fp32(operator: Any, args: Any, kwargs: Any) -> Any:
    return _run_in(torch.float32, operator, args, kwargs)


def _fp32_set_opt_dtype(operator: Any, args: Any, kwargs: Any) -> Any:
    names = (argument.name for argument in operator._schema.arguments)
    given = dict(zip(names, args, strict=False)) | kwargs
    if not _eligible(args[0]):
        return operator(**given)
    given["dtype"] = given.get("dtype") or torch.float32
    softmax = {"aten::softmax": "_softmax", "aten::log_softmax": "_log_softmax"}
    name = softmax.get(operator._schema.name)
    if name and (args[0].dtype, given["dtype"]) == (torch.float16, torch.float32):
        # CUDA's reads FP16 and writes FP32 (aten/src/ATen/native/SoftMax.cpp): the
        # input is not cast before.
        return getattr(torch.ops.aten, name)(args[0], given["dim"], True)
    return operator(**given)


def _fp32_append_dtype(operator: Any, args: Any, kwargs: Any) -> Any:
    arguments = operator._schema.arguments
    given = {a.name: a.default_value for a in arguments if a.has_default_value()}
    given |= dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
    dtype = torch.float32 if _eligible(args[0]) else args[0].dtype
    overload = "ScalarOpt_dim_dtype" if "dim" in given else "ScalarOpt_dtype"
    return getattr(operator.overloadpacket, overload)(**given, dtype=dtype)


def _promote(operator: Any, args: Any, kwargs: Any) -> Any:
    widest = torch.get_autocast_dtype("meta")
    for value in filter(_eligible, tree_leaves(args)):
        if torch.float32 in (widest, value.dtype):
            widest = torch.float32
        elif value.dtype is not widest:
            raise RuntimeError("Unexpected floating ScalarType in at::autocast::prioritize")
    return _run_in(widest, operator, args, kwargs)


def _banned(operator: Any, args: Any, kwargs: Any) -> Any:
    raise RuntimeError(
        "torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast: "
        "leave out the sigmoid, and take binary_cross_entropy_with_logits or BCEWithLogitsLoss"
    )


OF_TORCHVISION = ("nms", "deform_conv2d", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool")
"""Its operators that cast to FP32, and their results back (``torchvision/csrc/ops/autocast/``)."""


def _of_torchvision(name: str, *args: Any, **kwargs: Any) -> Any:
    operator = getattr(torch.ops.torchvision, name).default
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_KEY)):
        result = _fp32(operator, args, kwargs)
    return result if name == "nms" else tree_map(lambda made: made.to(args[0].dtype), result)


_KERNELS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "lower_precision_fp": _lower_precision_fp,
    "fp32": _fp32,
    "fp32_set_opt_dtype": _fp32_set_opt_dtype,
    "fp32_append_dtype": _fp32_append_dtype,
    "promote": _promote,
    "banned": _banned,
}


def _without_autocast(kernel: Any, operator: Any, *args: Any, **kwargs: Any) -> Any:
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_KEY)):
        return kernel(operator, args, kwargs)


@cache
def _register() -> tuple[torch.library.Library, ...]:
    """Register the kernels, once; they hold while the returned objects live."""
    names = ("_", "aten", "torchvision")
    every, aten, vision = (torch.library.Library(name, "IMPL", _KEY_NAME) for name in names)
    every.fallback(torch.library.fallthrough_kernel)
    for policy, operators in POLICIES.items():
        for name in operators:
            # Versions of PyTorch differ by some operators: the one installed knows which.
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCUDA"):
                packet, _, overload = name.partition(".")
                operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
                aten.impl(name, partial(_without_autocast, _KERNELS[policy], operator))
    for name in OF_TORCHVISION:
        vision.impl(name, partial(_of_torchvision, name))
    return every, aten, vision


def has_cuda() -> bool:
    """Whether "cuda" is a real device beside the virtual GPU; not within ``as_cuda``."""
    return torch.cuda.is_available()


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Let ``torch.autocast("meta")`` and ``GradScaler("meta")`` do as CUDA's do.

    Asked for "cuda", where there is none, they do so, too: they would switch themselves off.
    Casts of parameters are cached as there. A scaled optimizer step takes the branch
    in which no gradient is infinite, since meta tensors have no values to look at.
    """
    _register()

    def asked_of_the_stand_in(known: Callable[..., Any]) -> Callable[..., Any]:
        # "cuda" only where asked for by name or by default: there is none beside this GPU.
        names = ("meta",) if has_cuda() else ("meta", "cuda")
        default = ("cuda",)  # of is_autocast_enabled
        return lambda *args: known(*(_STAND_IN if arg in names else arg for arg in args or default))

    def made_for_this_gpu(init: Callable[..., None], what: str, name: str) -> Callable[..., None]:
        @wraps(init)
        def initialized(made: Any, *args: Any, **kwargs: Any) -> None:
            kind = args[0] if args else kwargs.pop(name, "cuda")
            if kind == "cuda":
                if has_cuda():
                    raise RuntimeError(
                        f'{what}("cuda") is of the CUDA device, but a virtual GPU is in use: '
                        f"say {what}(gpu.device.type), or close() the virtual one"
                    )
                kind = "meta"
            init(made, kind, *args[1:], **kwargs)

        return initialized

    def clear_cache() -> None:
        _casts.clear()
        clear_others()

    def step(scaler: Any, optimizer: Any, state: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if all(found_inf.is_meta for found_inf in state["found_inf_per_device"].values()):
            return optimizer.step(*args, **kwargs)
        return step_others(scaler, optimizer, state, *args, **kwargs)

    clear_others, step_others = torch.clear_autocast_cache, torch.amp.GradScaler._maybe_opt_step
    with ExitStack() as stack:
        for module, name in (
            (torch, "is_autocast_enabled"),
            (torch, "set_autocast_enabled"),
            (torch, "get_autocast_dtype"),
            (torch, "set_autocast_dtype"),
            (torch._C, "_is_autocast_available"),
        ):
            replaced = asked_of_the_stand_in(getattr(module, name))
            stack.enter_context(mock.patch.object(module, name, replaced))
        for made, name in ((torch.autocast, "device_type"), (torch.amp.GradScaler, "device")):
            init = made_for_this_gpu(made.__init__, made.__name__, name)
            stack.enter_context(mock.patch.object(made, "__init__", init))
        stack.enter_context(mock.patch.object(torch, "clear_autocast_cache", clear_cache))
        stack.enter_context(mock.patch.object(torch.amp.GradScaler, "_maybe_opt_step", step))
        yield


def autocast_key() -> AbstractContextManager[None]:
    """Let this thread's operations on meta tensors come to autocast's kernels."""
    guard: AbstractContextManager[None] = torch._C._IncludeDispatchKeyGuard(_KEY)
    return guard
