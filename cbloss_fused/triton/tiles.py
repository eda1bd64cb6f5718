"""Both families for many rows of few classes, or classes that do not lie side by side.

A program takes ROWS rows, (BLOCK_C, ROWS) elements at a time: a thread has whole rows.
"""

import triton
import triton.language as tl

from .numerics import INF, clamp_finite, exp, f64, i32, i64, kernel, scalar, weighted
from .rows import adjusted, logit_scale_of, row_inputs, target_logit
from .sigmoid import other_element, sigmoid_formula, target_element
from .softmax import (
    below,
    more_max_and_sum,
    one_limit,
    save,
    softmax_formula,
    softmax_row,
    target_below,
)

UNIT_C = tl.constexpr(1)  # classes side by side in memory
UNIT_K = tl.constexpr(2)  # rows side by side


@triton.jit
def tile_inputs(rows, K, ROWS: tl.constexpr, INNER: tl.constexpr):
    """(n, k, row, there) of a program's rows; INNER: K > 1, and they share n."""
    program = tl.program_id(0)
    if INNER:
        blocks = tl.cdiv(K, ROWS)
        n = program // blocks
        k = (program - n * blocks) * ROWS + tl.arange(0, ROWS)
        return n, k, n * K + k, k < K
    else:
        row = program * ROWS + tl.arange(0, ROWS)
        return row, tl.zeros((ROWS,), tl.int32), row, row < rows


@triton.jit
def tile_pointer(base, n, k, stride_n, stride_k, UNIT: tl.constexpr):
    """The first class of each row of a tile."""
    if UNIT == UNIT_K:
        return base + n.to(tl.int64) * stride_n + k
    else:
        return base + n.to(tl.int64) * stride_n + k.to(tl.int64) * stride_k


@triton.jit
def class_offset(c, stride_c, UNIT: tl.constexpr):
    if UNIT == UNIT_C:
        return c
    else:
        return c.to(tl.int64) * stride_c.to(tl.int64)  # of two 32-bit numbers: one instruction


@triton.jit
def load_tile(
    x, c, y, C, read, stride_c, A, UNIT: tl.constexpr, T: tl.constexpr, ADJUST: tl.constexpr
):
    """(z, others): the logits of the classes c of rows x, -inf where they are not others'."""
    there = (c < C)[:, None] & read[None, :]
    at = x[None, :] + class_offset(c, stride_c, UNIT)[:, None]
    # Lays threads along the rows, whatever the strides: a thread then has whole rows in registers.
    # No wider access can come of it, for nothing is known of the addresses' alignment.
    at = tl.max_contiguous(at, (1, 16))
    z = adjusted(tl.load(at, there, -INF).to(T), c[:, None], there, A, ADJUST)
    others = there & (c[:, None] != y[None, :])
    return tl.where(others, z, -INF), others


@triton.jit
def store_tile(g, c, C, there, values, stride_c, UNIT: tl.constexpr):
    mask = (c < C)[:, None] & there[None, :]
    at = g[None, :] + class_offset(c, stride_c, UNIT)[:, None]
    tl.store(at, values.to(g.dtype.element_ty), mask)


# Softmax ------------------------------------------------------------------------------------------


@triton.jit
def tile_max_and_sum(
    x, y, read, C, x_c, z_y, A,
    BLOCK_C: tl.constexpr, T: tl.constexpr, UNIT: tl.constexpr, SMOOTH: tl.constexpr,
    ADJUST: tl.constexpr,
):  # fmt: skip
    """(M, R, D) of rows whose classes are many tiles."""
    M = z_y
    R = tl.zeros_like(z_y)
    D = tl.zeros_like(z_y)
    n = tl.zeros_like(z_y)
    for first in range(0, C, BLOCK_C):
        z, others = load_tile(
            x, first + tl.arange(0, BLOCK_C), y, C, read, x_c, A, UNIT, T, ADJUST
        )  # fmt: skip
        M, R, D, n = more_max_and_sum(M, R, D, n, z, others, 0, SMOOTH)
    return M, R, D


@triton.jit
def tile_gradient(z, m, c, y, k, g_y, uniform):
    e = exp(below(z, m[None, :]))
    return tl.where(c[:, None] == y[None, :], g_y[None, :], e * k[None, :] - uniform[None, :])


@kernel
def softmax_tiles(
    logits, target, grad, scale, normalizer, logit_bias, margin, grad_loss, losses, saved,
    rows: i32, C: i32, K: i32, x_n: i64, x_c: i32, x_k: i64, g_n: i64, g_c: i32, g_k: i64,
    gamma: f64, eps: f64, zeta: f64, logit_scale: f64, denominator: f64,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, T: tl.constexpr,
    X_UNIT: tl.constexpr, G_UNIT: tl.constexpr, INNER: tl.constexpr,
    SINGLE: tl.constexpr, SMOOTH: tl.constexpr, Z: tl.constexpr, FOLD: tl.constexpr,
    VECTOR: tl.constexpr, PER_ROW: tl.constexpr, ADJUST: tl.constexpr,
):  # fmt: skip
    """ROWS rows per program; SINGLE: their classes are one tile, read once, else read twice."""
    n, k_inner, row, there = tile_inputs(rows, K, ROWS, INNER)
    y, r, keep, read = row_inputs(
        target, scale, normalizer, grad_loss, row, there, C, scalar(denominator, T), FOLD, VECTOR
    )
    x = tile_pointer(logits, n, k_inner, x_n, x_k, X_UNIT)
    A = (logit_bias, margin, logit_scale_of(logit_scale, T, ADJUST))
    z_y = target_logit(x + class_offset(y, x_c, X_UNIT), y, read, A, T, ADJUST)
    c = tl.arange(0, BLOCK_C)
    if SINGLE:
        z, others = load_tile(x, c, y, C, read, x_c, A, X_UNIT, T, ADJUST)
    D = tl.zeros_like(z_y)
    if grad_loss is not None:
        M = tl.load(saved + rows + row, there, 0.0)
        R = tl.load(saved + rows.to(tl.int64) * 2 + row, there, 0.0)
    elif SINGLE:
        M = tl.maximum(tl.max(z, 0), z_y)
        t = below(z, clamp_finite(M)[None, :])
        R = tl.sum(exp(t), 0)
        if SMOOTH:
            D = tl.sum(tl.where(others, t, 0.0), 0)
    else:
        M, R, D = tile_max_and_sum(
            x, y, read, C, x_c, z_y, A, BLOCK_C, T, X_UNIT, SMOOTH, ADJUST
        )  # fmt: skip
    R = one_limit(R, z_y, M)
    m = clamp_finite(M)
    d = target_below(z_y, M)
    loss, k, g_y, uniform = softmax_row(
        d, R, r, D + d, C, M, softmax_formula(gamma, eps, zeta, T), A[2], SMOOTH, Z
    )  # fmt: skip
    if losses is not None:
        if PER_ROW:
            tl.store(losses + row, loss, there)
        else:
            tl.store(losses + tl.program_id(0), tl.sum(tl.where(there, loss, 0.0)))
        save(saved, rows, row, there, keep, r, M, R)
    if grad is not None:
        g = tile_pointer(grad, n, k_inner, g_n, g_k, G_UNIT)
        tl.debug_barrier()  # in place: all have read the targets' logits
        if SINGLE:
            values = tile_gradient(z, m, c, y, k, g_y, uniform)
            store_tile(g, c, C, there, values, g_c, G_UNIT)
        else:
            for first in range(0, C, BLOCK_C):
                j = first + c
                z, others = load_tile(x, j, y, C, read, x_c, A, X_UNIT, T, ADJUST)
                values = tile_gradient(z, m, j, y, k, g_y, uniform)
                store_tile(g, j, C, there, values, g_c, G_UNIT)


# Sigmoid ------------------------------------------------------------------------------------------


@kernel
def sigmoid_tiles(
    logits, target, grad, scale, normalizer, logit_bias, margin, pos_weight, grad_loss, losses,
    saved, rows: i32, C: i32, K: i32, x_n: i64, x_c: i32, x_k: i64, g_n: i64, g_c: i32, g_k: i64,
    gamma: f64, gamma_neg: f64, alpha: f64, alpha_neg: f64, clip: f64, eps: f64,
    logit_scale: f64, denominator: f64, background: i64,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, T: tl.constexpr, G: tl.constexpr,
    X_UNIT: tl.constexpr, G_UNIT: tl.constexpr, INNER: tl.constexpr,
    SMOOTH: tl.constexpr, FOLD: tl.constexpr, VECTOR: tl.constexpr, PER_ROW: tl.constexpr,
    ALPHA: tl.constexpr, ADJUST: tl.constexpr, BACKGROUND: tl.constexpr,
):  # fmt: skip
    """ROWS rows per program, BLOCK_C classes at a time: one read, one write."""
    n, k, row, there = tile_inputs(rows, K, ROWS, INNER)
    SHORT: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth == 16
    f = sigmoid_formula(gamma, gamma_neg, alpha, alpha_neg, clip, eps, C, ALPHA, T)
    y, r, keep, read = row_inputs(
        target, scale, normalizer, grad_loss, row, there, C, scalar(denominator, T), FOLD, VECTOR,
        background, BACKGROUND,
    )  # fmt: skip
    labelled = read
    if BACKGROUND:
        labelled = read & (y < C)
    x = tile_pointer(logits, n, k, x_n, x_k, X_UNIT)
    g = x
    if grad is not None:
        g = tile_pointer(grad, n, k, g_n, g_k, G_UNIT)
    A = (logit_bias, margin, logit_scale_of(logit_scale, T, ADJUST))
    z_y = target_logit(x + class_offset(y, x_c, X_UNIT), y, labelled, A, T, ADJUST)
    L_y, g_y = target_element(
        z_y, y, labelled, pos_weight, f, G, SHORT, SMOOTH, BACKGROUND
    )  # fmt: skip
    slope = r * A[2]
    share = scalar(1.0, T) if SMOOTH else scalar(f[3], T)
    slope_others = slope * share
    L = tl.zeros_like(z_y)
    tl.debug_barrier()  # in place: all have read the targets' logits
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        z, others = load_tile(x, c, y, C, read, x_c, A, X_UNIT, T, ADJUST)
        L_tile, g_tile = other_element(z, f, G, SHORT, SMOOTH)
        if SMOOTH:
            L_tile = tl.where(others, L_tile, 0.0)
        L += tl.sum(L_tile, 0)
        if grad is not None:
            g_y_tile = (slope * g_y)[None, :]
            values = tl.where(c[:, None] == y[None, :], g_y_tile, slope_others[None, :] * g_tile)
            store_tile(g, c, C, there, values, g_c, G_UNIT)
    if losses is not None:
        loss = weighted(r, weighted(share, L) + L_y)
        if PER_ROW:
            tl.store(losses + row, loss, there)
        else:
            tl.store(losses + tl.program_id(0), tl.sum(tl.where(there, loss, 0.0)))
        if saved is not None:
            tl.store(saved + row, tl.where(keep, r, -1.0), there)
