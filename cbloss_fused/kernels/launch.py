"""The operators on a GPU: which kernels, over which grid, with which blocks.

At most three launches forward and one backward, nothing synchronises, nothing but scratch is
allocated: so a CUDA graph can hold a training step.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rows as step
from . import sigmoid as sigmoid_kernels
from . import softmax as softmax_kernels

INTERPRETED: bool = triton.knobs.runtime.interpret
PARTIALS: int = step.PARTIALS.value
SHARE = 1024  # rows of a prologue's step
FEW_CLASSES = 128  # up to here a thread takes whole rows
HELD = 16384  # elements of a row that a program's registers hold
NONE, MEAN, WEIGHTED_MEAN = 0, 1, 2  # of spec.REDUCTIONS


# The choice of kernel ----------------------------------------------------------------------------


class Device(NamedTuple):
    """What the choice depends on: multiprocessors, threads a warp."""

    sms: int
    warp: int


class Config(NamedTuple):
    """How a row is laid over programs: tiles of V 16-byte vectors, warps, splits of span vectors."""

    V: int
    warps: int
    one: bool  # the row is one tile
    splits: int
    span: int


@lru_cache(maxsize=None)
def config(
    rows: int, C: int, itemsize: int, sigmoid: bool, smooth: bool, device: Device
) -> Config:
    """The layout of rows whose classes lie side by side.

    64 elements a thread: enough loads in flight to hide memory, and set-up cost is shared. A row
    that fits (softmax: HELD; sigmoid needs no more than its edges, 8192 keeps warps few, half with
    smoothing, which computes twice) is one tile; a longer one loops. There softmax reads twice, so few rows at a time, by many warps each,
    keep the second read in L2. Fewer rows than would fill the device: several programs a row.
    """
    VEC = 16 // itemsize
    vectors = max(C // VEC, 1)
    V = triton.next_power_of_2(vectors)
    held = (8192 >> smooth if sigmoid else HELD) >> (itemsize == 8)
    if V * VEC <= held:
        return Config(V, _clamp(V * VEC // (64 * device.warp), 1, 8), True, 1, V)
    splits = min(triton.cdiv(vectors * VEC, 4096), triton.cdiv(4 * device.sms, rows))
    if sigmoid or rows < 2 * device.sms:
        lanes, warps = 4096, 4
    else:
        splits = 1
        lanes, warps = (8192, 16) if C * itemsize <= 65536 else (16384, 32)
    if itemsize == 8:
        lanes //= 2
    V = lanes // VEC
    span = triton.cdiv(triton.cdiv(vectors, splits), V) * V
    return Config(V, warps * 32 // device.warp, False, triton.cdiv(vectors, span), span)


@lru_cache(maxsize=None)
def tile_config(C: int, sigmoid: bool) -> tuple[int, int, bool]:
    """(rows, classes, whether these are all) of a tile: 4096 elements, 32 a thread of 4 warps."""
    classes = triton.next_power_of_2(C)
    one = classes <= FEW_CLASSES and not sigmoid
    classes = classes if one else min(classes, 32)
    return min(128, 4096 // classes), classes, one


def _clamp(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))


@lru_cache(maxsize=None)
def _device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.multi_processor_count, getattr(properties, "warp_size", 32))


def device_of(tensor: Tensor) -> Device:
    """An H100's numbers where there is no GPU: the interpreter's, and code compiled ahead."""
    return _device(tensor.device.index) if tensor.is_cuda else Device(132, 32)


# Launching ---------------------------------------------------------------------------------------

_kept: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    pointers: tuple[Tensor | None, ...],
    numbers: tuple[float, ...],
    constants: tuple[Any, ...],
    warps: int,
) -> None:
    """Run a kernel; what was compiled is kept by all that it depends on.

    That is the types of the pointers, the constants, warps and the device: rows.kernel lets Triton
    specialise on nothing else. Triton's own look at every argument costs 7 us a launch.
    """
    arguments = (*pointers, *numbers, *constants)
    if INTERPRETED:
        kernel[grid](*arguments)
        return
    first = next(p for p in pointers if p is not None)
    types = tuple([p if p is None else p.dtype for p in pointers])
    key = (kernel, types, constants, warps, first.device.index)
    compiled = _kept.get(key)
    if compiled is None:
        compiled = kernel.warmup(*arguments, grid=grid, num_warps=warps)
        _kept[key] = compiled
    compiled[(*grid, 1, 1)[:3]](*arguments)


# The operators -----------------------------------------------------------------------------------


class Layout:
    """Shape, strides and what follows from them for a call."""

    def __init__(self, logits: Tensor, grad: Tensor | None) -> None:
        N, C, *inner = logits.shape
        self.C, self.K = C, inner[0] if inner else 1
        self.rows = N * self.K
        self.x = _strides(logits)
        self.g = self.x if grad is None else _strides(grad)
        self.itemsize = logits.element_size()
        self.T = tl.float64 if self.itemsize == 8 else tl.float32
        adjacent = self.x[1] == 1 and self.g[1] == 1
        self.tiles = C <= FEW_CLASSES or not adjacent
        self.aligned = grad is None or self._alike(logits, grad)

    def _alike(self, logits: Tensor, grad: Tensor) -> bool:
        """Whether every row of grad lies modulo 16 bytes as the row of logits does."""
        apart = grad.data_ptr() - logits.data_ptr()
        for size, x, g in zip((self.rows // self.K, self.K), self.x[::2], self.g[::2], strict=True):
            if size > 1:
                apart |= (g - x) * self.itemsize
        return apart % 16 == 0

    def row_numbers(self) -> tuple[int, ...]:
        x, g = self.x, self.g
        return (self.rows, self.C, self.K, x[0], x[2], g[0], g[2])

    def tile_numbers(self) -> tuple[int, ...]:
        return (self.rows, self.C, self.K, *self.x, *self.g)

    def tile(self, sigmoid: bool) -> tuple[int, int, tuple[Any, ...], bool]:
        """(programs, rows of one, constants, one) of a kernel over tiles."""
        rows, classes, one = tile_config(self.C, sigmoid)
        inner = self.K > 1
        if inner:
            programs = self.rows // self.K * triton.cdiv(self.K, rows)
        else:
            programs = triton.cdiv(self.rows, rows)
        # Reading class by class lets a thread have whole rows; the stores must lie side by side.
        x_unit = step.UNIT_K.value if inner and self.x[2] == 1 else 0
        g_unit = step.UNIT_K.value if inner and self.g[2] == 1 else int(self.g[1] == 1)
        return programs, rows, (rows, classes, self.T, x_unit, g_unit, inner), one


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    """Of samples, classes and inner positions; 1 where there is but one class."""
    n, c, *k = tensor.stride()
    return n, 1 if tensor.shape[1] == 1 else c, k[0] if k else 0


def _gamma_kind(gamma: float) -> int:
    kinds = {0.0: sigmoid_kernels.ZERO, 0.5: sigmoid_kernels.HALF, 1.0: sigmoid_kernels.ONE}
    return kinds.get(gamma, sigmoid_kernels.TWO if gamma == 2 else sigmoid_kernels.ANY).value


class Scale(NamedTuple):
    """Where a row kernel finds r_i and the denominator."""

    scale: Tensor | None  # the prologue's
    normalizer: Tensor | None
    denominator: float
    fold: bool


def loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
    sigmoid: bool,
    gamma: float,
    label_smoothing: float,
    ignore_index: int | None,
    reduction: int,
    loss: Tensor,
    grad: Tensor | None,
    saved: Tensor | None,
) -> None:
    """The operator cbloss_fused::loss: see ops.py."""
    if target.numel() == 0:
        loss.zero_()
        return
    layout = Layout(logits, grad)
    rows, C = layout.rows, layout.C
    weighted = weight is not None or sample_weight is not None
    prologue = weighted or ignore_index is not None
    scale = loss.new_empty(PARTIALS + rows) if prologue else None
    fold = reduction == WEIGHTED_MEAN and prologue
    fold |= reduction == MEAN and normalizer is None and ignore_index is not None
    mean = reduction in (MEAN, WEIGHTED_MEAN)
    inputs = Scale(scale, normalizer, float(rows) if mean and not fold else 1.0, fold)
    prologue_pointers = (target, weight, sample_weight, scale)
    prologue_numbers = (rows, C, -100 if ignore_index is None else ignore_index)
    prologue_constants = (ignore_index is not None, reduction == WEIGHTED_MEAN, SHARE)
    plan = None if layout.tiles else config(rows, C, layout.itemsize, sigmoid, label_smoothing != 0, device_of(logits))
    split = plan is not None and not sigmoid and plan.splits > 1
    if prologue and not split:
        shares = triton.cdiv(rows, triton.cdiv(rows, PARTIALS * SHARE) * SHARE)
        launch(
            step.prologue, (shares,), prologue_pointers, prologue_numbers, prologue_constants, 4
        )
    smooth = label_smoothing != 0
    numbers = (gamma, label_smoothing, inputs.denominator)
    options = (smooth, inputs.fold)
    sources = (inputs.scale, inputs.normalizer)

    if plan is None:
        programs, _, constants, one = layout.tile(sigmoid)
        parts = programs if reduction else rows
        losses = loss.new_empty(parts) if reduction else loss
        pointers = (logits, target, grad, *sources, None, losses, saved)
        tile_options = (*options, False, reduction == NONE)
        if sigmoid:
            kernel, constants = sigmoid_kernels.sigmoid_tiles, (
                *constants[:3], _gamma_kind(gamma), *constants[3:], *tile_options
            )  # fmt: skip
        else:
            kernel, constants = softmax_kernels.softmax_tiles, (*constants, one, *tile_options)
        launch(kernel, (programs,), pointers, (*layout.tile_numbers(), *numbers), constants, 4)
    elif sigmoid:
        parts = rows * plan.splits
        losses = loss.new_empty(parts) if reduction or plan.splits > 1 else loss
        launch(
            sigmoid_kernels.sigmoid_rows,
            (rows, plan.splits),
            (logits, target, grad, *sources, None, losses, saved),
            (*layout.row_numbers(), *numbers, plan.span),
            (*_sigmoid_constants(layout, plan, gamma, logits), layout.aligned, *options, False),
            plan.warps,
        )
    else:
        parts = rows
        losses = loss.new_empty(rows) if reduction else loss
        constants = (plan.V, 16 // layout.itemsize, layout.T, layout.aligned, *options)
        pointers = (logits, target, grad, *sources, losses, saved)
        if split:
            stats = loss.new_empty(rows * plan.splits * 5)
            launch(
                softmax_kernels.softmax_parts,
                (rows * plan.splits,),
                (logits, *prologue_pointers, stats),
                (rows, C, layout.K, layout.x[0], layout.x[2], prologue_numbers[2], plan.splits,
                 plan.span),
                (plan.V, 16 // layout.itemsize, smooth, prologue, *prologue_constants),
                plan.warps,
            )  # fmt: skip
            launch(
                softmax_kernels.softmax_join,
                (rows, plan.splits if grad is not None else 1),
                (*pointers, stats),
                (*layout.row_numbers(), *numbers, plan.splits, plan.span),
                (*constants, triton.next_power_of_2(plan.splits)),
                plan.warps,
            )
        else:
            kernel = softmax_kernels.softmax_rows if plan.one else softmax_kernels.softmax_long
            launch(
                kernel, (rows,), pointers, (*layout.row_numbers(), *numbers), constants, plan.warps
            )
    if losses is not loss:
        count, programs = (parts, 1) if reduction else (parts // rows, rows)
        block, warps = (1024, 4) if count <= 4096 else (16384, 32)
        launch(step.epilogue, (programs,), (losses, loss), (count,), (block,), warps)


def _sigmoid_constants(
    layout: Layout, plan: Config, gamma: float, logits: Tensor
) -> tuple[Any, ...]:
    lanes = min(plan.V, plan.warps * device_of(logits).warp)
    return (plan.V, 16 // layout.itemsize, lanes, layout.T, _gamma_kind(gamma), plan.one)


def gradient(
    logits: Tensor,
    target: Tensor,
    saved: Tensor,
    grad_loss: Tensor,
    sigmoid: bool,
    gamma: float,
    label_smoothing: float,
    grad: Tensor,
) -> None:
    """The operator cbloss_fused::gradient: see ops.py."""
    if target.numel() == 0:
        return
    layout = Layout(logits, grad)
    rows = layout.rows
    smooth, vector = label_smoothing != 0, grad_loss.dim() > 0
    numbers = (gamma, label_smoothing, 1.0)
    if layout.tiles:
        programs, _, constants, one = layout.tile(sigmoid)
        pointers = (logits, target, grad, saved, None, grad_loss, None, saved)
        options = (smooth, False, vector, False)
        if sigmoid:
            kernel, constants = sigmoid_kernels.sigmoid_tiles, (
                *constants[:3], _gamma_kind(gamma), *constants[3:], *options
            )  # fmt: skip
        else:
            kernel, constants = softmax_kernels.softmax_tiles, (*constants, one, *options)
        launch(kernel, (programs,), pointers, (*layout.tile_numbers(), *numbers), constants, 4)
        return
    plan = config(rows, layout.C, layout.itemsize, sigmoid, label_smoothing != 0, device_of(logits))
    if grad.data_ptr() == logits.data_ptr() and not sigmoid:
        plan = plan._replace(splits=1, span=plan.span * plan.splits)  # all read the target's logit
    if sigmoid:
        launch(
            sigmoid_kernels.sigmoid_rows,
            (rows, plan.splits),
            (logits, target, grad, saved, None, grad_loss, None, None),
            (*layout.row_numbers(), *numbers, plan.span),
            (*_sigmoid_constants(layout, plan, gamma, logits), layout.aligned, smooth, False, vector),
            plan.warps,
        )
    else:
        launch(
            softmax_kernels.softmax_gradient,
            (rows, plan.splits),
            (logits, target, grad, saved, grad_loss),
            (*layout.row_numbers(), *numbers[:2], plan.span),
            (plan.V, 16 // layout.itemsize, layout.T, layout.aligned, smooth, vector),
            plan.warps,
        )


def scale_gradient(grad: Tensor, grad_loss: Tensor, numel: int) -> None:
    """Multiply numel elements of memory from grad on by grad_loss, where that is not 1."""
    vec = 16 // grad.element_size()
    programs = _clamp(triton.cdiv(numel, 1024 * vec), 1, 4 * device_of(grad).sms)
    launch(step.scale_gradient, (programs,), (grad, grad_loss), (numel,), (512, vec), 4)
