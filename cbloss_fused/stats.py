"""What each class contributes to a loss, from what the row kernels leave anyway."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import Inputs, sum_dtype
from .options import LossSpec
from .reference import sigmoid_element, softmax_row


class ClassStats(NamedTuple):
    """Statistics of each class, rows grouped by their targets: (C,) vectors.

    On a GPU an out-of-range target makes class 0 or C - 1 NaN, as it does its row; there, torch's
    own operators make the statistics. `torch.load` with weights_only loads them from a checkpoint.

    Attributes:
        rows: int64, how many rows, without ignored ones.
        loss: float64 (float32 on Apple's GPUs), as all others; the sum of what these rows add to
            the loss.
        gradient: the sum of |d loss / d logit| at these rows' own targets.
        probability: the mean p of the target, softmax or sigmoid; NaN where there is no row.

    >>> import torch
    >>> from cbloss_fused import class_balanced_loss
    >>> logits, target = torch.zeros(4, 2, requires_grad=True), torch.tensor([0, 0, 0, 1])
    >>> loss, stats = class_balanced_loss(logits, target, return_stats=True)
    >>> stats.rows, stats.loss / stats.loss.sum()
    (tensor([3, 1]), tensor([0.7500, 0.2500], dtype=torch.float64))
    """

    rows: Tensor
    loss: Tensor
    gradient: Tensor
    probability: Tensor

    @classmethod
    def of(cls, stats: Tensor) -> ClassStats:
        """From (4, C)."""
        rows, loss, gradient, probability = stats.unbind()  # iterating takes five times as long
        return cls(rows.long(), loss, gradient, probability)


torch.serialization.add_safe_globals([ClassStats])


def class_stats(
    logits: Tensor, inputs: Inputs, spec: LossSpec, losses: Tensor, saved: Tensor
) -> Tensor:
    """(4, C) of sum_dtype: rows, sums of losses and of |gradient at the target|, mean p, by class.

    losses, saved: what a forward leaves, of rows by their class indices.
    """
    C, f, inputs = logits.shape[1], spec.formula, inputs.by_row(logits)
    y = inputs.target.clamp(0, C - 1)
    z_y = logits.gather(1, y.unsqueeze(1)).squeeze(1).to(losses.dtype)
    for vector, sign in ((inputs.logit_bias, 1), (inputs.margin, -1)):
        if vector is not None:
            z_y = z_y + sign * vector[y]
    wide = sum_dtype(logits.device)
    z_y = (f.logit_scale * z_y).to(wide)
    r, *rest = (v.reshape(y.shape).to(wide) for v in saved.unbind())
    if f.sigmoid:
        t = (1 - f.label_smoothing) + f.label_smoothing / C
        (_, g_0), (_, g_1) = (
            sigmoid_element(z_y, f.gamma_neg, f.clip),
            sigmoid_element(-z_y, f.gamma),
        )
        v = 1.0 if inputs.pos_weight is None else inputs.pos_weight[y]
        p, g_y = torch.sigmoid(z_y), r * (f.alpha_neg * (1 - t) * g_0 - v * f.alpha * t * g_1)
    else:
        M, R = rest
        z_y = torch.minimum(z_y, M)  # M is finite where the largest logit is not
        d = torch.where(z_y == M, 0.0, z_y - M)
        p = d.exp() / (R + d.exp())
        g_y = softmax_row(d, R, r, 0.0, C, M, f)[2]
    if f.per_class and inputs.weight is not None:
        g_y = g_y * inputs.weight[y]
    into, keep = y.flatten(), torch.ones_like(y, dtype=torch.bool)
    for index in (spec.ignore_index, spec.background_index):
        if index is not None:
            keep &= inputs.target != index
    sums = []
    losses = losses.reshape(y.shape).to(wide)
    for value in (keep.to(wide), losses, (f.logit_scale * g_y).abs(), p):
        kept = torch.where(keep, value, 0.0)
        sums.append(kept.new_zeros(C).index_add_(0, into, kept.flatten()))
    rows, loss, gradient, probability = sums
    return torch.stack((rows, loss, gradient, probability / rows))
