"""Class-balanced losses in plain PyTorch, as a good user writes them: what timings compare with.

Each is guarded so that its gradient is finite. All take logits (N, C), class indices (N,), weights
(C,) and gamma, and return the mean over rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

bce = F.binary_cross_entropy_with_logits
PlainLoss: TypeAlias = Callable[..., Tensor]  # logits, target, weight, gamma


def plain_formulas(activation: str, gamma: float) -> tuple[PlainLoss, PlainLoss]:
    """Two formulas of a loss, of which one or the other is faster; the first compiles best."""
    formulas: dict[tuple[str, bool], tuple[PlainLoss, PlainLoss]] = {
        ("softmax", False): (ce_none, ce_sum),
        ("softmax", True): (log_softmax, ce_none),
        ("sigmoid", False): (softplus, bce_sum),
        ("sigmoid", True): (softplus, bce_none),
    }
    return formulas[activation, gamma > 0]


def ce_none(x: Tensor, y: Tensor, w: Tensor, gamma: float = 0.0) -> Tensor:
    """Softmax: the row losses of F.cross_entropy, q = 1 - p from them."""
    nll = F.cross_entropy(x.float(), y, reduction="none")
    return (w[y] * (_focus(nll, gamma) * nll if gamma else nll)).mean()


def ce_sum(x: Tensor, y: Tensor, w: Tensor, gamma: float) -> Tensor:
    """Softmax, gamma = 0: F.cross_entropy applies the weights and sums."""
    return F.cross_entropy(x.float(), y, weight=w, reduction="sum") / y.numel()


def log_softmax(x: Tensor, y: Tensor, w: Tensor, gamma: float) -> Tensor:
    """Softmax: F.log_softmax of all classes, then the target's."""
    nll = -F.log_softmax(x.float(), 1).gather(1, y.unsqueeze(1)).squeeze(1)
    return (w[y] * (_focus(nll, gamma) * nll)).mean()


def bce_none(x: Tensor, y: Tensor, w: Tensor, gamma: float) -> Tensor:
    """Sigmoid: F.binary_cross_entropy_with_logits with one-hot targets, 1 - p_t from it."""
    nll = bce(x.float(), one_hot(x, y), reduction="none")
    return (w[y] * (_focus(nll, gamma) * nll).sum(1)).mean()


def bce_sum(x: Tensor, y: Tensor, w: Tensor, gamma: float) -> Tensor:
    """Sigmoid, gamma = 0: F.binary_cross_entropy_with_logits applies the weights and sums."""
    return (
        F.binary_cross_entropy_with_logits(
            x.float(), one_hot(x, y), w[y].unsqueeze(1), reduction="sum"
        )
        / y.numel()
    )


def softplus(x: Tensor, y: Tensor, w: Tensor, gamma: float) -> Tensor:
    """Sigmoid without one-hot targets: every class as a negative, then the target's term exchanged.

    No other eager formula reads and writes less. It cancels for logits beyond some 1000.
    """

    def term(z: Tensor) -> Tensor:
        nll = F.softplus(z)
        return torch.exp(gamma * (z - nll)) * nll if gamma else nll

    z = x.float()
    z_y = z.gather(1, y.unsqueeze(1)).squeeze(1)
    return (w[y] * (term(z).sum(1) + term(-z_y) - term(z_y))).mean()


def _focus(nll: Tensor, gamma: float) -> Tensor:
    """(1 - p)^gamma from -log p; away from 0, where the power has no finite derivative."""
    return torch.pow((-torch.expm1(-nll)).clamp_min(1e-30), gamma)


def one_hot(x: Tensor, y: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=torch.float32).scatter_(1, y.unsqueeze(1), 1.0)
