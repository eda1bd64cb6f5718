"""The operators: schemas, fake kernels, and their implementation in eager PyTorch.

loss fills its buffers, which the caller allocates (buffers.py):
    loss   0-d, or one loss per row, whatever the reduction divides by
    grad   like logits: the gradient of the loss (for reduction "none": of the sum); or None
    saved  (1, rows) or, for softmax, (3, rows): scale, M, R, for gradient; with soft targets s, r
           of row_weights.row_scales and no third; or None
_loss_and_stats, on the CPU, has stats (4, C) in the place of saved: sums by class, see stats.py.
Where a device has no kernel, the eager implementation fills them. Kernels: backends.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import caller, reference
from .inputs import Inputs, is_soft
from .options import REDUCTIONS, Formula
from .values import check_target, check_values

_CALL = (
    "Tensor logits, Tensor target, Tensor? weight, Tensor? sample_weight, Tensor? normalizer, "
    "Tensor? logit_bias, Tensor? margin, Tensor? pos_weight, float[] formula, int? ignore_index, "
    "int? background_index, int reduction, Tensor(a!) loss"
)
_LOSS = f"({_CALL}, Tensor(b!)? grad, Tensor(c!)? saved) -> ()"
_GRADIENT = (
    "(Tensor logits, Tensor target, Tensor? weight, Tensor? logit_bias, Tensor? margin, "
    "Tensor? pos_weight, Tensor saved, Tensor grad_loss, float[] formula, int? ignore_index, "
    "int? background_index, Tensor(a!) grad) -> ()"
)
OVERLOADS = ("default", "triton", "cuda", "reference")  # default: what the device has
# A copy of the package under another name has operators of its own.
NAMESPACE = re.sub(r"\W", "_", __package__ or "cbloss_fused")
library = torch.library.Library(NAMESPACE, "DEF")
operators = getattr(torch.ops, NAMESPACE)
_names = [
    f"{name}.{o}".removesuffix(".default") for name in ("loss", "gradient") for o in OVERLOADS
]
for _name in _names:
    library.define(_name + (_LOSS if _name.startswith("loss") else _GRADIENT))
library.define(f"_loss_and_stats({_CALL}, Tensor(b!) grad, Tensor(c!) stats) -> ()")
library.define("_scale(Tensor(a!) grad, Tensor grad_loss, int numel) -> ()")

# autograd.py differentiates: below it the dispatcher need not look for gradients again. They only
# write: nothing to fake.
for _name in ("_loss_and_stats", *_names):
    library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    library.impl(_name, torch.library.fallthrough_kernel, "ADInplaceOrView")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", lambda *_: None, lib=library)

why_eager: dict[str, str] = {}  # device types that fall back to eager PyTorch, and why
_warned = False


def overloads(name: str) -> tuple[Any, Any]:
    """loss and gradient."""
    return getattr(operators.loss, name), getattr(operators.gradient, name)


def eager_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
    logit_bias: Tensor | None,
    margin: Tensor | None,
    pos_weight: Tensor | None,
    formula: Sequence[float],
    ignore_index: int | None,
    background_index: int | None,
    reduction: int,
    loss: Tensor,
    grad: Tensor | None,
    saved: Tensor | None,
) -> None:
    """The operator loss."""
    _warn_once(logits.device.type)
    f = Formula.of_numbers(formula)
    inputs = Inputs(
        target, weight, sample_weight, normalizer, logit_bias, margin, pos_weight
    )  # fmt: skip
    if logits.device.type == "cpu":  # here, where the message can name target's own index
        if not is_soft(target):
            check_target(target, logits.shape[1], ignore_index, background_index)
        check_values(logits, inputs, f, ignore_index)
    inputs = inputs.by_row(logits)
    marks = ignore_index, background_index
    L, gradient, s, r = reference.loss_and_grad(logits, inputs, f, *marks, REDUCTIONS[reduction])
    loss.copy_(L.reshape(loss.shape) if loss.dim() else L.sum())
    if grad is not None:
        grad.copy_(gradient)
    if saved is not None:
        saved.zero_()[0].copy_(s.flatten())
        if not f.sigmoid and is_soft(target):
            saved[1].copy_(r.flatten())
        elif not f.sigmoid:
            M, R = reference.max_and_sum(logits, inputs, r < 0, f.logit_scale)
            saved[1].copy_(M.flatten())
            saved[2].copy_(R.flatten())


def eager_gradient(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    logit_bias: Tensor | None,
    margin: Tensor | None,
    pos_weight: Tensor | None,
    saved: Tensor,
    grad_loss: Tensor,
    formula: Sequence[float],
    ignore_index: int | None,
    background_index: int | None,
    grad: Tensor,
) -> None:
    """The operator gradient."""
    inputs = Inputs(
        target, weight, logit_bias=logit_bias, margin=margin, pos_weight=pos_weight
    ).by_row(logits)
    rows = logits.shape[:1] + logits.shape[2:]
    incoming = grad_loss.reshape(rows) if grad_loss.dim() else grad_loss
    f = Formula.of_numbers(formula)
    s, r = saved[0], saved[1 if is_soft(target) and not f.sigmoid else 0]
    scales = s.reshape(rows), r.reshape(rows), incoming
    sums = None
    if len(saved) == 3 and not is_soft(target):
        sums = saved[1].reshape(rows), saved[2].reshape(rows)
    marks = ignore_index, background_index
    grad.copy_(reference.gradient(logits, inputs, *scales, f, *marks, sums))


for _name in _names:
    if _name in ("loss", "gradient") or _name.endswith(".reference"):
        _eager = eager_loss if _name.startswith("loss") else eager_gradient
        library.impl(_name, _eager, "CompositeExplicitAutograd")


def _warn_once(device_type: str) -> None:
    global _warned
    why = why_eager.get(device_type)
    if why is not None and not _warned:
        _warned = True
        caller.warn(f"cbloss_fused runs in eager PyTorch, not in its fused kernels: {why}")
