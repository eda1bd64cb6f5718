"""Rows whose targets are a number a class (soft or multi-hot), or whose classes have weights.

A program takes ROWS rows of any strides, BLOCK_C classes at a time. What is one number a row, the
labels' mean weight and the denominator too, is in scale already; a class index is a target of 1.
"""

import triton
import triton.language as tl

from .rows import (
    INF,
    adjusted,
    adjustment,
    clamp_finite,
    exp,
    f64,
    i32,
    i64,
    kernel,
    log,
    log1m_over,
    weighted,
)
from .sigmoid import mixed, sigmoid_numbers
from .softmax import below, softmax_numbers


@triton.jit
def row_starts(rows, K, ROWS: tl.constexpr):
    """(n, k, row, there) of a program's rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = row // K
    return n.to(tl.int64), (row - n * K).to(tl.int64), row, row < rows


@triton.jit
def load_pair(
    x, t, c, y, C, there, x_c, t_c, A,
    T: tl.constexpr, ADJUST: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """(z, t, inside) of classes c of rows: -inf and 0 beyond the last."""
    inside = there[:, None] & (c < C)[None, :]
    at = c.to(tl.int64)[None, :]
    z = tl.load(x[:, None] + at * x_c, inside, -INF).to(T)
    if INDEX:
        t_j = tl.where(c[None, :] == y[:, None], 1.0, 0.0).to(T)
    else:
        t_j = tl.load(t[:, None] + at * t_c, inside, 0.0).to(T)
    z = adjusted(z, c[None, :], inside, A, ADJUST)
    if INDEX and ADJUST:
        if A[1] is not None:
            off = A[2] * tl.load(A[1] + y, there, 0.0)
            z -= tl.where(t_j == 1, off[:, None], 0.0)
    return z, t_j, inside


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


@kernel
def softmax_dense(
    logits, target, grad, scale, logit_bias, grad_loss, losses,
    rows: i32, C: i32, K: i32, x_n: i64, x_c: i64, x_k: i64, t_n: i64, t_c: i64, t_k: i64,
    g_n: i64, g_c: i64, g_k: i64, gamma: f64, eps: f64, zeta: f64, logit_scale: f64,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, T: tl.constexpr, SMOOTH: tl.constexpr,
    Z: tl.constexpr, ADJUST: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The largest logit is left out of the sums, as a class index is elsewhere."""
    n, k_inner, row, there = row_starts(rows, K, ROWS)
    r = tl.load(scale + row, there, 0.0)
    if grad_loss is not None:
        r *= tl.load(grad_loss + row * VECTOR, there, 0.0)
    A = adjustment(logit_bias, None, logit_scale, T, ADJUST)
    x = logits + n * x_n + k_inner * x_k
    t = target + n * t_n + k_inner * t_k
    M = tl.zeros((ROWS,), T) - INF
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        z, _, _ = load_pair(x, t, c, row, C, there, x_c, t_c, A, T, ADJUST, False)
        M = tl.maximum(M, tl.max(z, 1))
    m = clamp_finite(M)
    R = tl.zeros((ROWS,), T)
    tops = tl.zeros((ROWS,), T)
    W = tl.zeros((ROWS,), T)
    t_top = tl.zeros((ROWS,), T)
    B = tl.zeros((ROWS,), T)
    D = tl.zeros((ROWS,), T)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        z, t_j, inside = load_pair(x, t, c, row, C, there, x_c, t_c, A, T, ADJUST, False)
        top = inside & (z == M[:, None])
        d = below(z, m[:, None])
        d = tl.where((M == INF)[:, None] & (z < INF), -INF, d)
        R += tl.sum(tl.where(top, 0.0, exp(d)), 1)
        tops += tl.sum(tl.where(top, 1.0, 0.0), 1)
        W += tl.sum(tl.where(top, 0.0, t_j), 1)
        t_top += tl.sum(tl.where(top, t_j, 0.0), 1)
        B += tl.sum(tl.where(t_j == 0, 0.0, t_j * d), 1)
        if SMOOTH:
            D += tl.sum(tl.where(inside, d, 0.0), 1)
    R += tops - 1.0
    R = tl.where((M == INF) & (tops > 1), float("nan"), R)  # no limit
    loss, k, g_top, uniform, hard = soft_row(
        R, r, W + t_top, W, B, D, C, M, softmax_numbers(gamma, eps, zeta, T), A[2], SMOOTH, Z
    )  # fmt: skip
    if losses is not None:
        tl.store(losses + row, loss, there)
    if grad is not None:
        g = grad + n * g_n + k_inner * g_k
        for first in range(0, C, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            z, t_j, inside = load_pair(x, t, c, row, C, there, x_c, t_c, A, T, ADJUST, False)
            d = below(z, m[:, None])
            d = tl.where((M == INF)[:, None] & (z < INF), -INF, d)
            values = k[:, None] * exp(d) - uniform[:, None] - hard[:, None] * t_j
            alone = (z == M[:, None]) & (tops == 1)[:, None]
            values = tl.where(alone, g_top[:, None], values)
            at = g[:, None] + c.to(tl.int64)[None, :] * g_c
            tl.store(at, values.to(grad.dtype.element_ty), inside)


@kernel
def sigmoid_dense(
    logits, target, weight, grad, scale, logit_bias, margin, grad_loss, losses,
    rows: i32, C: i32, K: i32, x_n: i64, x_c: i64, x_k: i64, t_n: i64, t_c: i64, t_k: i64,
    g_n: i64, g_c: i64, g_k: i64, gamma: f64, gamma_neg: f64, alpha: f64, alpha_neg: f64,
    clip: f64, eps: f64, logit_scale: f64,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, T: tl.constexpr, G: tl.constexpr,
    ALPHA: tl.constexpr, ADJUST: tl.constexpr, INDEX: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One read of logits and targets, one write of the gradient."""
    n, k_inner, row, there = row_starts(rows, K, ROWS)
    SHORT: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth == 16
    f = sigmoid_numbers(gamma, gamma_neg, alpha, alpha_neg, clip, eps, C, ALPHA, T)
    A = adjustment(logit_bias, margin, logit_scale, T, ADJUST)
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
    slope = r * A[2]
    L = tl.zeros((ROWS,), T)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        z, t_j, inside = load_pair(
            x, t, c, y, C, there_read, x_c, t_c, A, T, ADJUST, INDEX
        )  # fmt: skip
        t_j = (1.0 - f[5]) * t_j + f[6]
        L_j, g_j = mixed(z, t_j, f, G, SHORT)
        if weight is not None:
            w = tl.load(weight + c, c < C, 0.0)[None, :]
            L_j = weighted(w, L_j)
            g_j *= w
        L += tl.sum(tl.where(inside, L_j, 0.0), 1)
        if grad is not None:
            at = grad + n[:, None] * g_n + k_inner[:, None] * g_k + c.to(tl.int64)[None, :] * g_c
            values = tl.where(keep[:, None], slope[:, None] * g_j, 0.0)
            tl.store(at, values.to(grad.dtype.element_ty), there[:, None] & (c < C)[None, :])
    if losses is not None:
        tl.store(losses + row, tl.where(keep, weighted(r, L), 0.0), there)
