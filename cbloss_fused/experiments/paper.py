"""The losses of the paper's search, and the error rates that it has for them."""

from __future__ import annotations

import csv
from functools import lru_cache
from importlib.resources import files
from itertools import product
from typing import Any, NamedTuple

IMBALANCES = (200, 100, 50, 20, 10)  # as the paper orders them
BETAS = (0.0, 0.9, 0.99, 0.999, 0.9999)  # 0: the plain loss
GAMMAS = (0.5, 1.0, 2.0)
FAMILIES = {"softmax": "SM", "sigmoid": "SGM", "focal": "Focal"}  # in the paper's tables


class Loss(NamedTuple):
    """A loss of the search; gamma is None but for the focal loss."""

    family: str
    gamma: float | None
    beta: float

    @property
    def name(self) -> str:
        """As in --losses: softmax, sigmoid-0.9, focal-0.5-0.999."""
        parts = [self.family] + [f"{x:g}" for x in (self.gamma, self.beta or None) if x is not None]
        return "-".join(parts)

    @property
    def title(self) -> str:
        """For tables."""
        focal = "" if self.gamma is None else f", γ = {self.gamma:g}"
        return self.family + focal + (f", β = {self.beta:g}" if self.beta else "")

    @property
    def sigmoid(self) -> bool:
        """The head starts at p = 1 / C, and its bias does not decay."""
        return self.family != "softmax"

    @property
    def options(self) -> dict[str, Any]:
        """Of ClassBalancedLoss."""
        if not self.sigmoid:
            return {"beta": self.beta}
        return {"beta": self.beta, "activation": "sigmoid", "gamma": self.gamma or 0.0}


KINDS = (("softmax", None), ("sigmoid", None), *(("focal", gamma) for gamma in GAMMAS))
LOSSES = {loss.name: loss for loss in (Loss(*kind, beta) for kind, beta in product(KINDS, BETAS))}


@lru_cache(1)
def _error_rates() -> dict[tuple[str, str, str, float], dict[str, str]]:
    text = files(__package__).joinpath("paper_error_rates.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    return {(r["dataset"], r["loss"], r["gamma"], float(r["beta"])): r for r in rows}


def paper_error_rate(dataset: str, loss: Loss, imbalance: int) -> float:
    """In %; dataset is CIFAR-10-LT, CIFAR-20-LT or CIFAR-100-LT.

    Source: Cui et al., CVPR 2019 (arXiv 1901.05555), Figures 8 to 10.

    >>> paper_error_rate("CIFAR-10-LT", LOSSES["focal-1-0.9999"], 100)
    25.43
    """
    gamma = "" if loss.gamma is None else str(loss.gamma)
    row = _error_rates()[dataset, FAMILIES[loss.family], gamma, loss.beta]
    return float(row[f"imb{imbalance}"])
