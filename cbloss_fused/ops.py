"""The operators: schemas, fake kernels, loading of the compiled library, backends().

loss fills its buffers, which the caller allocates:
    loss   0-d, or for reduction "none" like target
    grad   like logits: the gradient of the loss (for reduction "none": of the sum); or None
    saved  (1, rows) or, for softmax, (3, rows): scale, M, R, for gradient; or None
Where a device has no kernel, the reference computes both.
"""

from __future__ import annotations

import importlib
import platform
import warnings
from pathlib import Path

import torch
from torch import Tensor

from . import reference
from .reference import compute_dtype
from .spec import ACTIVATIONS, REDUCTIONS, check_values

_library = torch.library.Library("cbloss_fused", "DEF")
_library.define(
    "loss(Tensor logits, Tensor target, Tensor? weight, Tensor? sample_weight, Tensor? normalizer, "
    "bool sigmoid, float gamma, float label_smoothing, int? ignore_index, int reduction, "
    "Tensor(a!) loss, Tensor(b!)? grad, Tensor(c!)? saved) -> ()"
)
_library.define(
    "gradient(Tensor logits, Tensor target, Tensor saved, Tensor grad_loss, "
    "bool sigmoid, float gamma, float label_smoothing, Tensor(a!) grad) -> ()"
)
_library.define("_set_isa(str name) -> str")


def _load() -> str | None:
    """Load the compiled operators; the reason in one line if there are none."""
    try:
        importlib.import_module("cbloss_fused._C")
    except ImportError as error:
        note = Path(__file__).parent / "_build_note.txt"
        if note.exists():
            return note.read_text().strip()
        return f"the compiled extension cannot be loaded ({error}); reinstall cbloss_fused"
    return None


missing = _load()
_warned = False


def new_loss(logits: Tensor, target: Tensor, reduction: int) -> Tensor:
    """The buffer for the loss: one a row for reduction "none"."""
    shape = () if reduction else target.shape
    return logits.new_empty(shape, dtype=compute_dtype(logits.dtype))


def new_saved(logits: Tensor, target: Tensor, sigmoid: bool) -> Tensor:
    """The buffer that a forward leaves for a recomputing backward."""
    shape = (1 if sigmoid else 3, target.numel())
    return logits.new_empty(shape, dtype=compute_dtype(logits.dtype))


def _rows_of(logits: Tensor, target: Tensor) -> Tensor:
    """The target in the shape of the rows of (N, C) or (N, C, K) logits."""
    return target.reshape(logits.shape[:1] + logits.shape[2:])


def _loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
    sigmoid: bool,
    gamma: float,
    label_smoothing: float,
    ignore_index: int | None,
    reduction: int,
    loss: Tensor,
    grad: Tensor | None,
    saved: Tensor | None,
) -> None:
    _warn_once()
    if logits.device.type == "cpu":  # here, where the message can name target's own index
        reference.check_target(target, logits.shape[1], ignore_index)
        check_values(weight, sample_weight, normalizer)
    L, gradient, scale = reference.loss_and_grad(
        logits,
        _rows_of(logits, target),
        weight,
        None if sample_weight is None else _rows_of(logits, sample_weight),
        normalizer,
        activation=ACTIVATIONS[sigmoid],
        gamma=gamma,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=REDUCTIONS[reduction],
    )
    loss.copy_(L.reshape(loss.shape))
    if grad is not None:
        grad.copy_(gradient)
    if saved is not None:  # M and R only save the kernels a pass: the reference has no use for them
        saved.zero_()[0].copy_(scale.flatten())


def _gradient(
    logits: Tensor,
    target: Tensor,
    saved: Tensor,
    grad_loss: Tensor,
    sigmoid: bool,
    gamma: float,
    label_smoothing: float,
    grad: Tensor,
) -> None:
    y = _rows_of(logits, target)
    grad.copy_(
        reference.gradient(
            logits,
            y,
            saved[0].reshape(y.shape),
            _rows_of(logits, grad_loss) if grad_loss.dim() else grad_loss,
            activation=ACTIVATIONS[sigmoid],
            gamma=gamma,
            label_smoothing=label_smoothing,
        )
    )


# autograd.py differentiates: below it the dispatcher need not look for gradients again.
for _name in ("loss", "gradient"):
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    _library.impl(_name, torch.library.fallthrough_kernel, "ADInplaceOrView")
_library.impl("loss", _loss, "CompositeExplicitAutograd")
_library.impl("gradient", _gradient, "CompositeExplicitAutograd")


for _name in ("loss", "gradient"):  # they only write: nothing to fake
    torch.library.register_fake(f"cbloss_fused::{_name}", lambda *_: None, lib=_library)

loss = torch.ops.cbloss_fused.loss.default
gradient = torch.ops.cbloss_fused.gradient.default


def _warn_once() -> None:
    global _warned
    if missing is not None and not _warned:
        _warned = True
        warnings.warn(
            f"cbloss_fused runs in eager PyTorch, not in its fused kernels: {missing}", stacklevel=3
        )


def backends() -> dict[str, str]:
    """What each device type gets here, and why.

    Returns:
        One line for "cpu" and one for every other device: the kernels, the instruction set that was
        chosen, or the reason why the reference serves.

    >>> sorted(backends())
    ['cpu', 'other']
    """
    if missing is None:
        isa = torch.ops.cbloss_fused._set_isa("").split()[0]
        cpu = f"fused C++ kernels, {isa} code chosen for this {platform.machine()}"
    else:
        cpu = f"reference: {missing}"
    return {"cpu": cpu, "other": "reference: no kernels for other devices in this version"}
