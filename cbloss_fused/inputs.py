"""The tensors of a call beside the logits, and what follows from them and from the formula."""

from __future__ import annotations

from functools import lru_cache
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from .options import Formula

WITHOUT_FLOAT64 = ("mps",)  # types of devices


class Inputs(NamedTuple):
    """The tensors beside the logits, in the order in which the operators take them."""

    target: Tensor
    weight: Tensor | None = None
    sample_weight: Tensor | None = None
    normalizer: Tensor | None = None
    logit_bias: Tensor | None = None
    margin: Tensor | None = None
    pos_weight: Tensor | None = None

    def of_gradient(self) -> tuple[Tensor | None, ...]:
        """Those that the operator gradient takes."""
        target, weight, _, _, logit_bias, margin, pos_weight = self
        return target, weight, logit_bias, margin, pos_weight

    def by_row(self, logits: Tensor) -> Inputs:
        """What has one number per row in the shape of the rows of (N, C) or (N, C, K) logits."""
        shape = logits.shape[:1] + logits.shape[2:]
        found = self
        if not is_soft(self.target):
            found = found._replace(target=self.target.reshape(shape))
        if self.sample_weight is not None:
            found = found._replace(sample_weight=self.sample_weight.reshape(shape))
        return found


def is_soft(target: Tensor) -> bool:
    """Whether a target holds one number per class (soft or multi-hot), not class indices."""
    return target.dtype.is_floating_point or target.dtype is torch.bool


def weights_classes(formula: Formula, target: Tensor) -> bool:
    """Whether weight multiplies the classes' terms: then the backward needs it too."""
    return formula.per_class or (not formula.sigmoid and is_soft(target))


def class_by_class(formula: Formula, inputs: Inputs) -> bool:
    """Whether each class of a row has a target or a factor of its own: some kernels have not."""
    if formula.per_class or is_soft(inputs.target):
        return True
    return inputs.pos_weight is not None and formula.label_smoothing != 0


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a loss of logits of a dtype is computed in: float64 for float64, else float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def sum_dtype(device: torch.device) -> torch.dtype:
    """What sums over rows are kept in: above 2**24 rows float32 does not count."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def known_labels(target: Tensor, ignore_index: int | None) -> Tensor | None:
    """Which elements of multi-hot targets are not ignore_index; None: all."""
    unknown = unknown_label(target.dtype, ignore_index)
    return None if unknown is None else target != unknown


@lru_cache
def unknown_label(dtype: torch.dtype, ignore_index: int | None) -> float | None:
    """ignore_index as an element of multi-hot targets; None: no element is ignored."""
    if ignore_index is None or not dtype.is_floating_point:
        return None
    rounded = torch.tensor(ignore_index, dtype=torch.float64, device="cpu").to(dtype).item()
    return rounded if rounded > -inf else None
