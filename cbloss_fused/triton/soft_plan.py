"""The launches of soft targets, and of class indices whose classes have weights."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import triton

from . import soft_softmax as softmax_kernels
from . import soft_targets as soft_kernels
from . import tiles as tile_kernels
from .call import (
    GENERAL,
    Call,
    Launch,
    adjusting,
    adjusts,
    compute_type,
    gamma_code,
    has_alpha,
    outputs_of,
    positives,
    sigmoid_scalars,
    sizes_of,
    softmax_scalars,
)
from .heuristics import SoftTile, sigmoid_soft_tile, softmax_soft_tile
from .row_scales import RowScales

UNIT_C: int = tile_kernels.UNIT_C.value
UNIT_K: int = tile_kernels.UNIT_K.value


def by_class(call: Call) -> bool:
    """Whether each class of a row has a target or a factor of its own, as in inputs.py."""
    f = call.formula
    return call.soft is not None or f.per_class or (call.pos_weight and f.label_smoothing != 0)


class SoftMemory(NamedTuple):
    """How logits, targets and gradient lie."""

    unit: int  # what lies side by side: UNIT_C, UNIT_K or neither
    access: int  # elements of one access
    strides: tuple[tuple[int, ...], ...]  # of logits, target, grad


def _soft_memory(call: Call) -> SoftMemory:
    t_strides = None if call.soft is None else call.soft[1]
    given = (call.x_strides, t_strides, call.g_strides)
    strides = tuple((*(s or (0, 0)), 0)[:3] for s in given)
    used = [stride for stride, s in zip(strides, given, strict=True) if s is not None]
    unit = UNIT_C if all(stride[1] == 1 for stride in used) else 0
    if not unit and sizes_of(call)[2] > 1 and all(stride[2] == 1 for stride in used):
        unit = UNIT_K
    return SoftMemory(unit, call.access if unit == UNIT_C else 1, strides)


def _sigmoid_tile(call: Call, memory: SoftMemory, code: int) -> SoftTile:
    many = code >= GENERAL or (call.pos_weight and call.soft is None)  # registers
    return sigmoid_soft_tile(call.shape[1], memory.unit == UNIT_K, many)


def soft_launch(call: Call, r: RowScales) -> Launch:
    """The rows of a loss, or of a recomputing backward."""
    N, C, K = sizes_of(call)
    f, memory = call.formula, _soft_memory(call)
    sizes = (N * K, C, K, *itertools.chain(*memory.strides))
    lies = (compute_type(call), memory.unit, memory.access)
    weighs_terms = call.weight and (f.per_class or not f.sigmoid)
    inputs = (
        *("logits", "target", "weight" if weighs_terms else None),
        "sample_weight" if call.sample_weight and call.soft is not None else None,
        "normalizer" if call.normalizer else None,
        None if call.g_strides is None else "grad",
        None if r.prologue is None else "scale",
        "parts" if r.labels else None,
    )
    incoming = "grad_loss" if call.backward else None
    losses = None if call.backward else outputs_of(call, N * K, N * K)[0]
    outputs = (incoming, losses, "saved" if call.saved or call.backward else None)
    options = (r.fold, call.vector, call.per_row)
    bias, margin = adjusting(call)
    constants: tuple[Any, ...]
    scalars: tuple[float, ...]
    pointers: tuple[str | None, ...]
    if f.sigmoid:
        code = gamma_code(f, has_alpha(f))
        tile = _sigmoid_tile(call, memory, code)
        pointers = (*inputs, bias, margin, positives(call), *outputs)
        background, unknown = call.background_index, call.unknown
        scalars = (*sizes, *sigmoid_scalars(call), r.denominator, background or 0, unknown or 0.0)
        constants = (tile.rows, tile.classes, *lies)
        constants += (code, has_alpha(f), adjusts(call), call.soft is None)
        constants += (background is not None, unknown is not None, *options)
        kernel = soft_kernels.sigmoid_soft
    else:
        pointers = (*inputs, bias, *outputs)
        scalars = (*sizes, *softmax_scalars(call), r.denominator)
        smooth, z = f.label_smoothing != 0, f.z_loss != 0
        tile = softmax_soft_tile(C, call.dtype.itemsize)
        constants = (tile.rows, tile.classes, *lies)
        constants += (tile.single, smooth, z, adjusts(call), *options)
        kernel = softmax_kernels.softmax_soft
    # So that two programs fit: one computes while another waits for memory.
    registers = 65536 // (2 * 32 * tile.warps) if tile.warps > 4 else None
    grid = (triton.cdiv(N * K, tile.rows),)
    return Launch(kernel, grid, pointers, scalars, constants, tile.warps, registers)


def label_weights_launch(call: Call) -> Launch:
    """r_i of soft targets into parts, where a mean divides by their sum."""
    N, C, K = sizes_of(call)
    memory = _soft_memory(call)
    tile = _sigmoid_tile(call, memory, 0)
    sample_weight = "sample_weight" if call.sample_weight else None
    sizes = tile.rows, tile.classes, compute_type(call)
    return Launch(
        soft_kernels.label_weights,
        (triton.cdiv(N * K, tile.rows),),
        ("target", "weight", sample_weight, "parts"),
        (N * K, C, K, *memory.strides[1], call.unknown or 0.0),
        (*sizes, memory.unit, memory.access, call.unknown is not None),
        tile.warps,
    )
