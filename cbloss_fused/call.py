"""What describes a call below the edge: the formula's numbers and the tensors beside the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "weighted_mean", "sum")  # the operators take the index
TINY = 1.2e-38  # float32's smallest normal number, rounded up
GRANTED = (1.0, 1.0, 0.0, 1.0, False)  # alpha to per_class of most losses; gamma_neg is gamma


class Formula(NamedTuple):
    """The numbers of a loss: what the operators take as float[], in this order."""

    sigmoid: bool
    gamma: float
    label_smoothing: float
    z_loss: float
    gamma_neg: float  # of t = 0; gamma where none was given
    alpha: float  # factor of t = 1; 1 where none was given
    alpha_neg: float  # of t = 0: 1 - alpha, or 1
    clip: float
    logit_scale: float
    per_class: bool  # class_weighting="class"

    def weighs_classes(self, target: Tensor) -> bool:
        """Whether weight multiplies the classes' terms: then the backward needs it too."""
        return self.per_class or (not self.sigmoid and is_dense(target))

    def short(self) -> tuple[float, ...]:
        """Without what the operators take for granted: each number costs 0.2 us of host time."""
        return self[:4] if self[4:] == (self.gamma, *GRANTED) else self

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Formula:
        """From what an operator was given."""
        if len(numbers) == 4:
            numbers = (*numbers, numbers[1], *GRANTED)
        sigmoid, *rest, per_class = numbers
        return cls._make((bool(sigmoid), *rest, bool(per_class)))


def formula(
    activation: str = "softmax",
    gamma: float = 0.0,
    gamma_neg: float | None = None,
    alpha: float | None = None,
    clip: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    class_weighting: str = "sample",
) -> Formula:
    """From the options of `class_balanced_loss`, which spec.py checks."""
    if gamma_neg is None:
        gamma_neg = gamma
    # Below float32's normal numbers nothing changes a loss: 0, which kernels have code for.
    return Formula(
        activation == "sigmoid",
        float(gamma) if gamma > TINY else 0.0,
        float(label_smoothing),
        float(z_loss),
        float(gamma_neg) if gamma_neg > TINY else 0.0,
        1.0 if alpha is None else float(alpha),
        1.0 if alpha is None else 1.0 - float(alpha),
        float(clip) if clip > TINY else 0.0,
        float(logit_scale),
        class_weighting == "class",
    )


class Inputs(NamedTuple):
    """The tensors beside the logits, in the order in which the operators take them."""

    target: Tensor
    weight: Tensor | None = None
    sample_weight: Tensor | None = None
    normalizer: Tensor | None = None
    logit_bias: Tensor | None = None
    margin: Tensor | None = None

    def by_row(self, logits: Tensor) -> Inputs:
        """What has one number per row in the shape of the rows of (N, C) or (N, C, K) logits."""
        shape = logits.shape[:1] + logits.shape[2:]
        found = self
        if not is_dense(self.target):
            found = found._replace(target=self.target.reshape(shape))
        if self.sample_weight is not None:
            found = found._replace(sample_weight=self.sample_weight.reshape(shape))
        return found


def is_dense(target: Tensor) -> bool:
    """Whether a target holds one number per class (soft or multi-hot), not class indices."""
    return target.dtype.is_floating_point or target.dtype is torch.bool
