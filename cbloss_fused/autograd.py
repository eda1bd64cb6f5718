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
from .call import Inputs
from .spec import Spec


class StoredGradient(torch.autograd.Function):
    """One read of the logits and one write of the gradient, in the forward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, inputs: Inputs, spec: Spec) -> Tensor:
        inplace = spec.inplace
        grad = logits.detach() if inplace else ops.new_grad(logits)
        loss = ops.new_loss(logits, inputs.target, spec.reduction)
        ops.run_loss(logits, inputs, spec, loss, grad, None)
        if inplace:  # whoever saved the logits raises in its backward
            torch.autograd.graph.increment_version(logits)
        ctx.save_for_backward(grad)
        ctx.inplace = inplace
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        return _scaled_stored(ctx, grad_loss), None, None


class StoredGradientAndStats(torch.autograd.Function):
    """StoredGradient, and (4, C) statistics of the classes."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, inputs: Inputs, spec: Spec) -> tuple[Tensor, Tensor]:
        grad = ops.new_grad(logits)
        loss, stats = ops.run_loss_and_stats(logits, inputs, spec, grad)
        ctx.save_for_backward(grad)
        ctx.inplace = False
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)  # no zeros for stats
        return loss, stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return _scaled_stored(ctx, grad_loss), None, None


class RecomputedGradient(torch.autograd.Function):
    """The forward keeps three numbers per row; the backward reads the logits again.

    For float16, where a gradient divided by N underflows before a loss scaler multiplies it, and
    for a vector of losses, whose incoming gradients would cost a pass over a stored one.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, inputs: Inputs, spec: Spec) -> Tensor:
        saved = ops.new_saved(logits, spec.formula.sigmoid)
        loss = ops.new_loss(logits, inputs.target, spec.reduction)
        ops.run_loss(logits, inputs, spec, loss, None, saved)
        target, weight, _, _, logit_bias, margin = inputs
        if not spec.formula.weighs_classes(target):  # in scale already; it may change in place
            weight = None
        ctx.save_for_backward(logits, target, weight, logit_bias, margin, saved)
        ctx.spec = spec
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            _refuse_double_backward()
        logits, *vectors, saved = ctx.saved_tensors
        grad = logits.detach() if ctx.spec.inplace else ops.new_grad(logits)
        run = ops.gradients[ctx.spec.backend]
        run(logits, *vectors, saved, grad_loss.contiguous(), ctx.spec.numbers, grad)
        if ctx.spec.inplace:
            torch.autograd.graph.increment_version(logits)
        return grad, None, None


def stored_gradient(logits: Tensor, inputs: Inputs, spec: Spec) -> Tensor:
    """The loss, its gradient computed along with it."""
    apply = StoredGradient.apply if is_compiling() else _apply_stored
    return apply(logits, inputs, spec)


def stored_gradient_and_stats(logits: Tensor, inputs: Inputs, spec: Spec) -> tuple[Tensor, Tensor]:
    """The loss and statistics (4, C) of its classes, see stats.py."""
    apply = StoredGradientAndStats.apply if is_compiling() else _apply_stored_and_stats
    return apply(logits, inputs, spec)


def recomputed_gradient(logits: Tensor, inputs: Inputs, spec: Spec) -> Tensor:
    """The loss, its gradient left to the backward."""
    return RecomputedGradient.apply(logits, inputs, spec)  # type: ignore[no-untyped-call]


# Function.apply without its Python wrapper, 3 us that look for functorch: spec.py has looked.
_apply_stored: Any = super(torch.autograd.Function, StoredGradient).apply
_apply_stored_and_stats: Any = super(torch.autograd.Function, StoredGradientAndStats).apply


def _scaled_stored(ctx: Any, grad_loss: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        _refuse_double_backward()
    grad: Tensor = ctx.saved_tensors[0]
    if is_compiling():
        return ops.scaled(grad, grad_loss)
    if grad_loss.is_cpu:  # where looking costs nothing
        return grad if grad_loss.item() == 1 else grad * grad_loss
    return ops.scale_stored(grad, grad_loss, not ctx.inplace)


def _refuse_double_backward() -> None:
    if not is_compiling():
        raise RuntimeError(
            "the fused kernels have no second derivative (create_graph=True); "
            "backend='reference' has"
        )
