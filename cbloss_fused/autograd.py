"""The torch.autograd.Functions: the gradient stored by the forward, or recomputed by the backward.

At small batches the host time of a call is what counts. So: old style (no setup_context), which
costs half; and what is not differentiated in one tuple, since autograd looks at every argument.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import ops
from .spec import Spec

Rows = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""target, weight, sample_weight, normalizer"""


class StoredGradient(torch.autograd.Function):
    """One read of the logits and one write of the gradient, in the forward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Rows, spec: Spec) -> Tensor:
        inplace = spec.inplace
        grad = logits.detach() if inplace else ops.new_grad(logits)
        loss = ops.new_loss(logits, rows[0], spec.reduction)
        ops.losses[spec.backend](logits, *rows, *spec[:6], loss, grad, None)
        if inplace:  # whoever saved the logits raises in its backward
            torch.autograd.graph.increment_version(logits)
        ctx.save_for_backward(grad)
        ctx.inplace = inplace
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            _refuse_double_backward()
        (grad,) = ctx.saved_tensors
        if is_compiling():
            grad = ops.scaled(grad, grad_loss)
        elif grad_loss.is_cpu:  # where looking costs nothing
            if grad_loss.item() != 1:
                grad = grad * grad_loss
        else:
            grad = ops.scale_stored(grad, grad_loss, not ctx.inplace)
        return grad, None, None


class RecomputedGradient(torch.autograd.Function):
    """The forward keeps three numbers a row; the backward reads the logits again.

    For float16, where a gradient divided by N underflows before a loss scaler multiplies it, and
    for a vector of losses, whose incoming gradients would cost a pass over a stored one.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Rows, spec: Spec) -> Tensor:
        target = rows[0]
        saved = ops.new_saved(logits, target, spec.sigmoid)
        loss = ops.new_loss(logits, target, spec.reduction)
        ops.losses[spec.backend](logits, *rows, *spec[:6], loss, None, saved)
        ctx.save_for_backward(logits, target, saved)
        ctx.spec = spec
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            _refuse_double_backward()
        logits, target, saved = ctx.saved_tensors
        grad = logits.detach() if ctx.spec.inplace else ops.new_grad(logits)
        run = ops.gradients[ctx.spec.backend]
        run(logits, target, saved, grad_loss.contiguous(), *ctx.spec[:4], grad)
        if ctx.spec.inplace:
            torch.autograd.graph.increment_version(logits)
        return grad, None, None


def stored_gradient(logits: Tensor, rows: Rows, spec: Spec) -> Tensor:
    """The loss, its gradient computed along with it."""
    if is_compiling():
        return StoredGradient.apply(logits, rows, spec)  # type: ignore[no-untyped-call]
    return _apply_stored(logits, rows, spec)


def recomputed_gradient(logits: Tensor, rows: Rows, spec: Spec) -> Tensor:
    """The loss, its gradient left to the backward."""
    return RecomputedGradient.apply(logits, rows, spec)  # type: ignore[no-untyped-call]


# Function.apply without its Python wrapper, 3 us that look for functorch: spec.py has looked.
_apply_stored: Any = super(torch.autograd.Function, StoredGradient).apply


def _refuse_double_backward() -> None:
    if not is_compiling():
        raise RuntimeError(
            "the fused kernels have no second derivative (create_graph=True); "
            "backend='reference' has"
        )
