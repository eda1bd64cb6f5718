"""How rows lie over programs, warps and registers: pure functions of sizes and of the device."""

from __future__ import annotations

from typing import NamedTuple

import triton

FEW_CLASSES = 128  # up to here a thread takes whole rows
HELD = 16384  # elements of a row that a program's registers hold


class Device(NamedTuple):
    """Multiprocessors, threads a warp."""

    sms: int
    warp: int


class RowLayout(NamedTuple):
    """A row over programs: tiles of V 16-byte vectors, warps, splits of span vectors."""

    V: int
    warps: int
    single: bool  # the row is one tile
    splits: int
    span: int


def row_layout(
    rows: int, C: int, itemsize: int, sigmoid: bool, smooth: bool, device: Device
) -> RowLayout:
    """The layout of rows whose classes lie side by side.

    64 elements per thread: enough loads in flight to hide memory, and set-up cost is shared. A row
    that fits (softmax: HELD; sigmoid needs no more than its edges, 8192 keeps warps few, less with
    smoothing or a general formula, which compute twice) is one tile; a longer one loops. There
    softmax reads twice, so few rows at a time, by many warps each, keep the second read in L2.
    Fewer rows than would fill the device: several programs per row.
    """
    VEC = 16 // itemsize
    vectors = max(C // VEC, 1)
    V = triton.next_power_of_2(vectors)
    held = (8192 >> 2 * smooth if sigmoid else HELD) >> (itemsize == 8)
    if held >= V * VEC:
        return RowLayout(V, max(1, min(V * VEC // (64 * device.warp), 8)), True, 1, V)
    splits = min(triton.cdiv(vectors * VEC, 4096), triton.cdiv(4 * device.sms, rows))
    if sigmoid or rows < 2 * device.sms:
        lanes, warps = 4096 >> (sigmoid and smooth), 4
    else:
        splits = 1
        lanes, warps = (8192, 16) if C * itemsize <= 65536 else (16384, 32)
    V = lanes // VEC >> (itemsize == 8)
    span = triton.cdiv(triton.cdiv(vectors, splits), V) * V
    return RowLayout(V, max(1, warps * 32 // device.warp), False, triton.cdiv(vectors, span), span)


def tile_layout(C: int, sigmoid: bool, inner: bool) -> tuple[int, int, bool]:
    """(rows, classes, whether these are all) of a tile, at most 32 elements per thread of 4 warps.

    Softmax holds all classes where they are few. Sigmoid needs but some at a time: where rows lie
    side by side in memory (inner), very few; else enough for the stores of a row to fill what
    memory moves.
    """
    classes = triton.next_power_of_2(C)
    if not sigmoid and classes <= FEW_CLASSES:
        return min(128, 4096 // classes), classes, True
    if sigmoid and inner:
        return 128, _few_at_a_time(C), False
    return 128, min(classes, 32), False


def _few_at_a_time(C: int) -> int:
    """Of 8 classes or 4, what computes little for nothing: 19 classes are 5 times 4."""
    padded = {n: triton.cdiv(C, n) * n for n in (4, 8)}
    return 8 if padded[8] <= 1.1 * padded[4] else 4


class SoftTile(NamedTuple):
    """A tile of rows with a target per class."""

    rows: int
    classes: int
    single: bool  # these are all
    warps: int


def softmax_soft_tile(C: int, itemsize: int) -> SoftTile:
    """A row of logits and one of targets in registers; longer ones are read three times, few at a
    time, so that the L2 cache holds them."""
    classes = triton.next_power_of_2(C)
    if classes > HELD // 2 >> (itemsize == 8):
        return SoftTile(1, 4096 >> (itemsize == 8), False, 8)
    return SoftTile(max(1, 2048 // classes), classes, True, max(4, classes // 1024))


def sigmoid_soft_tile(C: int, inner: bool, general: bool) -> SoftTile:
    """16 elements per thread, 8 of a formula that needs more registers. Rows side by side in memory
    (inner): few classes at a time, as in tile_layout."""
    elements, classes = 1024 if general else 2048, min(triton.next_power_of_2(C), 1024)
    if inner:
        classes = _few_at_a_time(C)
    return SoftTile(elements // classes, classes, False, 4)
