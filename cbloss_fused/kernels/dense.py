"""Rows whose targets are a number a class (soft or multi-hot), or whose classes have weights.

A program takes ROWS rows of any strides, BLOCK_C classes at a time. What is one number a row, the
labels' mean weight and the denominator too, is in scale already; a class index is a target of 1.
"""

import triton
import triton.language as tl

from .rows import (
    INF,
    adjusted,
    clamp_finite,
    exp,
    f64,
    i32,
    i64,
    kernel,
    log,
    log1m_over,
    scale_of,
    weighted,
)
from .sigmoid import mixed, sigmoid_numbers
from .softmax import below, softmax_numbers
from .tiles import UNIT_C, UNIT_K


@triton.jit
def row_starts(rows, K, ROWS: tl.constexpr):
    """(n, k, row, there) of a program's rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = row // K
    return n.to(tl.int64), (row - n * K).to(tl.int64), row, row < rows


@triton.jit
def elements(x, c, stride_c, UNIT: tl.constexpr, VEC: tl.constexpr):
    """The classes c of rows x; VEC of them are one access, threads lie along what is unit."""
    if UNIT == UNIT_C:
        size: tl.constexpr = x.dtype.element_ty.primitive_bitwidth // 8
        return tl.multiple_of(x[:, None] + c[None, :], (1, VEC * size))
    at = x[:, None] + c.to(tl.int64)[None, :] * stride_c
    if UNIT == UNIT_K:
        at = tl.max_contiguous(at, (16, 1))
    return at


@triton.jit
def within(c, C, there, VEC: tl.constexpr):
    """Which elements there are; C is a multiple of VEC."""
    return tl.max_constancy(there[:, None] & (c < C)[None, :], (1, VEC))


@triton.jit
def load_logits(
    x, c, inside, x_c, A, T: tl.constexpr, ADJUST: tl.constexpr, UNIT: tl.constexpr,
    VEC: tl.constexpr,
):  # fmt: skip
    """z of classes c of rows, -inf beyond the last."""
    z = tl.load(elements(x, c, x_c, UNIT, VEC), inside, -INF).to(T)
    return adjusted(z, c[None, :], inside, A, ADJUST)


@triton.jit
def soft_row(R, r, W, W_others, B, D, C, M, f, scale, SMOOTH: tl.constexpr, Z: tl.constexpr):
    """(loss, k, g_top, uniform, hard), see reference.soft_row."""
    _, eps, zeta = f
    S = 1.0 + R
    q = R / S
    nll = tl.where(q <= 0.5, q * log1m_over(tl.minimum(q, 0.5), False), log(S))
    slope = r * scale
    hard = slope * (1.0 - eps)
    loss = weighted(r, (1.0 - eps) * (W * nll - B))
    k = hard * W / S
    g_top = hard * (W_others - W * q)
    uniform = r * 0.0
    if SMOOTH:
        uniform = slope * (eps / C)
        loss += weighted(r, eps / C * (C * nll - D))
        k += slope * eps / S
        g_top += slope * eps * (1.0 - q) - uniform
    if Z:
        lse = M + nll
        steep = clamp_finite(slope * (2 * zeta) * clamp_finite(lse))
        loss += weighted(r, zeta * lse * lse)
        k += steep / S
        g_top += steep * (1.0 - q)
    return loss, k, g_top, uniform, hard


@triton.jit
def soft_terms(z, t_j, inside, c, top, m, SMOOTH: tl.constexpr):
    """(e, t, B, D) of elements, 0 at the top; whose sums are R, W_others, B, D."""
    other = c[None, :] != top[:, None]
    d = below(z, m[:, None])
    e = tl.where(other, exp(d), 0.0)
    t_j = tl.where(other, t_j, 0.0)
    B = tl.where(t_j == 0, 0.0, t_j * d)
    D = t_j
    if SMOOTH:
        D = tl.where(other & inside, d, 0.0)
    return e, t_j, B, D


@triton.jit
def soft_gradient(e, t_j, k, uniform, hard, SMOOTH: tl.constexpr):
    """Of all but the top's element."""
    values = k[:, None] * e - hard[:, None] * t_j
    if SMOOTH:
        values -= uniform[:, None]
    return values


@kernel
def softmax_dense(
    logits, target, grad, scale, logit_bias, grad_loss, losses,
    rows: i32, C: i32, K: i32, x_n: i64, x_c: i64, x_k: i64, t_n: i64, t_c: i64, t_k: i64,
    g_n: i64, g_c: i64, g_k: i64, gamma: f64, eps: f64, zeta: f64, logit_scale: f64,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, T: tl.constexpr, UNIT: tl.constexpr,
    VEC: tl.constexpr, SINGLE: tl.constexpr, SMOOTH: tl.constexpr, Z: tl.constexpr,
    ADJUST: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The largest logit, of equals the first, is left out of the sums as a class index elsewhere.

    SINGLE: all classes are one tile, read once. Else sums are kept an element of the tile until the
    end: a reduction in a loop costs more, and Triton 3.6 and 3.7 fail on one whose result is used
    twice.
    """
    n, k_inner, row, there = row_starts(rows, K, ROWS)
    r = tl.load(scale + row, there, 0.0)
    if grad_loss is not None:
        r *= tl.load(grad_loss + row * VECTOR, there, 0.0)
    A = (logit_bias, None, scale_of(logit_scale, T, ADJUST))
    x = logits + n * x_n + k_inner * x_k
    t = target + n * t_n + k_inner * t_k
    c = tl.arange(0, BLOCK_C)
    if SINGLE:
        inside = within(c, C, there, VEC)
        z = load_logits(x, c, inside, x_c, A, T, ADJUST, UNIT, VEC)
        t_j = tl.load(elements(t, c, t_c, UNIT, VEC), inside, 0.0).to(T)
        largest = z
        place = tl.broadcast_to(c[None, :], (ROWS, BLOCK_C))
    else:
        largest = tl.zeros((ROWS, BLOCK_C), T) - INF
        place = tl.zeros((ROWS, BLOCK_C), tl.int32)
        for first in range(0, C, BLOCK_C):
            j = first + c
            z = load_logits(x, j, within(j, C, there, VEC), x_c, A, T, ADJUST, UNIT, VEC)
            place = tl.where(z > largest, j[None, :], place)
            largest = tl.maximum(largest, z)
    M = tl.max(largest, 1)
    top = tl.min(tl.where(largest == M[:, None], place, C), 1)
    m = clamp_finite(M)
    t_top = tl.load(t + top.to(tl.int64) * t_c, there & (top < C), 0.0).to(T)
    if SINGLE:
        e, t_j, B, D = soft_terms(z, t_j, inside, c, top, m, SMOOTH)
        R = e
        W = t_j
    else:
        R = tl.zeros((ROWS, BLOCK_C), T)
        W = tl.zeros((ROWS, BLOCK_C), T)
        B = tl.zeros((ROWS, BLOCK_C), T)
        D = tl.zeros((ROWS, BLOCK_C), T)
        for first in range(0, C, BLOCK_C):
            j = first + c
            inside = within(j, C, there, VEC)
            z = load_logits(x, j, inside, x_c, A, T, ADJUST, UNIT, VEC)
            t_j = tl.load(elements(t, j, t_c, UNIT, VEC), inside, 0.0).to(T)
            e, t_j, B_j, D_j = soft_terms(z, t_j, inside, j, top, m, SMOOTH)
            R += e
            W += t_j
            B += B_j
            D += D_j
    R = tl.sum(R, 1)
    W = tl.sum(W, 1)
    B = tl.sum(B, 1)
    D = tl.sum(D, 1)
    infinite = M == INF  # then all others are -inf below it; of two such there is no limit
    R = tl.where((infinite & (R > 0)) | (M == -INF), float("nan"), R)
    B = tl.where(infinite & (W != 0), -INF, B)
    D = tl.where(infinite & (C > 1), -INF, D)
    loss, k, g_top, uniform, hard = soft_row(
        R, r, W + t_top, W, B, D, C, M, softmax_numbers(gamma, eps, zeta, T), A[2], SMOOTH, Z
    )  # fmt: skip
    if losses is not None:
        tl.store(losses + row, loss, there)
    if grad is not None:
        g = grad + n * g_n + k_inner * g_k
        if SINGLE:
            values = soft_gradient(e, t_j, k, uniform, hard, SMOOTH)
            tl.store(elements(g, c, g_c, UNIT, VEC), values.to(grad.dtype.element_ty), inside)
        else:
            for first in range(0, C, BLOCK_C):
                j = first + c
                inside = within(j, C, there, VEC)
                z = load_logits(x, j, inside, x_c, A, T, ADJUST, UNIT, VEC)
                t_j = tl.load(elements(t, j, t_c, UNIT, VEC), inside, 0.0).to(T)
                e = exp(below(z, m[:, None]))
                values = soft_gradient(e, t_j, k, uniform, hard, SMOOTH)
                tl.store(elements(g, j, g_c, UNIT, VEC), values.to(grad.dtype.element_ty), inside)
        tl.debug_barrier()  # the top's element once more, when all are there
        at = g + top.to(tl.int64) * g_c
        tl.store(at, g_top.to(grad.dtype.element_ty), there & (top < C))


@kernel
def sigmoid_dense(
    logits, target, weight, grad, scale, logit_bias, margin, grad_loss, losses,
    rows: i32, C: i32, K: i32, x_n: i64, x_c: i64, x_k: i64, t_n: i64, t_c: i64, t_k: i64,
    g_n: i64, g_c: i64, g_k: i64, gamma: f64, gamma_neg: f64, alpha: f64, alpha_neg: f64,
    clip: f64, eps: f64, logit_scale: f64,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, T: tl.constexpr, UNIT: tl.constexpr,
    VEC: tl.constexpr, G: tl.constexpr, ALPHA: tl.constexpr, ADJUST: tl.constexpr,
    INDEX: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One read of logits and targets, one write of the gradient."""
    n, k_inner, row, there = row_starts(rows, K, ROWS)
    SHORT: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth == 16
    f = sigmoid_numbers(gamma, gamma_neg, alpha, alpha_neg, clip, eps, C, ALPHA, T)
    A = (logit_bias, margin, scale_of(logit_scale, T, ADJUST))
    r = tl.load(scale + row, there, 0.0)
    keep = (r >= 0) | (r != r)  # a row that is ignored has -1
    r = tl.where(keep, r, 0.0)
    if grad_loss is not None:
        r *= tl.load(grad_loss + row * VECTOR, there, 0.0)
    there_read = there & keep
    x = logits + n * x_n + k_inner * x_k
    y = row
    t = target
    if INDEX:
        y = tl.load(target + row, there, 0)
        valid = (y >= 0) & (y < C)
        r = tl.where(keep & (valid == 0), float("nan"), r)
        there_read &= valid
        y = tl.where(valid, y, 0)
    else:
        t = target + n * t_n + k_inner * t_k
    g = x
    if grad is not None:
        g = grad + n * g_n + k_inner * g_k
    slope = r * A[2]
    L = tl.zeros((ROWS, BLOCK_C), T)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        inside = within(c, C, there_read, VEC)
        z = load_logits(x, c, inside, x_c, A, T, ADJUST, UNIT, VEC)
        if INDEX:
            at_y = c[None, :] == y[:, None]
            t_j = tl.where(at_y, 1.0, 0.0).to(T)
            if ADJUST:
                if margin is not None:
                    off = A[2] * tl.load(margin + y, there_read, 0.0)
                    z -= tl.where(at_y, off[:, None], 0.0)
        else:
            t_j = tl.load(elements(t, c, t_c, UNIT, VEC), inside, 0.0).to(T)
        t_j = (1.0 - f[5]) * t_j + f[6]
        L_j, g_j = mixed(z, t_j, f, G, SHORT)
        if weight is not None:
            w = tl.load(weight + c, c < C, 0.0)[None, :]
            L_j = weighted(w, L_j)
            g_j *= w
        L += tl.where(inside, L_j, 0.0)
        if grad is not None:
            values = tl.where(keep[:, None], slope[:, None] * g_j, 0.0)
            at = elements(g, c, g_c, UNIT, VEC)
            tl.store(at, values.to(grad.dtype.element_ty), within(c, C, there, VEC))
    L = tl.sum(L, 1)
    if losses is not None:
        tl.store(losses + row, tl.where(keep, weighted(r, L), 0.0), there)
