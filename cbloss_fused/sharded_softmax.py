"""Softmax of classes over ranks: two passes over a part, one all-gather in between.

The row kernel leaves M and R of a rank's columns; `softmax_row` makes of all ranks' the loss and
k, g_y, uniform of a row, the same on every rank; the kernel of a recomputed gradient then writes
k e^{z - M} - uniform.

The kernels take a target that is one of their columns. Where a row's target is another rank's, one
of this rank's columns stands in for it, and what they do with that column is made up for.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import Backend
from .buffers import new_saved
from .groups import gathered
from .inputs import sum_dtype
from .options import REDUCTIONS, Formula
from .reference import softmax_row
from .shards import Part, put, target_logit

NONE = REDUCTIONS.index("none")
BYTES = 64 << 20  # of a half type's gradient in float32, at a time


class SoftmaxRows(NamedTuple):
    """(rows,) of each, the same on all ranks, where not ignored; see softmax_row."""

    ignored: Tensor
    M: Tensor
    k: Tensor
    g_y: Tensor
    uniform: Tensor


def softmax_losses(
    logits: Tensor, part: Part, backend: Backend, r: Tensor
) -> tuple[Tensor, SoftmaxRows, Tensor]:
    """(losses, what the gradient takes, p of the target); logits (N, columns) or (N, columns, K).

    r: r_i over the denominator, negative where the row is ignored.
    """
    f, shards = part.spec.formula, part.shards
    M_k, R_k, z_y, *D_k = gathered(_of_part(logits, part, backend), shards.group).unbind(1)
    M, z_y = M_k.amax(0), z_y.amax(0)
    factor = torch.where(M_k == M, 1.0, (M_k - M).exp())
    R = (R_k * factor).sum(0)
    R = torch.where((M_k == inf).sum(0) > 1, nan, R)  # no limit, as of two infinite logits of one
    at_top = (z_y == M) & ~M.isneginf()  # of -inf alone there is no limit
    d, D = torch.where(at_top, 0.0, z_y - M), torch.zeros_like(M)
    if D_k:
        sizes = _filled(shards.sizes, M)
        moved = torch.where((sizes == 0) | (M_k == M), 0.0, sizes * (M_k - M))
        D = (D_k[0] + moved).sum(0)
    ignored = r < 0
    used = torch.where(ignored, 0.0, r)
    loss, k, g_y, uniform = softmax_row(d, R, used, D, shards.num_classes, M, f)
    rows = SoftmaxRows(ignored, M, k, g_y, uniform)
    return torch.where(ignored, 0.0, loss), rows, d.exp() / (R + d.exp())


def softmax_gradient(
    logits: Tensor, part: Part, backend: Backend, rows: SoftmaxRows, incoming: Tensor, grad: Tensor
) -> None:
    """Fill grad, which may be logits, for an incoming gradient: 0-d, or one per row."""
    if not part.columns():
        return
    f, (ignored, M, k, g_y, uniform) = part.spec.formula, rows
    factor, inputs, column = incoming.expand_as(M), part.inputs, _stand_in(part)
    z, raw = (target_logit(logits, part, column, margin) for margin in (True, False))
    e, e_raw = (torch.where(v == M, 1.0, (v - M).exp()) for v in (z, raw))
    # The kernel writes scale / (R + e) e^{z - M}, here of R = 1; but 0 where the column's logit is
    # M: if both were infinite, R = 1 would be a second infinite logit.
    R = torch.where((z == M) & ~ignored, 0.0, torch.ones_like(M))
    one = torch.ones_like(M)
    saved = torch.stack((torch.where(ignored, -1.0, one), torch.where(ignored, 0.0, M), R))
    vectors = None, inputs.logit_bias, inputs.margin, None
    scale = torch.where(ignored, 0.0, k * factor * (R + e))
    uniform = torch.where(ignored, 0.0, f.logit_scale * factor * uniform)

    def write(x: Tensor, out: Tensor, some: slice) -> None:
        """Of some rows, into out, which may be x."""
        target, state = column[some], saved[:, some].contiguous()
        numbers = _plain(f).numbers()
        backend.gradient(x, target, *vectors, state, scale[some], numbers, None, None, out)
        if f.label_smoothing:
            out.sub_(uniform[some].view(out.shape[:1] + out.shape[2:]).unsqueeze(1))

    if f.label_smoothing and grad.dtype != M.dtype:  # rounded once: the difference may cancel
        K = grad.shape[2:].numel()
        step = max(1, BYTES // (M.element_size() * part.columns() * max(1, K)))
        for n in range(0, len(grad), step):
            piece = logits[n : n + step].to(M.dtype)
            write(piece, piece, slice(n * K, (n + step) * K))
            grad[n : n + step] = piece
    else:
        write(logits, grad, slice(None))
    elsewhere = f.logit_scale * factor * k * e_raw - uniform
    at_column = torch.where(part.here, f.logit_scale * factor * g_y, elsewhere)
    put(grad, column, torch.where(ignored, 0.0, at_column))


def _of_part(logits: Tensor, part: Part, backend: Backend) -> Tensor:
    """(3 or 4, rows): M, R, z_y, which is -inf elsewhere, and for smoothing D."""
    f, saved = part.spec.formula, new_saved(logits, False)
    if not part.columns():
        lowest = torch.finfo(saved.dtype).min
        found = [torch.full_like(saved[0], v) for v in (lowest, 0.0, -inf, 0.0)]
        return torch.stack(found if f.label_smoothing else found[:3])
    column, inputs = _stand_in(part), part.inputs
    losses = torch.empty_like(saved[0])
    vectors = column, None, None, None, inputs.logit_bias, inputs.margin, None
    backend.loss(logits, *vectors, _plain(f).numbers(), None, None, NONE, losses, None, saved)
    _, M, R = saved.unbind()
    z, raw = (target_logit(logits, part, column, margin) for margin in (True, False))
    top = torch.where(part.here, M, torch.maximum(M, raw))  # which the margin may have lowered
    R = torch.where(top == M, R, R * (M - top).exp())
    e_raw = torch.where(raw == top, 1.0, (raw - top).exp())
    R = torch.where(part.here, R, R + e_raw)
    found = [top, R, torch.where(part.here, z, -inf)]
    if f.label_smoothing:
        wide = sum_dtype(logits.device)
        total = logits.sum(1, dtype=wide).flatten()
        if inputs.logit_bias is not None:
            total = total + inputs.logit_bias.sum(dtype=wide)
        total = f.logit_scale * total - part.columns() * top.to(wide)
        total = total + torch.where(part.here & raw.isfinite(), z - raw, 0.0)
        total = torch.where(total.isnan() & top.isfinite(), -inf, total)  # sums overflow: inf - inf
        below = 0.0 if part.columns() == 1 else -inf  # of the limit, where top is infinite
        found.append(torch.where(top == inf, below, total).to(M.dtype))
    return torch.stack(found)


def _filled(sizes: Sequence[int], like: Tensor) -> Tensor:
    """(ranks, 1), by kernels that fill: a copy to a GPU would wait for it."""
    found = torch.full((len(sizes), 1), sizes[0], dtype=like.dtype, device=like.device)
    for rank, size in enumerate(sizes):
        if size != sizes[0]:
            found[rank].fill_(size)
    return found


def _stand_in(part: Part) -> Tensor:
    """The target's column or, elsewhere, the one with the largest margin: e^{z - M} is small."""
    margin = part.inputs.margin
    return part.column() if margin is None else torch.where(part.here, part.y, margin.argmax())


def _plain(f: Formula) -> Formula:
    """Cross entropy of the same logits."""
    return f._replace(gamma=0.0, gamma_neg=0.0, label_smoothing=0.0, z_loss=0.0)
