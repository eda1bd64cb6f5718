"""The small kernels around the row kernel: prologue, epilogue, scaling of a stored gradient.

The prologue makes one number per row, r_i, and PARTIALS partial sums of the denominator; the
epilogue adds up the losses. Every sum has a fixed order.
"""

import triton
import triton.language as tl

from .numerics import i32, i64, kernel

PARTIALS = tl.constexpr(32)  # of the denominator: what one warp adds up without shared memory


@triton.jit
def prologue_part(
    part, target, weight, sample_weight, scale, rows, C, ignored,
    IGNORE: tl.constexpr, TOTAL: tl.constexpr, BLOCK: tl.constexpr,
    background=0, BACKGROUND: tl.constexpr = False,
):  # fmt: skip
    """One of at most PARTIALS shares of the rows: r_i, -1 where ignored, behind PARTIALS partial
    denominators, sums of r_i (TOTAL) or numbers of rows."""
    T: tl.constexpr = scale.dtype.element_ty
    share = tl.cdiv(rows, PARTIALS * BLOCK) * BLOCK
    if part == 0:  # the shares that are empty
        other = tl.arange(0, PARTIALS)
        tl.store(scale + other, tl.zeros((PARTIALS,), T), other >= tl.cdiv(rows, share))
    lanes = tl.zeros((BLOCK,), T)
    for start in range(part * share, tl.minimum(part * share + share, rows), BLOCK):
        i = start + tl.arange(0, BLOCK)
        there = i < rows
        keep = there
        if target is not None:
            y = tl.load(target + i, there, 0)
        if IGNORE:
            keep = there & (y != ignored)
        r = tl.where(keep, 1.0, 0.0).to(T)
        if weight is not None:
            labelled = keep
            if BACKGROUND:
                labelled = keep & (y != background)
            r *= tl.load(weight + tl.minimum(tl.maximum(y, 0), C - 1), labelled, 1.0)
        if sample_weight is not None:
            r *= tl.load(sample_weight + i, keep, 0.0)
        if TOTAL:
            lanes += r
        else:
            lanes += tl.where(keep, 1.0, 0.0).to(T)
        tl.store(scale + PARTIALS + i, tl.where(keep, r, -1.0), there)
    if part * share < rows:  # programs beyond the last share have none
        tl.store(scale + part, tl.sum(lanes, 0))


@kernel
def prologue(
    target, weight, sample_weight, scale, rows: i32, C: i32, ignored: i64, background: i64,
    IGNORE: tl.constexpr, TOTAL: tl.constexpr, BLOCK: tl.constexpr, BACKGROUND: tl.constexpr,
):  # fmt: skip
    """One number per row, and one part of the denominator per program, PARTIALS in all."""
    prologue_part(
        tl.program_id(0), target, weight, sample_weight, scale, rows, C, ignored,
        IGNORE, TOTAL, BLOCK, background, BACKGROUND,
    )  # fmt: skip


@kernel
def epilogue(losses, loss, count: i32, BLOCK: tl.constexpr):
    """loss[i] = the sum of count partial losses, in a fixed order."""
    i = tl.program_id(0)
    lanes = tl.zeros((BLOCK,), losses.dtype.element_ty)
    for start in range(0, count, BLOCK):
        j = start + tl.arange(0, BLOCK)
        lanes += tl.load(losses + i.to(tl.int64) * count + j, j < count, 0.0)
    tl.store(loss + i, tl.sum(lanes, 0))


@kernel
def scale_gradient(grad, grad_loss, numel: i64, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """grad *= grad_loss in place; where that is 1, every program leaves at once."""
    factor = tl.load(grad_loss)
    if factor != 1:
        size: tl.constexpr = grad.dtype.element_ty.primitive_bitwidth // 8
        first = grad.to(tl.int64, bitcast=False) // size
        head = -first & (VEC - 1)  # as a row of numel columns
        whole = tl.maximum(numel - head, 0) // VEC
        start = tl.multiple_of(grad + head, 16)
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for begin in range(tl.program_id(0).to(tl.int64) * BLOCK, whole, step):
            v = begin + tl.arange(0, BLOCK)
            at = start + (v[:, None] * VEC + tl.arange(0, VEC)[None, :])
            mask = tl.broadcast_to((v < whole)[:, None], (BLOCK, VEC))
            g = tl.load(at, mask, 0.0)
            tl.store(at, (g.to(factor.dtype) * factor).to(g.dtype), mask)
        if tl.program_id(0) == 0:
            t = tl.arange(0, 2 * VEC)
            column = tl.where(t < VEC, t, head + whole * VEC + t - VEC)
            mask = (column < numel) & ((t < head) | (t >= VEC))
            g = tl.load(grad + column, mask, 0.0)
            tl.store(grad + column, (g.to(factor.dtype) * factor).to(g.dtype), mask)
