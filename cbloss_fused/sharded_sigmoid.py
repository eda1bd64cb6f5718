"""Sigmoid losses of classes over ranks: one pass over a part; the ranks' losses add up.

A row whose target is another rank's is a background row of this part. The kernels smooth a target
over their own columns: what that changes at the target itself is made up for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import Backend
from .options import REDUCTIONS, Formula
from .reference import sigmoid_element
from .row_weights import weighted
from .shards import ELSEWHERE, IGNORED, Part, at, put, target_logit

SUM = REDUCTIONS.index("sum")
MARKS = IGNORED, ELSEWHERE


def sigmoid_losses(
    logits: Tensor, part: Part, backend: Backend, r: Tensor, grad: Tensor | None
) -> Tensor:
    """(rows,) losses of this rank's columns; fills grad, which may be logits.

    r: r_i over the denominator, negative where the row is ignored.
    """
    losses = torch.zeros_like(r)
    if not part.columns():
        return losses
    used = torch.where(r < 0, 0.0, r)
    z = (
        target_logit(logits, part, part.column()) if _smooths(part) else None
    )  # before grad is there
    numbers, inputs = _own(part).numbers(), part.inputs._replace(sample_weight=used)
    backend.loss(logits, *inputs, numbers, *MARKS, SUM, losses, grad, None)
    if z is not None:
        more, g_y = _at_target(z, part)
        losses += torch.where(part.here, weighted(used, more), 0.0)
        if grad is not None:
            _put(grad, part, used * g_y)
    return losses


def sigmoid_gradient(
    logits: Tensor, part: Part, backend: Backend, saved: Tensor, incoming: Tensor, grad: Tensor
) -> None:
    """Fill grad, which may be logits, once more, for an incoming gradient: 0-d, or one per row."""
    if not part.columns():
        return
    z = (
        target_logit(logits, part, part.column()) if _smooths(part) else None
    )  # before grad is there
    numbers, vectors = _own(part).numbers(), part.inputs.of_gradient()
    backend.gradient(logits, *vectors, saved, incoming, numbers, *MARKS, grad)
    if z is not None:
        _put(grad, part, saved[0] * incoming * _at_target(z, part)[1])


def saved_scale(r: Tensor) -> Tensor:
    """What sigmoid_gradient takes as saved, (1, rows)."""
    return torch.where(r < 0, -1.0, r).unsqueeze(0)


def target_statistics(logits: Tensor, part: Part, r: Tensor) -> tuple[Tensor, Tensor]:
    """(rows,) |gradient at the target| and p of the target, of the rows that are here."""
    z = target_logit(logits, part, part.column())
    return (r * _at_target(z, part)[1]).abs(), torch.sigmoid(z)


def _own(part: Part) -> Formula:
    """Whose smoothed target of the other columns is that of all classes: eps / C."""
    f, shards = part.spec.formula, part.shards
    eps = f.label_smoothing * part.columns() / shards.num_classes
    return f._replace(label_smoothing=eps)


def _smooths(part: Part) -> bool:
    return part.spec.formula.label_smoothing > 0 and part.columns() < part.shards.num_classes


def _at_target(z: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """Of a row with r = 1: what is missing of the target's loss; the gradient at the target."""
    f, inputs, column = part.spec.formula, part.inputs, part.column()
    t, own = (1 - e + f.label_smoothing / part.shards.num_classes
              for e in (f.label_smoothing, _own(part).label_smoothing))  # fmt: skip
    (L_0, g_0), (L_1, g_1) = (
        sigmoid_element(z, f.gamma_neg, f.clip),
        sigmoid_element(-z, f.gamma),
    )
    a_0, a_1 = torch.full_like(z, f.alpha_neg), torch.full_like(z, f.alpha)
    if inputs.pos_weight is not None:
        a_1 = a_1 * inputs.pos_weight[column]
    if inputs.weight is not None:
        a_0, a_1 = a_0 * inputs.weight[column], a_1 * inputs.weight[column]
    more = (own - t) * (weighted(a_0, L_0) - weighted(a_1, L_1))
    return more, f.logit_scale * (a_0 * (1 - t) * g_0 - a_1 * t * g_1)


def _put(grad: Tensor, part: Part, g_y: Tensor) -> None:
    """At the targets that are here."""
    column = part.column()
    put(grad, column, torch.where(part.here, g_y.to(grad.dtype), at(grad, column)))
