"""The values that tests are parametrized with, and their names."""

from __future__ import annotations

import torch

from cbloss_fused.options import Activation, Reduction

FAMILIES: tuple[Activation, ...] = ("softmax", "sigmoid")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
GAMMAS = (0.0, 0.1, 0.5, 1.0, 2.0, 4.0, 5.0)
REDUCTIONS: tuple[Reduction, ...] = ("none", "mean", "weighted_mean", "sum")
IGNORED = -100


def name_of(value: object) -> str | None:
    """Ids of parameters: float16, g0.5 is left to the caller."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None
