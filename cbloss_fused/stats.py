"""What each class contributes to a loss, from what the row kernels leave anyway."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .call import Formula, Inputs


class ClassStats(NamedTuple):
    """Of the rows of each class, by their targets: (C,) vectors in the type of the loss.

    >>> from cbloss_fused import class_balanced_loss
    >>> logits, target = torch.zeros(4, 2, requires_grad=True), torch.tensor([0, 0, 0, 1])
    >>> loss, stats = class_balanced_loss(logits, target, return_stats=True)
    >>> stats.loss / stats.loss.sum()
    tensor([0.7500, 0.2500])
    """

    rows: Tensor  # how many, without ignored ones
    loss: Tensor  # sum of what these rows add to the loss
    gradient: Tensor  # sum of |d loss / d logit| at these rows' own targets
    probability: Tensor  # mean p of the target, softmax or sigmoid; NaN where there is no row


def denominator(inputs: Inputs, ignore_index: int | None, reduction: str, like: Tensor) -> Tensor:
    """What reduction divides by, 0-d, 1 where there is nothing to average."""
    target, weight, sample_weight, normalizer, *_ = inputs
    if normalizer is not None:
        return normalizer
    if reduction == "sum":
        return like.new_ones(())
    r = torch.ones_like(target, dtype=like.dtype)
    if reduction == "weighted_mean":
        if weight is not None:
            r = weight[target.clamp(0, len(weight) - 1)]
        if sample_weight is not None:
            r = r * sample_weight
    if ignore_index is not None:
        r = torch.where(target == ignore_index, 0.0, r)
    total = r.sum()
    return torch.where(total > 0, total, 1.0)


def class_stats(
    logits: Tensor, inputs: Inputs, f: Formula, ignore_index: int | None,
    losses: Tensor, grad: Tensor, saved: Tensor,
) -> ClassStats:  # fmt: skip
    """From (N, C) or (N, C, K) logits, row losses, the gradient and what a forward saves."""
    C = logits.shape[1]
    target = inputs.target.reshape(logits.shape[:1] + logits.shape[2:])
    y = target.clamp(0, C - 1)
    at = y.unsqueeze(1)
    z_y = logits.gather(1, at).squeeze(1).to(losses.dtype)
    for vector, sign in ((inputs.logit_bias, 1), (inputs.margin, -1)):
        if vector is not None:
            z_y = z_y + sign * vector[y]
    z_y = f.logit_scale * z_y
    if f.sigmoid:
        p = torch.sigmoid(z_y)
    else:
        M, R = (v.reshape(y.shape) for v in saved[1:])
        e_y = (z_y - M).exp()
        p = e_y / (R + e_y)
    g_y = grad.gather(1, at).squeeze(1).to(losses.dtype).abs()
    rows = torch.stack((torch.ones_like(p), losses.reshape(y.shape), g_y, p)).flatten(1)
    if ignore_index is not None:
        rows = rows.masked_fill(target.flatten() == ignore_index, 0.0)
    # One vector: of more dimensions index_add_ takes a call a row.
    into = y.flatten() + C * torch.arange(4, device=y.device).unsqueeze(1)
    sums = rows.new_zeros(4 * C).index_add_(0, into.flatten(), rows.flatten())
    count, loss, gradient, probability = sums.reshape(4, C)
    return ClassStats(count, loss, gradient, probability / count)
