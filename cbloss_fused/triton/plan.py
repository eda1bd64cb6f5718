"""Which kernels a call takes, over which grid, with which blocks: a pure function of its form.

At most three launches forward, four where soft targets are weighted and a mean divides by the sum
of their row weights, and one backward.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton

from . import prologue as prologue_kernels
from . import sigmoid as sigmoid_kernels
from . import softmax as softmax_kernels
from . import tiles as tile_kernels
from .call import (
    GENERAL,
    Call,
    Launch,
    Plan,
    adjusting,
    adjusts,
    class_index_code,
    compute_type,
    has_alpha,
    outputs_of,
    positives,
    sigmoid_scalars,
    sizes_of,
    softmax_scalars,
    strides_of,
)
from .heuristics import FEW_CLASSES, Device, RowLayout, row_layout, tile_layout
from .row_scales import SHARE, RowScales, row_scales
from .soft_plan import by_class, label_weights_launch, soft_launch

PARTIALS: int = prologue_kernels.PARTIALS.value


@lru_cache(maxsize=256)
def scaling(
    numel: int, dtype: torch.dtype, factor: torch.dtype, device: Device, ordinal: int | None
) -> Plan:
    """The launch that multiplies a stored gradient of a dtype by a factor of another, or leaves it.

    A launch keeps its compiled kernel, so all that its code depends on is a part of the key.
    """
    VEC = 16 // dtype.itemsize
    programs = max(1, min(triton.cdiv(numel, 1024 * VEC), 4 * device.sms))
    pointers, constants = ("grad", "grad_loss"), (512, VEC)
    kernel = prologue_kernels.scale_gradient
    return Plan((Launch(kernel, (programs,), pointers, (numel,), constants, 4),))


# Plans --------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def plan(call: Call) -> Plan | None:
    """The launches of a call; None where an index that kernels keep in 32 bits could overflow."""
    N, C, K = sizes_of(call)
    strides = (strides_of(call, s)[1] for s in (call.x_strides, call.g_strides))
    # 8, as three numbers per row are saved, and grids end some rows beyond the last; columns are
    # counted to the end of a tile.
    if max(8 * N * K, C + (1 << 16), *(() if by_class(call) else strides)) >= 2**31:
        return None
    if call.backward:
        return Plan((_gradient(call),))
    rows = N * K
    r = row_scales(call, rows)
    parts_size = 0
    if by_class(call):
        main = soft_launch(call, r)
        parts = rows if call.per_row else main.grid[0]
        launches, parts_size = [main], rows if r.labels else 0
    elif _in_tiles(call):
        main = _tiles(call, r)
        parts = main.grid[0]
        launches = [main]
    elif call.formula.sigmoid:
        main = _sigmoid_rows(call, r)
        parts = rows * main.grid[1]
        launches = [main]
    else:
        launches, parts_size = _softmax_rows(call, r)
        parts = rows
    direct = call.per_row and parts <= rows  # the row kernel writes the losses themselves
    if r.prologue is not None and launches[0].kernel is not softmax_kernels.softmax_parts:
        shares = triton.cdiv(rows, triton.cdiv(rows, PARTIALS * SHARE) * SHARE)
        launches.insert(0, Launch(prologue_kernels.prologue, (shares,), *r.prologue, 4))
    if r.labels:
        launches.insert(0, label_weights_launch(call))
    if not direct:
        count, programs = (parts // rows, rows) if call.per_row else (parts, 1)
        block, warps = (1024, 4) if count <= 4096 else (16384, 32)
        pointers = ("losses", "loss")
        launches.append(
            Launch(prologue_kernels.epilogue, (programs,), pointers, (count,), (block,), warps)
        )
    scale_size = PARTIALS + rows if r.prologue is not None else 0
    return Plan(tuple(launches), scale_size, 0 if direct else parts, parts_size)


def _in_tiles(call: Call) -> bool:
    adjacent = all(strides_of(call, s)[1] == 1 for s in (call.x_strides, call.g_strides))
    return call.shape[1] <= FEW_CLASSES or not adjacent


def _row_scalars(call: Call) -> tuple[int, ...]:
    N, C, K = sizes_of(call)
    x, g = strides_of(call, call.x_strides), strides_of(call, call.g_strides)
    return N * K, C, K, x[0], x[2], g[0], g[2]


def _row_layout(call: Call) -> RowLayout:
    N, C, K = sizes_of(call)
    twice = call.formula.label_smoothing != 0 or class_index_code(call.formula) >= GENERAL
    return row_layout(N * K, C, call.dtype.itemsize, call.formula.sigmoid, twice, call.device)


def _sources(call: Call, r: RowScales | None) -> tuple[str | None, ...]:
    """logits, target, grad, scale, normalizer, logit_bias, margin and, for sigmoid, pos_weight.

    r is None in the backward.
    """
    scale: str | None = "saved"
    normalizer = None
    if r is not None:
        scale = None if r.prologue is None else "scale"
        normalizer = "normalizer" if call.normalizer else None
    grad = None if call.g_strides is None else "grad"
    given = ("logits", "target", grad, scale, normalizer, *adjusting(call))
    return (*given, positives(call)) if call.formula.sigmoid else given


def _tiles(call: Call, r: RowScales | None) -> Launch:
    """Both directions: r is None in the backward."""
    N, C, K = sizes_of(call)
    x, g = strides_of(call, call.x_strides), strides_of(call, call.g_strides)
    inner = K > 1
    rows, classes, one = tile_layout(C, call.formula.sigmoid, inner)
    programs = N * triton.cdiv(K, rows) if inner else triton.cdiv(N, rows)
    # Loads need no side-by-side classes, since a thread has whole rows; stores do.
    x_unit = tile_kernels.UNIT_K.value if inner and x[2] == 1 else 0
    g_unit = tile_kernels.UNIT_K.value if inner and g[2] == 1 else int(g[1] == 1)
    if r is None:
        pointers: tuple[str | None, ...] = (*_sources(call, r), "grad_loss", None, "saved")
        denominator, fold = 1.0, False
    else:
        pointers = (*_sources(call, r), None, *outputs_of(call, N * K, N * K))
        denominator, fold = r.denominator, r.fold
    sizes, smooth = (N * K, C, K, *x, *g), call.formula.label_smoothing != 0
    options = (fold, call.vector, call.per_row)
    layout = (x_unit, g_unit, inner)
    T = compute_type(call)
    if call.formula.sigmoid:
        kernel = tile_kernels.sigmoid_tiles
        background = call.background_index
        scalars: tuple[float, ...] = (*sizes, *sigmoid_scalars(call), denominator, background or 0)
        constants: tuple[Any, ...] = (rows, classes, T, class_index_code(call.formula), *layout)
        constants += (smooth, *options, has_alpha(call.formula), adjusts(call))
        constants += (background is not None,)
    else:
        kernel = tile_kernels.softmax_tiles
        scalars = (*sizes, *softmax_scalars(call), denominator)
        constants = (rows, classes, T, *layout, one, smooth, call.formula.z_loss != 0, *options)
        constants += (adjusts(call),)
    return Launch(kernel, (programs,), pointers, scalars, constants, 4)


def _sigmoid_rows(call: Call, r: RowScales | None) -> Launch:
    """Both directions: r is None in the backward."""
    layout, sizes = _row_layout(call), _row_scalars(call)
    rows = sizes[0]
    if r is None:
        pointers: tuple[str | None, ...] = (*_sources(call, r), "grad_loss", None, None)
        denominator, fold = 1.0, False
    else:
        pointers = (*_sources(call, r), None, *outputs_of(call, rows * layout.splits, rows))
        denominator, fold = r.denominator, r.fold
    lanes = min(layout.V, layout.warps * call.device.warp)
    constants = (
        *(layout.V, 16 // call.dtype.itemsize, lanes, compute_type(call)),
        *(class_index_code(call.formula), layout.single, sizes[2] > 1, call.aligned),
        *(
            call.formula.label_smoothing != 0,
            fold,
            call.vector,
            has_alpha(call.formula),
            adjusts(call),
            call.background_index is not None,
        ),
    )
    scalars = (*sizes, *sigmoid_scalars(call), denominator, call.background_index or 0, layout.span)
    grid = (rows, layout.splits)
    return Launch(sigmoid_kernels.sigmoid_rows, grid, pointers, scalars, constants, layout.warps)


def _softmax_rows(call: Call, r: RowScales) -> tuple[list[Launch], int]:
    """The launches over the logits and the elements of parts."""
    layout, sizes = _row_layout(call), _row_scalars(call)
    rows, C, K, x_n, x_k = sizes[:5]
    VEC = 16 // call.dtype.itemsize
    pointers = (*_sources(call, r), *outputs_of(call, rows, rows))
    scalars = (*sizes, *softmax_scalars(call), r.denominator)
    smooth, z, adjusted = call.formula.label_smoothing != 0, call.formula.z_loss != 0, adjusts(call)
    options = (smooth, z, r.fold, adjusted)
    constants = (layout.V, VEC, compute_type(call), K > 1, call.aligned, *options)
    if layout.splits == 1:
        kernel = softmax_kernels.softmax_rows if layout.single else softmax_kernels.softmax_long
        return [Launch(kernel, (rows,), pointers, scalars, constants, layout.warps)], 0
    split = (layout.splits, layout.span)
    prologue = r.prologue or (("target", None, None, None), (rows, C, 0), (False, False, SHARE))
    ignored, (IGNORE, TOTAL, BLOCK, *_) = prologue[1][2], prologue[2]
    parts = Launch(
        softmax_kernels.softmax_parts,
        (rows * layout.splits,),
        ("logits", *adjusting(call), *prologue[0], "parts"),
        (rows, C, K, x_n, x_k, ignored, call.formula.logit_scale, *split),
        (layout.V, VEC, K > 1, smooth, adjusted, r.prologue is not None, IGNORE, TOTAL, BLOCK),
        layout.warps,
    )
    join = Launch(
        softmax_kernels.softmax_join,
        (rows, 1 if call.g_strides is None else layout.splits),
        (*pointers, "parts"),
        (*scalars, *split),
        (*constants, triton.next_power_of_2(layout.splits)),
        layout.warps,
    )
    return [parts, join], rows * layout.splits * softmax_kernels.PART.value


def _gradient(call: Call) -> Launch:
    """The recomputing backward."""
    if by_class(call):
        return soft_launch(call, RowScales(None, 1.0, False))
    if _in_tiles(call):
        return _tiles(call, None)
    if call.formula.sigmoid:
        return _sigmoid_rows(call, None)
    layout, scalars = _row_layout(call), _row_scalars(call)
    splits, span = layout.splits, layout.span
    if call.in_place:  # all read the target's logit, which the first overwrites
        splits, span = 1, span * splits
    VEC, inner, f = 16 // call.dtype.itemsize, scalars[2] > 1, call.formula
    options = (call.aligned, f.label_smoothing != 0, f.z_loss != 0, call.vector, adjusts(call))
    return Launch(
        softmax_kernels.softmax_gradient,
        (scalars[0], splits),
        ("logits", "target", "grad", *adjusting(call), "saved", "grad_loss"),
        (*scalars, *softmax_scalars(call), span),
        (layout.V, VEC, compute_type(call), inner, *options),
        layout.warps,
    )
