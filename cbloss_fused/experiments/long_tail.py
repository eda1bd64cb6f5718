"""Counts of long-tailed datasets, and the groups of classes by which accuracies are told."""

from __future__ import annotations

from torch import Tensor


def long_tailed_counts(n_max: int, imbalance: float, num_classes: int) -> list[int]:
    """The paper's rule, n_i = int(n_max mu^(i / (C - 1))) with mu = 1 / imbalance.

    >>> long_tailed_counts(5000, 50, 10)
    [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100]
    """
    return [int(n_max * (1 / imbalance) ** (i / (num_classes - 1))) for i in range(num_classes)]


def frequency_groups(counts: Tensor) -> dict[str, Tensor]:
    """Masks (C,) of the classes with many (> 100), medium, few (<= 20) samples, and with one."""
    return {
        "all": counts > 0,
        "many": counts > 100,
        "medium": (counts > 20) & (counts <= 100),
        "few": (counts > 0) & (counts <= 20),
        "one": counts == 1,
    }
