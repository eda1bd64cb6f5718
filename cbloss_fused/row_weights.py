"""What weighs a row: r_i, which rows count, what a mean divides by; eager PyTorch.

Targets are (N, ...) of class indices, or like (N, C, ...) logits: the classes are dimension 1.
"""

from __future__ import annotations

from math import nan
from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import Inputs, compute_dtype, is_soft, known_labels
from .options import REDUCTIONS, Formula, LossSpec
from .values import check_target, tracing


class Targets(NamedTuple):
    """Targets that index nothing out of bounds, and what is not used of them; None: all is."""

    y: Tensor  # class indices, C in a background row; or soft targets, 0 where not known
    keep: Tensor | None = None  # rows not ignored
    valid: Tensor | None = None  # rows in range
    known: Tensor | None = None  # elements of soft targets not ignored


def row_scales(
    logits: Tensor,
    inputs: Inputs,
    f: Formula,
    ignore_index: int | None,
    background_index: int | None,
    reduction: str,
) -> tuple[Targets, Tensor, Tensor]:
    """The targets; s, r: one number per row, over the denominator.

    r is r_i, negative where the row is ignored; s too, but with softmax's soft targets, of which it
    is the sample weight alone.
    """
    targets = targets_of(inputs.target, logits.shape[1], ignore_index, background_index)
    y, keep, valid, _ = targets
    dtype = compute_dtype(logits.dtype)
    ones = logits.new_ones(logits.shape[:1] + logits.shape[2:], dtype=dtype)
    r = row_weights(y, inputs, f, dtype)
    s = sample_weights(inputs, dtype) if is_soft(y) and not f.sigmoid else r
    s, r = (ones if v is None else v for v in (s, r))
    if reduction not in ("none", "sum"):
        divisor = _denominator(r, keep, reduction, inputs.normalizer)
        s, r = (torch.where(divisor != 0, v / divisor, 0.0) for v in (s, r))
    if keep is not None:
        s, r = (torch.where(keep, v, -1.0) for v in (s, r))
    if valid is not None:
        s, r = (torch.where(valid, v, nan) for v in (s, r))
    return targets, s, r


def targets_of(
    target: Tensor, C: int, ignore_index: int | None, background_index: int | None
) -> Targets:
    """What the formulas take of targets.

    A CPU target out of range raises here. Nothing may synchronise on other devices, and no value
    is known while torch.compile or torch.func traces: there such a row becomes NaN.
    """
    if is_soft(target):  # no row of these is ignored
        known = known_labels(target, ignore_index)
        return Targets(target if known is None else torch.where(known, target, 0), known=known)
    y = target.long()  # first: -100 would wrap around in a uint8
    keep = None if ignore_index is None else y != ignore_index
    if keep is not None:
        y = torch.where(keep, y, 0)
    valid = None
    if target.device.type == "cpu" and not tracing():
        check_target(target, C, ignore_index, background_index)
    else:
        valid = (y >= 0) & (y < C)
    if background_index is None:
        return Targets(y if valid is None else y.clamp(0, C - 1), keep, valid)
    background = y == background_index
    if valid is not None:
        valid |= background
    return Targets(torch.where(background, C, y.clamp(0, C - 1)), keep, valid)


def row_weights(y: Tensor, inputs: Inputs, f: Formula, dtype: torch.dtype) -> Tensor | None:
    """r_i = w_{y_i} * sample_weight_i; of soft targets the mean weight of the labels."""
    r = None
    if inputs.weight is not None and not f.per_class:
        w = inputs.weight.to(dtype)
        if is_soft(y):
            t = y.to(dtype)
            labels, weights = t.sum(1), (t * along_classes(w, t)).sum(1)
            r = torch.where(labels != 0, weights / labels, 1.0)
        else:
            r = at_target(w, y, 1.0)
    s = sample_weights(inputs, dtype)
    if s is None or r is None:
        return s if r is None else r
    return r * s


def at_target(vector: Tensor, y: Tensor, background: float) -> Tensor:
    """The numbers of the classes y; background where y is none, C."""
    C = len(vector)
    return torch.where(y < C, vector[y.clamp(max=C - 1)], background)


def sample_weights(inputs: Inputs, dtype: torch.dtype) -> Tensor | None:
    return None if inputs.sample_weight is None else inputs.sample_weight.to(dtype)


def weighted(r: Tensor | None, L: Tensor) -> Tensor:
    """r * L where an overflowed loss of a row without weight counts 0, not 0 * inf = NaN."""
    return L if r is None else r * torch.where((r == 0) & L.isposinf(), 0.0, L)


def _denominator(
    r: Tensor, keep: Tensor | None, reduction: str, normalizer: Tensor | None
) -> Tensor:
    """What a mean divides by, 0-d."""
    if normalizer is not None:
        return normalizer.to(r.dtype)
    if reduction == "weighted_mean":
        return (r if keep is None else torch.where(keep, r, 0.0)).sum()
    if keep is not None:
        return keep.sum().to(r.dtype)
    return torch.full((), r.numel(), dtype=r.dtype, device=r.device)  # no copy, which would wait


def denominator_of(inputs: Inputs, C: int, spec: LossSpec, dtype: torch.dtype) -> Tensor:
    """What the mean of these rows divides by, 0-d; C may be ANY_CLASS where there is no weight."""
    target, name = inputs.target, REDUCTIONS[spec.reduction]
    if is_soft(target) and target.dim() == 1:  # one row
        target = target.unsqueeze(0)
    y, keep, _, _ = targets_of(target, C, spec.ignore_index, spec.background_index)
    r = None if name == "mean" else row_weights(y, inputs, spec.formula, dtype)
    if r is None:
        rows = target.shape[:1] + target.shape[2:] if is_soft(target) else target.shape
        r = torch.ones((), dtype=dtype, device=target.device).expand(rows)
    return _denominator(r, keep, name, None)


def reduced(
    L: Tensor,
    r: Tensor | None,
    keep: Tensor | None,
    reduction: str,
    normalizer: Tensor | None,
) -> Tensor:
    if keep is not None:
        L = torch.where(keep, L, 0.0)
    if reduction == "none":
        return L
    if reduction == "sum":
        return L.sum()
    divisor = _denominator(torch.ones_like(L) if r is None else r, keep, reduction, normalizer)
    total = L.sum()
    mean = total / torch.where(divisor != 0, divisor, 1.0)
    nothing = weighted(torch.zeros_like(total), total)  # to average: 0, or NaN
    return torch.where(divisor != 0, mean, nothing)


def along_classes(vector: Tensor, z: Tensor) -> Tensor:
    return vector.to(z.dtype).reshape(-1, *[1] * (z.dim() - 2))
