"""The torch.autograd.Functions: the gradient stored by the forward, or recomputed by the backward.

At small batches the host time of a call is what counts. So: old style (no setup_context), which
costs half; and what is not differentiated in one tuple, since autograd looks at every argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .backends import Backend
from .buffers import fills_its_storage, new_loss, new_saved, span_of
from .inputs import Inputs, sum_dtype, weights_classes
from .options import LossSpec
from .stats import class_stats

NOT_TRACED = (
    "torch.jit.trace needs a differentiable formula, or logits that require no grad: pass "
    "backend='reference'"
)


def loss_alone(logits: Tensor, inputs: Inputs, spec: LossSpec, backend: Backend) -> Tensor:
    """The loss, where nothing is differentiated."""
    loss = new_loss(logits, inputs.target, spec.reduction)
    _run(backend, logits, inputs, spec, loss, None, None)
    return loss


def loss_and_stats_alone(
    logits: Tensor, inputs: Inputs, spec: LossSpec, backend: Backend
) -> tuple[Tensor, Tensor]:
    """The loss and statistics (4, C) of its classes, where nothing is differentiated."""
    loss, stats, _ = _run_with_stats(backend, logits, inputs, spec, None)
    return loss, stats


def stored_gradient(logits: Tensor, inputs: Inputs, spec: LossSpec, backend: Backend) -> Tensor:
    """The loss, its gradient computed along with it."""
    apply = StoredGradient.apply if is_compiling() else _apply_stored
    return apply(logits, inputs, spec, backend)


def stored_gradient_and_stats(
    logits: Tensor, inputs: Inputs, spec: LossSpec, backend: Backend
) -> tuple[Tensor, Tensor]:
    """The loss and statistics (4, C) of its classes, see stats.py."""
    apply = StoredGradientAndStats.apply if is_compiling() else _apply_stored_and_stats
    return apply(logits, inputs, spec, backend)


def recomputed_gradient_and_stats(
    logits: Tensor, inputs: Inputs, spec: LossSpec, backend: Backend
) -> tuple[Tensor, Tensor]:
    """The same, the gradient left to the backward."""
    apply = RecomputedGradientAndStats.apply if is_compiling() else _apply_recomputed_and_stats
    return apply(logits, inputs, spec, backend)


def recomputed_gradient(logits: Tensor, inputs: Inputs, spec: LossSpec, backend: Backend) -> Tensor:
    """The loss, its gradient left to the backward."""
    apply = RecomputedGradient.apply if is_compiling() else _apply_recomputed
    return apply(logits, inputs, spec, backend)


class StoredGradient(torch.autograd.Function):
    """One read of the logits and one write of the gradient, in the forward."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, inputs: Inputs, spec: LossSpec, backend: Backend
    ) -> Tensor:
        inplace = spec.inplace
        grad = logits.detach() if inplace else backend.new_grad(logits)
        loss = new_loss(logits, inputs.target, spec.reduction)
        _run(backend, logits, inputs, spec, loss, grad, None)
        if inplace:  # whoever saved the logits raises in its backward
            torch.autograd.graph.increment_version(logits)
        ctx.save_for_backward(grad)
        ctx.owned, ctx.scale_gradient = not inplace, backend.scale_gradient
        ctx.set_materialize_grads(False)  # zeros times NaN would be NaN
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:  # the loss was not used
            return (None,) * 4
        (grad,) = ctx.saved_tensors
        return scaled(grad, grad_loss, ctx.owned, ctx.scale_gradient), None, None, None


class StoredGradientAndStats(torch.autograd.Function):
    """StoredGradient, and (4, C) statistics of the classes."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, inputs: Inputs, spec: LossSpec, backend: Backend
    ) -> tuple[Tensor, Tensor]:
        grad = backend.new_grad(logits)
        if backend.loss_and_stats is not None:
            loss = new_loss(logits, inputs.target, spec.reduction)
            stats = loss.new_empty(4, logits.shape[1], dtype=torch.float64)
            _run(backend, logits, inputs, spec, loss, grad, stats, backend.loss_and_stats)
        else:
            loss, stats, _ = _run_with_stats(backend, logits, inputs, spec, grad)
        ctx.save_for_backward(grad)
        ctx.owned, ctx.scale_gradient = True, backend.scale_gradient
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)  # no zeros for stats
        return loss, stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:  # the loss was not used
            return (None,) * 4
        (grad,) = ctx.saved_tensors
        return scaled(grad, grad_loss, ctx.owned, ctx.scale_gradient), None, None, None


class RecomputedGradient(torch.autograd.Function):
    """The forward keeps three numbers per row; the backward reads the logits again.

    For float16, where a gradient divided by N underflows before a loss scaler multiplies it, and
    for a vector of losses, whose incoming gradients would cost a pass over a stored one.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, inputs: Inputs, spec: LossSpec, backend: Backend
    ) -> Tensor:
        saved = new_saved(logits, spec.formula.sigmoid)
        loss = new_loss(logits, inputs.target, spec.reduction)
        _run(backend, logits, inputs, spec, loss, None, saved)
        _save(ctx, logits, inputs, spec, backend, saved)
        ctx.set_materialize_grads(False)  # as above
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        return None if grad_loss is None else _recomputed(ctx, grad_loss), None, None, None


class RecomputedGradientAndStats(torch.autograd.Function):
    """RecomputedGradient, and (4, C) statistics of the classes."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, inputs: Inputs, spec: LossSpec, backend: Backend
    ) -> tuple[Tensor, Tensor]:
        loss, stats, saved = _run_with_stats(backend, logits, inputs, spec, None)
        _save(ctx, logits, inputs, spec, backend, saved)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)  # no zeros for stats
        return loss, stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        return None if grad_loss is None else _recomputed(ctx, grad_loss), None, None, None


# Function.apply without its Python wrapper, 3 us that look for functorch: check_inputs has looked.
_apply_stored: Any = super(torch.autograd.Function, StoredGradient).apply
_apply_stored_and_stats: Any = super(torch.autograd.Function, StoredGradientAndStats).apply
_apply_recomputed: Any = super(torch.autograd.Function, RecomputedGradient).apply
_apply_recomputed_and_stats: Any = super(torch.autograd.Function, RecomputedGradientAndStats).apply


def _run(
    backend: Backend, logits: Tensor, inputs: Inputs, spec: LossSpec, loss: Tensor,
    grad: Tensor | None, left: Tensor | None, operator: Any = None,
) -> None:  # fmt: skip
    """left: what the operator leaves beside them, saved or statistics."""
    (operator or backend.loss)(logits, *inputs, *spec[1:5], loss, grad, left)


def _run_with_stats(
    backend: Backend, logits: Tensor, inputs: Inputs, spec: LossSpec, grad: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, statistics, saved); fills grad."""
    losses = new_loss(logits, inputs.target, 0)
    saved = new_saved(logits, spec.formula.sigmoid)
    _run(backend, logits, inputs, spec, losses, grad, saved)
    loss = losses.sum(dtype=sum_dtype(losses.device)).to(losses.dtype)
    return loss, class_stats(logits, inputs, spec, losses, saved), saved


def _save(
    ctx: Any, logits: Tensor, inputs: Inputs, spec: LossSpec, backend: Backend, saved: Tensor
) -> None:
    if not weights_classes(spec.formula, inputs.target):
        inputs = inputs._replace(weight=None)  # in scale already; it may change in place
    ctx.save_for_backward(logits, *inputs.of_gradient(), saved)
    ctx.spec, ctx.backend = spec, backend


def _recomputed(ctx: Any, grad_loss: Tensor) -> Tensor:
    refuse_second_derivatives()
    refuse_batches(grad_loss)
    logits, *vectors, saved = ctx.saved_tensors
    spec, backend = ctx.spec, ctx.backend
    grad: Tensor = logits.detach() if spec.inplace else backend.new_grad(logits)
    incoming, marks = grad_loss.contiguous(), (spec.ignore_index, spec.background_index)
    backend.gradient(logits, *vectors, saved, incoming, spec.numbers, *marks, grad)
    if spec.inplace:
        torch.autograd.graph.increment_version(logits)
    return grad


def scaled(grad: Tensor, grad_loss: Tensor, owned: bool, scale_gradient: Any) -> Tensor:
    """A stored gradient times grad_loss: in place where no later backward needs it.

    owned, scale_gradient: see _scaled_unseen and Backend.
    """
    refuse_second_derivatives()
    if is_compiling() or type(grad_loss) is not Tensor or is_batched(grad_loss):
        return product(grad, grad_loss)  # whose value cannot be looked at
    if not grad_loss.is_cpu:
        return _scaled_unseen(grad, grad_loss, owned, scale_gradient)
    kept = keeps_graph()
    if grad_loss.item() != 1:  # looking costs nothing here
        return grad * grad_loss if kept or type(grad) is not Tensor else grad.mul_(grad_loss)
    return grad.clone() if kept else grad


def _scaled_unseen(grad: Tensor, grad_loss: Tensor, owned: bool, scale_gradient: Any) -> Tensor:
    """grad * grad_loss without a look at grad_loss: in place where no later backward needs grad.

    owned: what lies between the elements of grad is co_aligned's padding, and nobody else's.
    """
    if type(grad) is not Tensor or scale_gradient is None or grad.numel() == 0:
        return product(grad, grad_loss)
    span = span_of(grad.shape, grad.stride())
    if span != grad.numel() and not (owned and fills_its_storage(grad)):
        return product(grad, grad_loss)
    if keeps_graph():
        grad, span = grad.clone(), grad.numel()  # which has no gaps
    scale_gradient(grad, grad_loss, span)
    return grad


def product(grad: Tensor, grad_loss: Tensor) -> Tensor:
    """grad * grad_loss, rounded once."""
    return (grad.to(grad_loss.dtype) * grad_loss).to(grad.dtype)


def refuse_second_derivatives() -> None:
    if torch.is_grad_enabled() and not is_compiling():
        raise RuntimeError(
            "the fused kernels have no second derivative (create_graph=True); "
            "backend='reference' has"
        )


def differentiable(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Detached where grad mode is off: needs_input_grad of a Function does not depend on it."""
    if torch.is_grad_enabled():
        return tensors
    return tuple(None if t is None else t.detach() for t in tensors)


# Whether a backward may follow (retain_graph=True).
keeps_graph: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)


def is_batched(tensor: Tensor) -> bool:
    """Whether vmap made it: is_grads_batched=True, a vectorised jacobian."""
    functorch = torch._C._functorch  # is_grads_batched takes the older of its two vmaps
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def refuse_batches(grad_loss: Tensor) -> None:
    if not is_compiling() and is_batched(grad_loss):
        raise NotImplementedError(
            "a recomputed gradient takes no batch of incoming gradients (is_grads_batched, "
            "vectorize); backend='reference' does"
        )
