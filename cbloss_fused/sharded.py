"""`class_balanced_loss` of classes over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import (
    Given,
    check_inplace,
    check_inputs,
    check_vector,
    refuse_shards,
    refuse_transforms,
)
from .autograd import differentiable, refuse_batches, refuse_second_derivatives, scaled
from .backends import Backend, choose
from .groups import add_up, agreed
from .inputs import Inputs, class_by_class, compute_dtype, is_soft, sum_dtype
from .options import REDUCTIONS, LossSpec
from .row_weights import row_scales
from .sharded_sigmoid import saved_scale, sigmoid_gradient, sigmoid_losses, target_statistics
from .sharded_softmax import SoftmaxRows, softmax_gradient, softmax_losses
from .shards import ClassShards, Part
from .stats import ClassStats
from .values import check_target, check_values, tracing

ROWS = "rows"
# Of a call, on all ranks: what is communicated depends on it.
SAME = (ROWS, "kind of weight, or none", "reduction", "return_stats", "label_smoothing, or none")
AGREED = 1 + 2 * len(SAME)  # numbers: whether weights are a rank's own, each of these, and less it


class ShardedCall(NamedTuple):
    part: Part
    r: Tensor  # (rows,) over the denominator, negative where ignored
    backend: Backend
    return_stats: bool


def sharded_loss(
    input: Any, given: Given, spec: LossSpec, return_stats: bool, shards: ClassShards
) -> Tensor | tuple[Tensor, ClassStats]:
    """The loss of all classes, from this rank's logits.

    On the CPU all ranks raise what one finds wrong.
    """
    _, inputs, r = checked(lambda: (input, given), input, spec, return_stats, shards)
    backend = choose(input.device.type, spec.backend, class_by_class(spec.formula, inputs))
    (input,) = differentiable(input)
    logits = input.unsqueeze(0) if input.dim() == 1 else input
    if logits.dim() > 2:
        logits = logits.flatten(2)
    part = Part.of(inputs, spec, shards)
    apply: Any = ShardedLoss.apply
    loss, stats = apply(logits, ShardedCall(part, r, backend, return_stats))
    if not spec.reduction:
        loss = loss.view(inputs.target.shape)
    return loss if stats is None else (loss, ClassStats.of(stats))


def checked(
    make: Callable[[], tuple[Any, Given]],
    input: Any,
    spec: LossSpec,
    return_stats: bool,
    shards: ClassShards,
) -> tuple[Tensor, Inputs, Tensor]:
    """(logits, the other tensors, r (rows,) over the denominator, negative where ignored).

    make: gives logits, or what stands for them, and the rest, or raises.
    input: whose device decides whether values are looked at, and ranks compare what they have.
    """
    if not isinstance(shards, ClassShards):
        raise TypeError(f"shards must be a ClassShards or None, got {type(shards).__name__}")
    logits: Any = None
    inputs: Any = None

    def check() -> None:
        nonlocal logits, inputs
        logits, given = make()
        inputs = _inputs(logits, given, spec, return_stats, shards)

    def own() -> Tensor:
        check()
        given, smooth = inputs.weight is not None, spec.formula.label_smoothing > 0
        same = [inputs.target.numel(), given, spec.reduction, bool(return_stats), smooth]
        numbers = [shards.is_own(inputs.weight), *same, *(-number for number in same)]
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")

    if isinstance(input, Tensor) and input.device.type != "cpu":
        check()
        # Where one of several ranks has all classes, its own weight looks whole.
        all_on_one = len(shards.sizes) > 1 and shards.num_classes in shards.sizes
        own_weight = all_on_one or shards.is_own(inputs.weight)
    else:
        n, cpu = len(SAME), torch.device("cpu")
        own_weight, *numbers = agreed(own, AGREED, shards.group, cpu, largest=True).tolist()
        for what, most, least in zip(SAME, numbers[:n], numbers[n:], strict=True):
            if most != -least:
                got = f", got {-least:.0f} on one and {most:.0f} on another" if what == ROWS else ""
                raise ValueError(f"every rank must have the same {what}{got}")
    return logits, inputs, _row_scales(logits, inputs, spec, shards, bool(own_weight))


def _inputs(
    input: Any, given: Given, spec: LossSpec, return_stats: bool, shards: ClassShards
) -> Inputs:
    """As check_inputs of all classes, where vectors may be the rank's own."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a Tensor, got {type(input).__name__}")
    dim, own, C = min(1, input.dim() - 1), shards.num_local_classes, shards.num_classes
    if input.dim() == 0 or input.shape[dim] != own:
        raise ValueError(
            f"input must have this rank's {own} classes in dimension {dim}, got shape "
            f"{tuple(input.shape)}"
        )
    whole, parts = Inputs(*given), dict[str, Any]()
    if isinstance(whole.target, Tensor) and is_soft(whole.target):
        raise ValueError("soft targets lie on every rank's classes: with shards pass class indices")
    for name in ("weight", "logit_bias", "margin", "pos_weight"):
        vector = getattr(whole, name)
        if isinstance(vector, Tensor) and vector.shape == (own,) and own != C:
            check_vector(name, vector, (own,), input.device)
            parts[name] = vector.to(compute_dtype(input.dtype)).contiguous()
    logits = input.detach().new_empty(()).expand(*input.shape[:dim], C, *input.shape[dim + 1 :])
    rest: dict[str, Any] = whole._asdict() | dict.fromkeys(parts)
    inputs = check_inputs(logits, **rest, spec=spec, return_stats=return_stats)._replace(**parts)
    refuse_transforms(input)
    refuse_shards(input)
    if spec.inplace and input.numel():
        check_inplace(input, whole.target)
    if input.device.type == "cpu" and not tracing():
        check_target(inputs.target, C, spec.ignore_index, spec.background_index)
        check_values(input, inputs, spec.formula, spec.ignore_index)
    return inputs


def _row_scales(
    input: Tensor, inputs: Inputs, spec: LossSpec, shards: ClassShards, own_weight: bool
) -> Tensor:
    """r (rows,) over the denominator.

    own_weight: a rank has the weights of its own classes alone: the rank that has a row's target
        gives the weight of it.
    """
    dtype, f = compute_dtype(input.dtype), spec.formula
    if own_weight and inputs.weight is not None and not f.per_class:
        part = Part.of(inputs, spec, shards)
        weight = shards.own(inputs.weight)
        assert weight is not None
        w_y = weight.new_zeros(len(part.y))
        if part.columns():
            w_y = torch.where(part.here, weight[part.column()], 0.0)
        add_up(w_y, shards.group)
        if spec.background_index is not None:
            w_y = torch.where(inputs.target.flatten() == spec.background_index, 1.0, w_y)
        w_y, given = w_y.view(inputs.target.shape), inputs.sample_weight
        inputs = inputs._replace(weight=None, sample_weight=w_y if given is None else w_y * given)
    like = input.detach().new_empty(()).expand(1, shards.num_classes, inputs.target.numel())
    flat = inputs.by_row(like)
    marks = spec.ignore_index, spec.background_index
    found = row_scales(like, flat, f, *marks, REDUCTIONS[spec.reduction])[2]
    return found.flatten().to(dtype)


class ShardedLoss(torch.autograd.Function):
    """(loss, statistics of this rank's classes or None) of this rank's logits (N, C, ...)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: ShardedCall) -> tuple[Tensor, Tensor | None]:
        part, r, backend, return_stats = call
        spec, group = part.spec, part.shards.group
        at_target: tuple[Tensor, ...] = ()
        if spec.formula.sigmoid:
            if return_stats and part.columns():
                at_target = target_statistics(logits, part, r)  # before the gradient overwrites
            losses = _sigmoid_forward(ctx, logits, call)
            if return_stats or not spec.reduction:
                add_up(losses, group)
        else:
            losses, rows, p = softmax_losses(logits, part, backend, r)
            at_target = (spec.formula.logit_scale * rows.g_y).abs(), p
            ctx.save_for_backward(logits, *part.kept(), *rows)
        loss = losses
        if spec.reduction:
            total = losses.sum(dtype=sum_dtype(losses.device))
            if spec.formula.sigmoid and not return_stats:
                add_up(total, group)
            loss = total.to(losses.dtype)
        stats = statistics(losses, at_target, part) if return_stats else None
        ctx.call = call
        if stats is not None:
            ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)  # no zeros for stats
        return loss, stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: Any) -> tuple[Tensor | None, None]:
        if grad_loss is None:  # the loss was not used
            return None, None
        part, _, backend, _ = ctx.call
        logits, *kept = ctx.saved_tensors
        if not kept:  # the gradient alone, of sigmoid
            owned = not part.spec.inplace
            return scaled(logits, grad_loss, owned, backend.scale_gradient), None
        refuse_second_derivatives()
        refuse_batches(grad_loss)
        part, saved = part.again(kept)
        grad: Tensor = logits.detach() if part.spec.inplace else backend.new_grad(logits)
        incoming = grad_loss.contiguous()
        if part.spec.formula.sigmoid:
            sigmoid_gradient(logits, part, backend, saved[0], incoming, grad)
        else:
            softmax_gradient(logits, part, backend, SoftmaxRows(*saved), incoming, grad)
        if part.spec.inplace:
            torch.autograd.graph.increment_version(logits)
        return grad, None


def _sigmoid_forward(ctx: Any, logits: Tensor, call: ShardedCall) -> Tensor:
    """This rank's part of the rows' losses; saves the gradient, or what it is recomputed from."""
    part, r, backend, _ = call
    grad = None
    if ctx.needs_input_grad[0] and part.spec.recomputes(logits.dtype):
        ctx.save_for_backward(logits, *part.kept(), saved_scale(r))
    elif ctx.needs_input_grad[0]:
        grad = logits.detach() if part.spec.inplace else backend.new_grad(logits)
        ctx.save_for_backward(grad)
    losses = sigmoid_losses(logits, part, backend, r, grad)
    if grad is not None and part.spec.inplace:
        torch.autograd.graph.increment_version(logits)
    return losses


def statistics(losses: Tensor, at_target: Sequence[Tensor], part: Part) -> Tensor:
    """(4, columns) of the rows whose targets are here, see stats.py."""
    wide = sum_dtype(losses.device)
    found = losses.new_zeros(4, part.columns(), dtype=wide)
    if part.columns():
        values = torch.ones_like(losses), losses, *at_target
        for row, value in zip(found, values, strict=True):
            row.index_add_(0, part.column(), torch.where(part.here, value, 0.0).to(wide))
        found[3] /= found[0]
    return found
