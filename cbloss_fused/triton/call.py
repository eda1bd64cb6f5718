"""What a plan is made from, the form of a call, and what it is made of: launches."""

from __future__ import annotations

from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton.language as tl

from ..options import MEAN, Formula
from . import sigmoid
from .heuristics import Device

# The tensors of a call, by which launches name them; the last three are scratch.
SLOTS = (
    *("logits", "target", "weight", "sample_weight", "normalizer", "logit_bias", "margin"),
    *("pos_weight", "grad_loss"),
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
    ordinal: int | None  # which device: a launch keeps its kernel there
    backward: bool = False
    soft: tuple[torch.dtype, tuple[int, ...]] | None = None  # dtype and strides of soft targets
    access: int = 1  # elements that whole vectors of every row have, where targets are soft
    vector: bool = False  # one grad_loss per row
    in_place: bool = False
    weight: bool = False
    sample_weight: bool = False
    normalizer: bool = False
    logit_bias: bool = False
    margin: bool = False
    pos_weight: bool = False
    ignore_index: int | None = None
    background_index: int | None = None
    unknown: float | None = None  # what soft targets are where nobody knows them
    reduction: int = MEAN
    per_row: bool = False  # one loss per row
    saved: bool = False


class Launch:
    """One launch; `compiled` is kept here after the first."""

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        pointers: tuple[str | None, ...],
        scalars: tuple[float, ...],
        constants: tuple[Any, ...],
        warps: int,
        registers: int | None = None,  # most of them per thread, on NVIDIA's GPUs
    ) -> None:
        self.kernel, self.grid, self.warps = kernel, (*grid, 1, 1)[:3], warps
        self.registers = registers
        self.pointers, self.scalars, self.constants = pointers, scalars, constants
        nothing = len(SLOTS)
        self.pick = itemgetter(*(nothing if p is None else SLOTS.index(p) for p in pointers))
        self.tail = (*scalars, *constants)
        self.compiled: Any = None


class Plan(NamedTuple):
    """The launches of a call and the elements of its scratch: scale, losses, parts."""

    launches: tuple[Launch, ...]
    scale: int = 0
    losses: int = 0
    parts: int = 0


# What launches of every kind are given of a call

GENERAL: int = sigmoid.GENERAL.value


def sizes_of(call: Call) -> tuple[int, int, int]:
    N, C, *inner = call.shape
    return N, C, inner[0] if inner else 1


def strides_of(call: Call, strides: tuple[int, ...] | None) -> tuple[int, int, int]:
    """Of samples, classes and inner positions; 1 where there is only one class."""
    n, c, *k = call.x_strides if strides is None else strides
    return n, 1 if call.shape[1] == 1 else c, k[0] if k else 0


def compute_type(call: Call) -> Any:
    return tl.float64 if call.dtype is torch.float64 else tl.float32


def outputs_of(call: Call, parts: int, rows: int) -> tuple[str | None, ...]:
    """losses, saved"""
    direct = call.per_row and parts <= rows
    return "loss" if direct else "losses", "saved" if call.saved else None


def adjusting(call: Call) -> tuple[str | None, str | None]:
    """logit_bias, margin"""
    return "logit_bias" if call.logit_bias else None, "margin" if call.margin else None


def positives(call: Call) -> str | None:
    """pos_weight"""
    return "pos_weight" if call.pos_weight else None


def adjusts(call: Call) -> bool:
    return call.logit_bias or call.margin or call.formula.logit_scale != 1


def softmax_scalars(call: Call) -> tuple[float, ...]:
    f = call.formula
    return f.gamma, f.label_smoothing, f.z_loss, f.logit_scale


def sigmoid_scalars(call: Call) -> tuple[float, ...]:
    f = call.formula
    rest = (f.clip, f.label_smoothing, f.logit_scale)
    return f.gamma, f.gamma_neg, f.alpha, f.alpha_neg, *rest


def has_alpha(f: Formula) -> bool:
    return (f.alpha, f.alpha_neg) != (1, 1)


def gamma_code(f: Formula, only_general: bool) -> int:
    """Which code of sigmoid.py a formula takes: csrc/call.h has the same rule.

    only_general: the call has something else that only the general code has.
    """
    if f.clip:
        return sigmoid.CLIPPED.value
    if only_general or f.gamma_neg != f.gamma:
        return GENERAL
    codes = {0.0: sigmoid.ZERO, 0.5: sigmoid.HALF, 1.0: sigmoid.ONE, 2.0: sigmoid.TWO}
    return codes.get(f.gamma, sigmoid.ANY).value


def class_index_code(f: Formula) -> int:
    """gamma_code of class indices: smoothing gives every class both factors of alpha."""
    return gamma_code(f, bool(f.label_smoothing) and has_alpha(f))
