"""What describes a call below the edge: the formula's numbers and the tensors beside the logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "weighted_mean", "sum")  # the operators take the index


class Formula(NamedTuple):
    """The numbers of a loss, in the order in which the operators take them."""

    sigmoid: bool
    gamma: float
    gamma_neg: float  # of t = 0; gamma where none was given
    alpha: float  # factor of t = 1; 1 where none was given
    alpha_neg: float  # of t = 0: 1 - alpha, or 1
    clip: float
    label_smoothing: float
    z_loss: float
    logit_scale: float
    per_class: bool  # weight multiplies classes, not rows


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
    return Formula(
        activation == "sigmoid",
        _seen(gamma),
        _seen(gamma if gamma_neg is None else gamma_neg),
        1.0 if alpha is None else float(alpha),
        1.0 if alpha is None else 1.0 - float(alpha),
        _seen(clip),
        float(label_smoothing),
        float(z_loss),
        float(logit_scale),
        class_weighting == "class",
    )


def _seen(number: float) -> float:
    """What float32 has no normal number for changes no loss: 0, which kernels know by heart."""
    return float(number) if number > 1.2e-38 else 0.0


class Inputs(NamedTuple):
    """The tensors beside the logits, in the order in which the operators take them."""

    target: Tensor
    weight: Tensor | None = None
    sample_weight: Tensor | None = None
    normalizer: Tensor | None = None
    logit_bias: Tensor | None = None
    margin: Tensor | None = None


def is_dense(target: Tensor) -> bool:
    """Whether a target holds a number a class (soft or multi-hot), not class indices."""
    return target.dtype.is_floating_point or target.dtype is torch.bool
