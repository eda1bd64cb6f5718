"""What a plan is made from, the form of a call, and what it is made of: launches."""

from __future__ import annotations

from operator import itemgetter
from typing import Any, NamedTuple

import torch

from ..call import REDUCTIONS, Formula
from .layout import Device

# The tensors of a call, by which steps name them; the last three are scratch.
SLOTS = (
    *("logits", "target", "weight", "sample_weight", "normalizer", "logit_bias", "margin"),
    "grad_loss",
    *("loss", "grad", "saved", "scale", "losses", "parts"),
)


class Call(NamedTuple):
    """The form of a call: all that the choice of kernels may depend on."""

    shape: tuple[int, ...]  # (N, C) or (N, C, K)
    dtype: torch.dtype
    x_strides: tuple[int, ...]
    g_strides: tuple[int, ...] | None  # None: no gradient
    aligned: bool  # rows of grad lie modulo 16 bytes as those of logits do
    formula: Formula
    device: Device
    ordinal: int | None  # which device: a step keeps its kernel there
    backward: bool = False
    soft: tuple[torch.dtype, tuple[int, ...]] | None = None  # dtype and strides of soft targets
    access: int = 1  # elements that whole vectors of every row have, where targets are soft
    vector: bool = False  # a grad_loss a row
    in_place: bool = False
    weight: bool = False
    sample_weight: bool = False
    normalizer: bool = False
    logit_bias: bool = False
    margin: bool = False
    ignore_index: int | None = None
    reduction: int = REDUCTIONS.index("mean")
    per_row: bool = False  # a loss a row
    saved: bool = False


class Step:
    """One launch; `compiled` is kept here after the first."""

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        pointers: tuple[str | None, ...],
        numbers: tuple[float, ...],
        constants: tuple[Any, ...],
        warps: int,
        registers: int | None = None,  # at most so many a thread, on NVIDIA's GPUs
    ) -> None:
        self.kernel, self.grid, self.warps = kernel, (*grid, 1, 1)[:3], warps
        self.registers = registers
        self.pointers, self.numbers, self.constants = pointers, numbers, constants
        nothing = len(SLOTS)
        self.pick = itemgetter(*(nothing if p is None else SLOTS.index(p) for p in pointers))
        self.tail = (*numbers, *constants)
        self.compiled: Any = None


class Plan(NamedTuple):
    """The steps of a call and the elements of its scratch: scale, losses, parts."""

    steps: tuple[Step, ...]
    scale: int = 0
    losses: int = 0
    parts: int = 0
