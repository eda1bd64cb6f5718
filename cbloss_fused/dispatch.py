"""Every decision about a call, once: its shape, its backend, and where its gradient is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .autograd import (
    NOT_TRACED,
    loss_alone,
    loss_and_stats_alone,
    recomputed_gradient,
    recomputed_gradient_and_stats,
    stored_gradient,
    stored_gradient_and_stats,
)
from .backends import Backend, choose
from .inputs import Inputs, class_by_class, is_soft
from .options import REDUCTIONS, LossSpec
from .stats import ClassStats
from .values import check_values, in_own_shape, jit_tracing, told_of, tracing, typed


def dispatch(
    input: Tensor, inputs: Inputs, spec: LossSpec, return_stats: bool
) -> Tensor | tuple[Tensor, ClassStats]:
    """`class_balanced_loss` of checked arguments."""
    soft = is_soft(inputs.target)
    if soft and not spec.formula.sigmoid:  # the sigmoid family ignores elements
        spec = spec._replace(ignore_index=None)
    if spec.backend == "reference":
        return _eager(input, inputs, spec)
    differentiated = input.requires_grad and torch.is_grad_enabled()
    if differentiated and torch.compiler._is_exporting_flag:  # operators there have no gradient
        if return_stats:
            raise NotImplementedError("return_stats cannot be exported with a gradient")
        return _eager(input, inputs, spec)
    # device.type takes 3 us
    device_type = "cpu" if input.is_cpu else "cuda" if input.is_cuda else input.device.type
    backend = choose(device_type, spec.backend, class_by_class(spec.formula, inputs))
    shape = input.shape
    if len(shape) != 2:  # (C,) and (N, C, d1, ..., dk): the operators know (N, C) and (N, C, K)
        input = input.unsqueeze(0) if len(shape) == 1 else input.flatten(2)
        if soft:
            inputs = inputs._replace(target=inputs.target.reshape(input.shape))
    try:
        if return_stats:
            loss, stats = _with_stats(input, inputs, spec, backend, differentiated)
            return loss, ClassStats.of(stats)
        if not differentiated:
            loss = loss_alone(input, inputs, spec, backend)
        elif spec.recomputes(input.dtype):
            loss = recomputed_gradient(input, inputs, spec, backend)
        else:
            return stored_gradient(input, inputs, spec, backend)
    except (IndexError, RuntimeError, ValueError) as error:
        of_values = isinstance(typed(error), ValueError)
        if not of_values and jit_tracing():
            raise NotImplementedError(NOT_TRACED) from error  # it cannot record the gradient
        if isinstance(error, IndexError):
            limits = shape[min(1, len(shape) - 1)], spec.ignore_index, spec.background_index
            raise told_of(error, inputs.target, *limits) from None
        raise in_own_shape(typed(error), {"target": (input.shape, shape)}) from None
    if soft and not spec.reduction:  # one loss per row; class indices have that shape already
        loss = loss.reshape(shape[:0] if len(shape) == 1 else shape[:1] + shape[2:])
    return loss


def _with_stats(
    input: Tensor, inputs: Inputs, spec: LossSpec, backend: Backend, differentiated: bool
) -> tuple[Tensor, Tensor]:
    if not differentiated:
        return loss_and_stats_alone(input, inputs, spec, backend)
    if spec.recomputes(input.dtype):
        return recomputed_gradient_and_stats(input, inputs, spec, backend)
    return stored_gradient_and_stats(input, inputs, spec, backend)


def _eager(input: Tensor, inputs: Inputs, spec: LossSpec) -> Tensor:
    """The differentiable formula of reference.py."""
    if input.device.type == "cpu" and not tracing():
        check_values(input, inputs, spec.formula, spec.ignore_index)
    marks = spec.ignore_index, spec.background_index
    numbers = spec.formula, *marks, REDUCTIONS[spec.reduction]
    if input.dim() > 1:
        return reference.eager_loss(input, inputs, *numbers)
    inputs = inputs._replace(target=inputs.target.unsqueeze(0))
    if inputs.sample_weight is not None:
        inputs = inputs._replace(sample_weight=inputs.sample_weight.unsqueeze(0))
    try:
        return reference.eager_loss(input.unsqueeze(0), inputs, *numbers).reshape(())
    except IndexError as error:
        raise in_own_shape(error, {"target": ((1,), ())}) from None
