"""What would save a program memory: one thing changed at a time, and the program run again.

`noticing` sees which changes could apply to a program while it runs; `LEVERS` has what each one
changes; `try_levers` runs the program again in processes of their own, and compares.
"""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader

from every_byte.report import Report, Saving

_FUSABLE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)


@dataclass(frozen=True)
class Lever:
    """A change to a program that may save memory.

    Attributes:
        change: what to write in the program; {} stands for what was noticed of it.
        applied: while the context lasts, the program runs with the change.
        alloc_conf: a setting of the allocator.
    """

    change: str
    applied: Callable[[], AbstractContextManager[None]] = nullcontext
    alloc_conf: str = ""


# fused: one kernel for all parameters, and no copies of them


@contextmanager
def _fused() -> Iterator[None]:
    with ExitStack() as stack:
        for kind in _FUSABLE:
            make = kind.__init__

            def made(optimizer: Any, *args: Any, make: Any = make, **kwargs: Any) -> None:
                make(optimizer, *args, **{**kwargs, "foreach": None, "fused": True})

            stack.enter_context(mock.patch.object(kind, "__init__", made))
        yield


def _could_be_fused(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer) in _FUSABLE and not any(
        group.get("fused") or group.get("differentiable") for group in optimizer.param_groups
    )


# set-to-none: gradients are freed by zero_grad(), and not filled with zeros


def _zeroing(changed: Callable[[bool], bool]) -> AbstractContextManager[None]:
    @contextmanager
    def patched() -> Iterator[None]:
        with ExitStack() as stack:
            for kind in (torch.optim.Optimizer, torch.nn.Module):
                zero = kind.zero_grad

                def zero_grad(self: Any, set_to_none: bool = True, zero: Any = zero) -> None:
                    zero(self, set_to_none=changed(set_to_none))

                stack.enter_context(mock.patch.object(kind, "zero_grad", zero_grad))
            yield

    return patched()


def _set_to_none() -> AbstractContextManager[None]:
    return _zeroing(lambda _: True)


# half-batch


def _batches(changed: Callable[[int], int]) -> AbstractContextManager[None]:
    make = DataLoader.__init__

    def made(loader: Any, dataset: Any, batch_size: Any = 1, *args: Any, **kwargs: Any) -> None:
        # accelerate makes a loader from another, whose size is changed already
        again = sys._getframe(1).f_globals.get("__name__", "").startswith("accelerate.")
        if type(batch_size) is int and not again:
            batch_size = changed(batch_size)
        make(loader, dataset, batch_size, *args, **kwargs)

    patched: Any = mock.patch.object(DataLoader, "__init__", made)
    return patched


def _half_batch() -> AbstractContextManager[None]:
    return _batches(lambda size: max(1, size // 2))


# Of models of transformers


def _on_models(see: Callable[[Any], None]) -> AbstractContextManager[None]:
    """Show each model of transformers before its forward, the outermost first."""

    @contextmanager
    def hooked() -> Iterator[None]:
        def hook(module: torch.nn.Module, _: object) -> None:
            utils = sys.modules.get("transformers.modeling_utils")
            if utils is not None and isinstance(module, utils.PreTrainedModel):
                see(module)

        handle = register_module_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    return hooked()


# its names from transformers 5.23 on, and before
_CHECKPOINTS, _CHECKPOINTED = "is_activation_checkpointing", "is_gradient_checkpointing"
_CHECKPOINT, _CHECKPOINT_BEFORE = "activation_checkpointing_enable", "gradient_checkpointing_enable"


def _could_be_checkpointed(model: Any) -> bool:
    return bool(
        model.training
        and torch.is_grad_enabled()
        and model.supports_gradient_checkpointing
        and not getattr(model, _CHECKPOINTS if hasattr(model, _CHECKPOINTS) else _CHECKPOINTED)
    )


def _checkpointing() -> AbstractContextManager[None]:
    def enable(model: Any) -> None:
        if _could_be_checkpointed(model):
            enable = _CHECKPOINT if hasattr(model, _CHECKPOINT) else _CHECKPOINT_BEFORE
            getattr(model, enable)()

    return _on_models(enable)


def _is_eager(model: Any) -> bool:
    return getattr(model.config, "_attn_implementation", None) == "eager"


def _sdpa() -> AbstractContextManager[None]:
    def change(model: Any) -> None:
        if _is_eager(model):
            model.set_attn_implementation("sdpa")

    return _on_models(change)


LEVERS = {
    "fused": Lever("{}(..., fused=True)", _fused),
    "set-to-none": Lever("zero_grad(set_to_none=True), which is the default", _set_to_none),
    "checkpointing": Lever("{}.gradient_checkpointing_enable(): it computes more", _checkpointing),
    "half-batch": Lever("DataLoader(..., batch_size={}): twice as many steps", _half_batch),
    "sdpa": Lever('attn_implementation="sdpa" instead of "eager"', _sdpa),
    "no-grad": Lever("with torch.no_grad(): nothing here asks for gradients", torch.no_grad),
    "expandable-segments": Lever(
        "PYTORCH_ALLOC_CONF=expandable_segments:True in the environment",
        alloc_conf="expandable_segments:True",
    ),
}
"""By their names for ``every-byte run --lever``."""


@contextmanager
def noticing() -> Iterator[dict[str, str]]:
    """Notice what could be changed in the program that runs meanwhile.

    Yields:
        Names of `LEVERS`: what the {} of its `change` stands for. It is complete at the end.
    """
    noticed: dict[str, str] = {"expandable-segments": ""}
    seen = {"gradients": False, "needless": False}

    def zeroed(set_to_none: bool) -> bool:
        if not set_to_none:
            noticed["set-to-none"] = ""
        return set_to_none

    def loaded(size: int) -> int:
        if size > 1:
            half = f"{size // 2}"
            sizes = noticed.get("half-batch")
            noticed["half-batch"] = half if sizes in (None, half) else "half of it"
        return size

    def stepping(optimizer: torch.optim.Optimizer, *_: object) -> None:
        seen["gradients"] = True
        if _could_be_fused(optimizer):
            noticed["fused"] = type(optimizer).__name__

    def forward(module: torch.nn.Module, _: object) -> None:
        if not seen["needless"] and torch.is_grad_enabled():
            seen["needless"] = any(p.requires_grad for p in module.parameters(recurse=False))

    def look(model: Any) -> None:
        if _could_be_checkpointed(model):
            noticed.setdefault("checkpointing", "model")
        if _is_eager(model):
            noticed["sdpa"] = ""

    def asked(function: Callable[..., Any]) -> Callable[..., Any]:
        def asking(*args: Any, **kwargs: Any) -> Any:
            seen["gradients"] = True
            return function(*args, **kwargs)

        return asking

    with ExitStack() as stack:
        stack.enter_context(_zeroing(zeroed))
        stack.enter_context(_batches(loaded))
        stack.enter_context(_on_models(look))
        stack.callback(register_module_forward_pre_hook(forward).remove)
        stack.callback(register_optimizer_step_pre_hook(stepping).remove)
        for name in ("backward", "grad"):
            of = asked(getattr(torch.autograd, name))
            stack.enter_context(mock.patch.object(torch.autograd, name, of))
        yield noticed
    if seen["needless"] and not seen["gradients"]:
        noticed["no-grad"] = ""
    if not seen["gradients"]:
        noticed.pop("checkpointing", None)


@contextmanager
def applied(names: list[str]) -> Iterator[None]:
    """Run with changes of `LEVERS`."""
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(LEVERS[name].applied())
        yield


def again(arguments: list[str], where: Path, environment: dict[str, str]) -> dict[str, Any] | None:
    """What ``every-byte run`` says in a process of its own; None if the script failed there."""
    code = [sys.executable, "-P", "-m", "every_byte", *arguments]
    env = _found_again(environment)
    done = subprocess.run(code, capture_output=True, check=False, cwd=where, env=env)
    try:
        told = dict(json.loads(done.stdout))
    except ValueError:
        return None
    return None if told["failed"] else told


def try_levers(
    report: Report,
    noticed: dict[str, str],
    arguments: Callable[[list[str]], list[str]],
    where: Path,
    environment: dict[str, str],
    say: Callable[[str], None],
) -> Report:
    """The report, with what each lever saves: the program runs again for each of them.

    A program that does not fit runs once more without a bound, to be compared with. Ctrl-C
    ends it, with what was found until then.

    Args:
        report: of the program as it is.
        noticed: see `noticing`.
        arguments: of ``every-byte run``, with some more.
        where, environment: the folder and the environment that the program was started in.
        say: is told of progress.
    """

    def run_again(*more: str) -> dict[str, Any] | None:
        return again(arguments([*more, "--json"]), where, environment)

    savings: list[Saving] = []
    useless: list[str] = []
    base: tuple[int, int] | None = (report.peak, report.reserved)
    try:
        if not report.fits:
            say("every-byte run: once more without a bound")
            told = run_again("--unbounded")
            base = (told["peak"], told["reserved"]) if told and told["fits"] else None
            if base is not None:
                report = replace(report, needed_allocated=base[0], needed=base[1])
        for number, name in enumerate(noticed, 1):
            say(f"every-byte run: once more with {name} ({number} of {len(noticed)})")
            told = run_again("--lever", name)
            if told is None:
                say(f"every-byte run: with {name} the script ended early; it is left out")
                continue
            saved = saved_reserved = None
            if base is not None and told["fits"]:
                saved, saved_reserved = base[0] - told["peak"], base[1] - told["reserved"]
            change = LEVERS[name].change.format(noticed[name])
            saving = Saving(
                name, change, told["fits"], told["peak"], told["reserved"], saved, saved_reserved
            )
            if report.fits and max(saved or 0, saved_reserved or 0) <= 0:
                useless.append(name)
            else:
                savings.append(saving)
    except KeyboardInterrupt:
        say("every-byte run: interrupted; the rest was not tried")
    savings.sort(key=lambda s: (not s.fits, -(s.saved_reserved or 0), -(s.saved or 0)))
    return replace(report, levers=savings, useless=useless)


def _found_again(environment: dict[str, str]) -> dict[str, str]:
    """The environment, in which Python finds this package, too."""
    root = str(Path(__file__).resolve().parent.parent)
    if root in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        return environment
    paths = [root, environment.get("PYTHONPATH", "")]
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
