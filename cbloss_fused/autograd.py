"""The torch.autograd.Functions: the gradient stored by the forward, or recomputed by the backward.

Old style on purpose (no setup_context): a call costs half, and 20 us matter at small batches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops
from .spec import Spec


class StoredGradient(torch.autograd.Function):
    """One read of the logits and one write of the gradient, in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        sample_weight: Tensor | None,
        normalizer: Tensor | None,
        spec: Spec,
    ) -> Tensor:
        sigmoid, gamma, label_smoothing, ignore_index, reduction, inplace = spec
        grad = logits.detach() if inplace else torch.empty_like(logits)
        loss = ops.new_loss(logits, target, reduction)
        ops.loss(
            logits, target, weight, sample_weight, normalizer,
            sigmoid, gamma, label_smoothing, ignore_index, reduction, loss, grad, None,
        )  # fmt: skip
        if inplace:  # whoever saved the logits raises in its backward
            torch.autograd.graph.increment_version(logits)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        (grad,) = ctx.saved_tensors
        return _scaled(grad, grad_loss), None, None, None, None, None


class RecomputedGradient(torch.autograd.Function):
    """The forward keeps three numbers a row; the backward reads the logits again.

    For float16, where a gradient divided by N underflows before a loss scaler multiplies it, and
    for a vector of losses, whose incoming gradients would cost a pass over a stored one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        sample_weight: Tensor | None,
        normalizer: Tensor | None,
        spec: Spec,
    ) -> Tensor:
        sigmoid, gamma, label_smoothing, ignore_index, reduction, _ = spec
        saved = ops.new_saved(logits, target, sigmoid)
        loss = ops.new_loss(logits, target, reduction)
        ops.loss(
            logits, target, weight, sample_weight, normalizer,
            sigmoid, gamma, label_smoothing, ignore_index, reduction, loss, None, saved,
        )  # fmt: skip
        ctx.save_for_backward(logits, target, saved)
        ctx.spec = spec
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        logits, target, saved = ctx.saved_tensors
        sigmoid, gamma, label_smoothing = ctx.spec[:3]
        grad = logits.detach() if ctx.spec.inplace else torch.empty_like(logits)
        ops.gradient(
            logits, target, saved, grad_loss.contiguous(), sigmoid, gamma, label_smoothing, grad
        )
        if ctx.spec.inplace:
            torch.autograd.graph.increment_version(logits)
        return grad, None, None, None, None, None


def _scaled(grad: Tensor, grad_loss: Tensor) -> Tensor:
    """grad * grad_loss, as it is where grad_loss is 1 and looking at it costs nothing."""
    if torch.compiler.is_compiling() or grad_loss.device.type != "cpu" or grad_loss.item() != 1:
        return grad * grad_loss
    return grad


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "the fused kernels have no second derivative (create_graph=True); "
            "backend='reference' has"
        )
