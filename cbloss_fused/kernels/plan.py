"""Which kernels a call takes, over which grid, with which blocks: a pure function of its form.

At most three launches forward, four where soft targets are weighted and a mean divides by the sum
of their row weights, and one backward.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..call import Formula
from . import dense as dense_kernels
from . import rows as step_kernels
from . import sigmoid as sigmoid_kernels
from . import softmax as softmax_kernels
from . import tiles as tile_kernels
from .layout import (
    FEW_CLASSES,
    Config,
    Device,
    SoftConfig,
    config,
    sigmoid_dense_config,
    softmax_dense_config,
    tile_config,
)
from .steps import Call, Plan, Step

PARTIALS: int = step_kernels.PARTIALS.value
SHARE = 1024  # rows of a prologue's step
GENERAL: int = sigmoid_kernels.GENERAL.value
UNIT_C: int = tile_kernels.UNIT_C.value
UNIT_K: int = tile_kernels.UNIT_K.value
MEAN, WEIGHTED_MEAN = 1, 2  # of call.REDUCTIONS


@lru_cache(maxsize=256)
def scaling(
    numel: int, dtype: torch.dtype, factor: torch.dtype, device: Device, ordinal: int | None
) -> Plan:
    """The step that multiplies a stored gradient of a dtype by a factor of another, or leaves it.

    A step keeps its compiled kernel, so all that its code depends on is a part of the key.
    """
    VEC = 16 // dtype.itemsize
    programs = max(1, min(triton.cdiv(numel, 1024 * VEC), 4 * device.sms))
    pointers, constants = ("grad", "grad_loss"), (512, VEC)
    kernel = step_kernels.scale_gradient
    return Plan((Step(kernel, (programs,), pointers, (numel,), constants, 4),))


# Plans --------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def plan(call: Call) -> Plan | None:
    """The steps of a call; None where an index that the kernels keep in 32 bits could overflow."""
    N, C, K = _sizes(call)
    strides = (_strides(call, s)[1] for s in (call.x_strides, call.g_strides))
    if max(8 * N * K, C, *(() if _by_class(call) else strides)) >= 2**31:
        return None
    if call.backward:
        return Plan((_gradient(call),))
    rows = N * K
    r = _row_scales(call, rows)
    parts_size = 0
    if _by_class(call):
        main = _dense(call, r)
        parts = rows if call.per_row else main.grid[0]
        steps, parts_size = [main], rows if r.labels else 0
    elif _in_tiles(call):
        main = _tiles(call, r)
        parts = main.grid[0]
        steps = [main]
    elif call.formula.sigmoid:
        main = _sigmoid_rows(call, r)
        parts = rows * main.grid[1]
        steps = [main]
    else:
        steps, parts_size = _softmax_rows(call, r)
        parts = rows
    direct = call.per_row and parts <= rows  # the row kernel writes the losses themselves
    if r.prologue is not None and steps[0].kernel is not softmax_kernels.softmax_parts:
        shares = triton.cdiv(rows, triton.cdiv(rows, PARTIALS * SHARE) * SHARE)
        steps.insert(0, Step(step_kernels.prologue, (shares,), *r.prologue, 4))
    if r.labels:
        steps.insert(0, _label_weights(call))
    if not direct:
        count, programs = (parts // rows, rows) if call.per_row else (parts, 1)
        block, warps = (1024, 4) if count <= 4096 else (16384, 32)
        pointers = ("losses", "loss")
        steps.append(Step(step_kernels.epilogue, (programs,), pointers, (count,), (block,), warps))
    scale_size = PARTIALS + rows if r.prologue is not None else 0
    return Plan(tuple(steps), scale_size, 0 if direct else parts, parts_size)


class RowScales(NamedTuple):
    """How a row kernel comes by r_i and the denominator, and the prologue that leaves them."""

    prologue: tuple[Any, Any, Any] | None  # pointers, numbers, constants
    denominator: float
    fold: bool  # the denominator is the sum of the prologue's parts
    labels: bool = False  # before, a kernel leaves r_i of soft targets in parts


def _row_scales(call: Call, rows: int) -> RowScales:
    if call.soft is not None:
        return _soft_row_scales(call, rows)
    ignore = call.ignore_index is not None
    mean = call.reduction in (MEAN, WEIGHTED_MEAN)
    weight = call.weight and not call.formula.per_class
    needed = weight or call.sample_weight or ignore
    fold = needed and call.reduction == WEIGHTED_MEAN
    fold |= ignore and call.reduction == MEAN and not call.normalizer
    denominator = float(rows) if mean and not fold else 1.0
    if not needed:
        return RowScales(None, denominator, False)
    pointers = (
        "target",
        "weight" if weight else None,
        "sample_weight" if call.sample_weight else None,
        "scale",
    )
    numbers = (rows, call.shape[1], call.ignore_index if ignore else 0)
    constants = (ignore, call.reduction == WEIGHTED_MEAN, SHARE)
    return RowScales((pointers, numbers, constants), denominator, fold)


def _soft_row_scales(call: Call, rows: int) -> RowScales:
    """No row is ignored. Sigmoid's gradient needs the labels' mean weight first, a mean its sum."""
    total = call.reduction == WEIGHTED_MEAN
    labels = call.weight and not call.formula.per_class and (call.formula.sigmoid or total)
    if not total or not (call.weight or call.sample_weight):
        mean = call.reduction in (MEAN, WEIGHTED_MEAN)
        return RowScales(None, float(rows) if mean else 1.0, False, labels)
    pointers = (None, None, "parts" if labels else "sample_weight", "scale")
    numbers, constants = (rows, call.shape[1], 0), (False, True, SHARE)
    return RowScales((pointers, numbers, constants), 1.0, True, labels)


def _sizes(call: Call) -> tuple[int, int, int]:
    N, C, *inner = call.shape
    return N, C, inner[0] if inner else 1


def _strides(call: Call, strides: tuple[int, ...] | None) -> tuple[int, int, int]:
    """Of samples, classes and inner positions; 1 where there is but one class."""
    n, c, *k = call.x_strides if strides is None else strides
    return n, 1 if call.shape[1] == 1 else c, k[0] if k else 0


def _in_tiles(call: Call) -> bool:
    adjacent = all(_strides(call, s)[1] == 1 for s in (call.x_strides, call.g_strides))
    return call.shape[1] <= FEW_CLASSES or not adjacent


def _row_numbers(call: Call) -> tuple[int, ...]:
    N, C, K = _sizes(call)
    x, g = _strides(call, call.x_strides), _strides(call, call.g_strides)
    return N * K, C, K, x[0], x[2], g[0], g[2]


def _compute_type(call: Call) -> Any:
    return tl.float64 if call.dtype is torch.float64 else tl.float32


def _config(call: Call) -> Config:
    N, C, K = _sizes(call)
    twice = call.formula.label_smoothing != 0 or _gamma_kind(call.formula) >= GENERAL
    return config(N * K, C, call.dtype.itemsize, call.formula.sigmoid, twice, call.device)


def _outputs(call: Call, parts: int, rows: int) -> tuple[str | None, ...]:
    """losses, saved"""
    direct = call.per_row and parts <= rows
    return "loss" if direct else "losses", "saved" if call.saved else None


def _adjusting(call: Call) -> tuple[str | None, str | None]:
    """logit_bias, margin"""
    return "logit_bias" if call.logit_bias else None, "margin" if call.margin else None


def _adjusts(call: Call) -> bool:
    return call.logit_bias or call.margin or call.formula.logit_scale != 1


def _sources(call: Call, r: RowScales | None) -> tuple[str | None, ...]:
    """logits, target, grad, scale, normalizer, logit_bias, margin; r is None in the backward."""
    scale: str | None = "saved"
    normalizer = None
    if r is not None:
        scale = None if r.prologue is None else "scale"
        normalizer = "normalizer" if call.normalizer else None
    grad = None if call.g_strides is None else "grad"
    return "logits", "target", grad, scale, normalizer, *_adjusting(call)


def _softmax_numbers(call: Call) -> tuple[float, ...]:
    f = call.formula
    return f.gamma, f.label_smoothing, f.z_loss, f.logit_scale


def _sigmoid_numbers(call: Call) -> tuple[float, ...]:
    f = call.formula
    rest = (f.clip, f.label_smoothing, f.logit_scale)
    return f.gamma, f.gamma_neg, f.alpha, f.alpha_neg, *rest


def _tiles(call: Call, r: RowScales | None) -> Step:
    """Both directions: r is None in the backward."""
    N, C, K = _sizes(call)
    x, g = _strides(call, call.x_strides), _strides(call, call.g_strides)
    inner = K > 1
    rows, classes, one = tile_config(C, call.formula.sigmoid, inner)
    programs = N * triton.cdiv(K, rows) if inner else triton.cdiv(N, rows)
    # Loads need no side-by-side classes, since a thread has whole rows; stores do.
    x_unit = tile_kernels.UNIT_K.value if inner and x[2] == 1 else 0
    g_unit = tile_kernels.UNIT_K.value if inner and g[2] == 1 else int(g[1] == 1)
    if r is None:
        pointers: tuple[str | None, ...] = (*_sources(call, r), "grad_loss", None, "saved")
        denominator, fold = 1.0, False
    else:
        pointers = (*_sources(call, r), None, *_outputs(call, N * K, N * K))
        denominator, fold = r.denominator, r.fold
    sizes, smooth = (N * K, C, K, *x, *g), call.formula.label_smoothing != 0
    options = (fold, call.vector, call.per_row)
    layout = (x_unit, g_unit, inner)
    T = _compute_type(call)
    if call.formula.sigmoid:
        kernel = tile_kernels.sigmoid_tiles
        numbers: tuple[float, ...] = (*sizes, *_sigmoid_numbers(call), denominator)
        constants: tuple[Any, ...] = (rows, classes, T, _gamma_kind(call.formula), *layout)
        constants += (smooth, *options, has_alpha(call.formula), _adjusts(call))
    else:
        kernel = tile_kernels.softmax_tiles
        numbers = (*sizes, *_softmax_numbers(call), denominator)
        constants = (rows, classes, T, *layout, one, smooth, call.formula.z_loss != 0, *options)
        constants += (_adjusts(call),)
    return Step(kernel, (programs,), pointers, numbers, constants, 4)


def _sigmoid_rows(call: Call, r: RowScales | None) -> Step:
    """Both directions: r is None in the backward."""
    layout, sizes = _config(call), _row_numbers(call)
    rows = sizes[0]
    if r is None:
        pointers: tuple[str | None, ...] = (*_sources(call, r), "grad_loss", None, None)
        denominator, fold = 1.0, False
    else:
        pointers = (*_sources(call, r), None, *_outputs(call, rows * layout.splits, rows))
        denominator, fold = r.denominator, r.fold
    lanes = min(layout.V, layout.warps * call.device.warp)
    constants = (
        *(layout.V, 16 // call.dtype.itemsize, lanes, _compute_type(call)),
        *(_gamma_kind(call.formula), layout.one, sizes[2] > 1, call.aligned),
        *(
            call.formula.label_smoothing != 0,
            fold,
            call.vector,
            has_alpha(call.formula),
            _adjusts(call),
        ),
    )
    numbers = (*sizes, *_sigmoid_numbers(call), denominator, layout.span)
    grid = (rows, layout.splits)
    return Step(sigmoid_kernels.sigmoid_rows, grid, pointers, numbers, constants, layout.warps)


def _softmax_rows(call: Call, r: RowScales) -> tuple[list[Step], int]:
    """The steps over the logits and the elements of parts."""
    layout, sizes = _config(call), _row_numbers(call)
    rows, C, K, x_n, x_k = sizes[:5]
    VEC = 16 // call.dtype.itemsize
    pointers = (*_sources(call, r), *_outputs(call, rows, rows))
    numbers = (*sizes, *_softmax_numbers(call), r.denominator)
    smooth, z, adjusts = call.formula.label_smoothing != 0, call.formula.z_loss != 0, _adjusts(call)
    options = (smooth, z, r.fold, adjusts)
    constants = (layout.V, VEC, _compute_type(call), K > 1, call.aligned, *options)
    if layout.splits == 1:
        kernel = softmax_kernels.softmax_rows if layout.one else softmax_kernels.softmax_long
        return [Step(kernel, (rows,), pointers, numbers, constants, layout.warps)], 0
    split = (layout.splits, layout.span)
    prologue = r.prologue or (("target", None, None, None), (rows, C, 0), (False, False, SHARE))
    parts = Step(
        softmax_kernels.softmax_parts,
        (rows * layout.splits,),
        ("logits", *_adjusting(call), *prologue[0], "parts"),
        (rows, C, K, x_n, x_k, prologue[1][2], call.formula.logit_scale, *split),
        (layout.V, VEC, K > 1, smooth, adjusts, r.prologue is not None, *prologue[2]),
        layout.warps,
    )
    join = Step(
        softmax_kernels.softmax_join,
        (rows, 1 if call.g_strides is None else layout.splits),
        (*pointers, "parts"),
        (*numbers, *split),
        (*constants, triton.next_power_of_2(layout.splits)),
        layout.warps,
    )
    return [parts, join], rows * layout.splits * softmax_kernels.PART.value


def _gradient(call: Call) -> Step:
    """The recomputing backward."""
    if _by_class(call):
        return _dense(call, RowScales(None, 1.0, False))
    if _in_tiles(call):
        return _tiles(call, None)
    if call.formula.sigmoid:
        return _sigmoid_rows(call, None)
    layout, numbers = _config(call), _row_numbers(call)
    splits, span = layout.splits, layout.span
    if call.in_place:  # all read the target's logit, which the first overwrites
        splits, span = 1, span * splits
    VEC, inner, f = 16 // call.dtype.itemsize, numbers[2] > 1, call.formula
    options = (call.aligned, f.label_smoothing != 0, f.z_loss != 0, call.vector, _adjusts(call))
    return Step(
        softmax_kernels.softmax_gradient,
        (numbers[0], splits),
        ("logits", "target", "grad", *_adjusting(call), "saved", "grad_loss"),
        (*numbers, *_softmax_numbers(call), span),
        (layout.V, VEC, _compute_type(call), inner, *options),
        layout.warps,
    )


def _by_class(call: Call) -> bool:
    """Soft targets, or class indices whose classes have weights of their own."""
    return call.soft is not None or call.formula.per_class


class SoftLayout(NamedTuple):
    """How logits, targets and gradient lie."""

    unit: int  # what lies side by side: UNIT_C, UNIT_K or neither
    access: int  # elements of one access
    strides: tuple[tuple[int, ...], ...]  # of logits, target, grad


def _soft_layout(call: Call) -> SoftLayout:
    t_strides = None if call.soft is None else call.soft[1]
    given = (call.x_strides, t_strides, call.g_strides)
    strides = tuple((*(s or (0, 0)), 0)[:3] for s in given)
    used = [stride for stride, s in zip(strides, given, strict=True) if s is not None]
    unit = UNIT_C if all(stride[1] == 1 for stride in used) else 0
    if not unit and _sizes(call)[2] > 1 and all(stride[2] == 1 for stride in used):
        unit = UNIT_K
    return SoftLayout(unit, call.access if unit == UNIT_C else 1, strides)


def _sigmoid_tile(call: Call, layout: SoftLayout, kind: int) -> SoftConfig:
    return sigmoid_dense_config(call.shape[1], layout.unit == UNIT_K, kind >= GENERAL)


def _dense(call: Call, r: RowScales) -> Step:
    """The rows of a loss, or of a recomputing backward."""
    N, C, K = _sizes(call)
    f, layout = call.formula, _soft_layout(call)
    sizes = (N * K, C, K, *itertools.chain(*layout.strides))
    lies = (_compute_type(call), layout.unit, layout.access)
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
    losses = None if call.backward else _outputs(call, N * K, N * K)[0]
    outputs = (incoming, losses, "saved" if call.saved or call.backward else None)
    options = (r.fold, call.vector, call.per_row)
    bias, margin = _adjusting(call)
    constants: tuple[Any, ...]
    numbers: tuple[float, ...]
    pointers: tuple[str | None, ...]
    if f.sigmoid:
        plain = f.gamma_neg == f.gamma and not has_alpha(f)
        kind = _gamma_kind(f) if plain or f.clip else GENERAL
        tile = _sigmoid_tile(call, layout, kind)
        pointers = (*inputs, bias, margin, *outputs)
        numbers = (*sizes, *_sigmoid_numbers(call), r.denominator)
        constants = (tile.rows, tile.classes, *lies)
        constants += (kind, has_alpha(f), _adjusts(call), call.soft is None)
        constants += options
        kernel = dense_kernels.sigmoid_dense
    else:
        pointers = (*inputs, bias, *outputs)
        numbers = (*sizes, *_softmax_numbers(call), r.denominator)
        smooth, z = f.label_smoothing != 0, f.z_loss != 0
        tile = softmax_dense_config(C, call.dtype.itemsize)
        constants = (tile.rows, tile.classes, *lies)
        constants += (tile.single, smooth, z, _adjusts(call), *options)
        kernel = dense_kernels.softmax_dense
    # So that two programs fit: one computes while another waits for memory.
    registers = 65536 // (2 * 32 * tile.warps) if tile.warps > 4 else None
    grid = (triton.cdiv(N * K, tile.rows),)
    return Step(kernel, grid, pointers, numbers, constants, tile.warps, registers)


def _label_weights(call: Call) -> Step:
    """r_i of soft targets into parts, where a mean divides by their sum."""
    N, C, K = _sizes(call)
    layout = _soft_layout(call)
    tile = _sigmoid_tile(call, layout, 0)
    sample_weight = "sample_weight" if call.sample_weight else None
    return Step(
        dense_kernels.label_weights,
        (triton.cdiv(N * K, tile.rows),),
        ("target", "weight", sample_weight, "parts"),
        (N * K, C, K, *layout.strides[1]),
        (tile.rows, tile.classes, _compute_type(call), layout.unit, layout.access),
        tile.warps,
    )


def has_alpha(f: Formula) -> bool:
    return (f.alpha, f.alpha_neg) != (1, 1)


def _gamma_kind(f: Formula) -> int:
    if f.clip:
        return sigmoid_kernels.CLIPPED.value
    if f.gamma_neg != f.gamma or (f.label_smoothing and has_alpha(f)):
        return GENERAL
    kinds = {0.0: sigmoid_kernels.ZERO, 0.5: sigmoid_kernels.HALF, 1.0: sigmoid_kernels.ONE}
    return kinds.get(f.gamma, sigmoid_kernels.TWO if f.gamma == 2 else sigmoid_kernels.ANY).value
