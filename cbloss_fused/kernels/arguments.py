"""What steps of every kind are given of a call: sizes, numbers, outputs, which sigmoid code."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from ..call import Formula
from . import sigmoid as sigmoid_kernels
from .steps import Call

GENERAL: int = sigmoid_kernels.GENERAL.value


def sizes_of(call: Call) -> tuple[int, int, int]:
    N, C, *inner = call.shape
    return N, C, inner[0] if inner else 1


def strides_of(call: Call, strides: tuple[int, ...] | None) -> tuple[int, int, int]:
    """Of samples, classes and inner positions; 1 where there is but one class."""
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


def adjusts(call: Call) -> bool:
    return call.logit_bias or call.margin or call.formula.logit_scale != 1


def softmax_numbers(call: Call) -> tuple[float, ...]:
    f = call.formula
    return f.gamma, f.label_smoothing, f.z_loss, f.logit_scale


def sigmoid_numbers(call: Call) -> tuple[float, ...]:
    f = call.formula
    rest = (f.clip, f.label_smoothing, f.logit_scale)
    return f.gamma, f.gamma_neg, f.alpha, f.alpha_neg, *rest


def has_alpha(f: Formula) -> bool:
    return (f.alpha, f.alpha_neg) != (1, 1)


def gamma_kind(f: Formula) -> int:
    if f.clip:
        return sigmoid_kernels.CLIPPED.value
    if f.gamma_neg != f.gamma or (f.label_smoothing and has_alpha(f)):
        return GENERAL
    kinds = {0.0: sigmoid_kernels.ZERO, 0.5: sigmoid_kernels.HALF, 1.0: sigmoid_kernels.ONE}
    return kinds.get(f.gamma, sigmoid_kernels.TWO if f.gamma == 2 else sigmoid_kernels.ANY).value
