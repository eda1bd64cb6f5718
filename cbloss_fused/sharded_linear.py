"""A linear head whose classes are over ranks, with its loss: tensor parallel, chunk by chunk.

Each rank has some rows of the head's weight and all rows of the input. A chunk's logits of a rank's
classes lie in its buffer; what is communicated is that of the loss, and once, in the end, the sum
of the ranks' gradients of the input.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autograd import refuse_batches, refuse_second_derivatives
from .backends import Backend
from .chunks import HeadGradients, by_chunk
from .groups import add_up
from .inputs import sum_dtype
from .linear_autograd import all_scaled, cast, cast_back, new_grads
from .sharded import statistics
from .sharded_sigmoid import saved_scale, sigmoid_gradient, sigmoid_losses, target_statistics
from .sharded_softmax import SoftmaxRows, softmax_gradient, softmax_losses
from .shards import Part


class ShardedLinearCall(NamedTuple):
    part: Part  # of all rows
    r: Tensor  # (N,) over the denominator, negative where ignored
    backend: Backend
    dtype: torch.dtype  # of the logits
    rows: int  # of a chunk, on every rank
    return_stats: bool


class Chunk(NamedTuple):
    """What a chunk's pass over its logits gives."""

    losses: Tensor  # of sigmoid those of this rank's classes
    at_target: tuple[Tensor, ...]  # for the statistics: |gradient|, p
    rows: SoftmaxRows | None


class ShardedLinearLoss(torch.autograd.Function):
    """(loss, statistics of this rank's classes or None) of (N, D), (C_local, D), (C_local,)."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, call: ShardedLinearCall
    ) -> tuple[Tensor, Tensor | None]:
        spec, group = call.part.spec, call.part.shards.group
        needed = ctx.needs_input_grad[:3]
        x, head = cast(input, weight, bias, call.dtype)
        later = any(needed) and spec.recomputes(call.dtype)
        now = any(needed) and not later
        grads = new_grads(x, head, needed if now else (False,) * 3)
        found = []
        for part, logits in by_chunk(x, head, call.rows):
            found.append(_forward(logits, part, call, now))
            if now:
                grads.add(logits, x[part], head.weight, part)
        losses = torch.cat([chunk.losses for chunk in found]) if found else call.r.new_zeros(0)
        if spec.formula.sigmoid:
            add_up(losses, group)
        if now:
            _finish(grads, len(x), call)
            ctx.save_for_backward(*cast_back(grads, input, weight, bias))
        elif later:
            rows = [torch.cat(v) for v in zip(*(c.rows for c in found if c.rows), strict=True)]
            ctx.save_for_backward(input, weight, bias, *call.part.kept(), *rows)
        ctx.call, ctx.later = call, later
        loss = losses
        if spec.reduction:
            loss = losses.sum(dtype=sum_dtype(losses.device)).to(losses.dtype)
        stats = None
        if call.return_stats:
            at_target = [torch.cat(v) for v in zip(*(c.at_target for c in found), strict=True)]
            stats = statistics(losses, at_target or [losses, losses], call.part)
            ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)  # no zeros for stats
        return loss, stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:  # the loss was not used
            return (None,) * 4
        refuse_second_derivatives()
        if not ctx.later:
            return *all_scaled(ctx.saved_tensors, grad_loss, ctx.call.backend), None
        refuse_batches(grad_loss)
        call: ShardedLinearCall = ctx.call
        input, weight, bias, *kept = ctx.saved_tensors
        of_all, rows = call.part.again(kept)
        x, head = cast(input, weight, bias, call.dtype)
        grads = new_grads(x, head, ctx.needs_input_grad[:3])
        incoming = grad_loss.contiguous()
        for part, logits in by_chunk(x, head, call.rows):
            own, factor = of_all.rows(part), incoming[part] if incoming.dim() else incoming
            if rows:
                of_chunk = SoftmaxRows(*(v[part] for v in rows))
                softmax_gradient(logits, own, call.backend, of_chunk, factor, logits)
            else:
                saved = saved_scale(call.r[part])
                sigmoid_gradient(logits, own, call.backend, saved, factor, logits)
            grads.add(logits, x[part], head.weight, part)
        _finish(grads, len(x), call)
        return *cast_back(grads, input, weight, bias), None


def _forward(logits: Tensor, rows: slice, call: ShardedLinearCall, now: bool) -> Chunk:
    """now: the gradient is written over the logits."""
    part, r, backend = call.part.rows(rows), call.r[rows], call.backend
    f = part.spec.formula
    if f.sigmoid:
        at_target: tuple[Tensor, ...] = r, r  # of a rank without classes: not used
        if call.return_stats and part.columns():
            at_target = target_statistics(logits, part, r)
        losses = sigmoid_losses(logits, part, backend, r, logits if now else None)
        return Chunk(losses, at_target, None)
    losses, found, p = softmax_losses(logits, part, backend, r)
    if now:
        softmax_gradient(logits, part, backend, found, r.new_ones(()), logits)
    return Chunk(losses, ((f.logit_scale * found.g_y).abs(), p), found)


def _finish(grads: HeadGradients, N: int, call: ShardedLinearCall) -> None:
    """The input's gradient of all classes."""
    if not N:
        grads.zero()
    if grads.input is not None:
        add_up(grads.input, call.part.shards.group)
