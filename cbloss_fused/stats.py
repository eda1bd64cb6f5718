"""What each class contributes to a loss, from what the row kernels leave anyway."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import Inputs
from .options import LossSpec


class ClassStats(NamedTuple):
    """Statistics of each class, rows grouped by their targets: (C,) vectors in the loss's dtype.

    On a GPU an out-of-range target makes class 0 or C - 1 NaN, as it does its row.

    >>> import torch
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


def class_stats(
    logits: Tensor, inputs: Inputs, spec: LossSpec, losses: Tensor, grad: Tensor, saved: Tensor
) -> Tensor:
    """(4, C): rows, sums of losses and of |gradient at the target|, mean p, by the target's class.

    losses, grad, saved: what a forward leaves, of rows by their class indices.
    """
    C, f, inputs = logits.shape[1], spec.formula, inputs.by_row(logits)
    y = inputs.target.clamp(0, C - 1)
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
    added = torch.stack((torch.ones_like(p), losses.reshape(y.shape), g_y, p)).flatten(1)
    if spec.ignore_index is not None:
        added = added.masked_fill(inputs.target.flatten() == spec.ignore_index, 0.0)
    # One vector: of more dimensions index_add_ takes one call per row.
    into = y.flatten() + C * torch.arange(4, device=y.device).unsqueeze(1)
    sums = added.new_zeros(4 * C).index_add_(0, into.flatten(), added.flatten()).reshape(4, C)
    return torch.cat((sums[:3], sums[3:] / sums[:1]))  # no view: Dynamo refuses to unbind one here
