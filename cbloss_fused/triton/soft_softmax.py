"""Softmax with soft targets, see soft_targets.py: softmax_soft and its formula, soft_row.

The largest logit, of equals the first, is left out of the sums as a class index is elsewhere.
"""

import triton
import triton.language as tl

from .numerics import INF, clamp_finite, exp, f64, i32, i64, kernel, log, log1m_over, weighted
from .rows import logit_scale_of
from .soft_targets import (
    elements,
    load_logits,
    load_targets,
    mean_weight,
    row_starts,
    soft_inputs,
    store_losses,
    within,
)
from .softmax import below, softmax_formula


@triton.jit
def soft_row(
    R, s, r, W, W_others, B, D, C, M, f, logit_scale, SMOOTH: tl.constexpr, Z: tl.constexpr
):
    """(loss, k, g_top, uniform, hard), see reference.soft_row."""
    _, eps, zeta = f
    S = 1.0 + R
    q = R / S
    nll = tl.where(q <= 0.5, q * log1m_over(tl.minimum(q, 0.5), False), log(S))
    slope = r * logit_scale
    hard = s * logit_scale * (1.0 - eps)
    loss = weighted(s, (1.0 - eps) * (W * nll - B))
    k = hard * W / S
    g_top = hard * (W_others - W * q)
    uniform = r * 0.0
    if SMOOTH:
        uniform = slope * (eps / C)
        loss += weighted(r, eps / C * (C * nll - D))
        k += slope * eps / S
        g_top += slope * eps / S - uniform
    if Z:
        lse = M + nll
        steep = clamp_finite(slope * (2 * zeta) * clamp_finite(lse))
        loss += weighted(r, zeta * lse * lse)
        k += steep / S
        g_top += steep / S
    return loss, k, g_top, uniform, hard


@triton.jit
def soft_terms(z, tw_j, inside, c, top, m, SMOOTH: tl.constexpr):
    """(e, t w, B, D) of elements, 0 at the top; whose sums are R, W_others, B, D."""
    other = c[None, :] != top[:, None]
    d = below(z, m[:, None])
    e = tl.where(other, exp(d), 0.0)
    tw_j = tl.where(other, tw_j, 0.0)
    B = tw_j * tl.where(tw_j == 0, 0.0, d)
    D = tw_j
    if SMOOTH:
        D = tl.where(other & inside, d, 0.0)
    return e, tw_j, B, D


@triton.jit
def soft_gradient(e, tw_j, k, uniform, hard, SMOOTH: tl.constexpr):
    """Of all but the top's element."""
    values = k[:, None] * e - hard[:, None] * tw_j
    if SMOOTH:
        values -= uniform[:, None]
    return values


# Rows of many classes: three reads, BLOCK_C classes at a time. Sums are kept for each element of
# the tile until the end: a reduction in a loop costs more, and Triton 3.6 and 3.7 fail on one whose
# result is used twice.


@triton.jit
def soft_largest(
    x, x_c, C, there, A,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, T: tl.constexpr, ADJUST: tl.constexpr,
    UNIT: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """(largest logit, its class) of each element of the tile."""
    largest = tl.zeros((ROWS, BLOCK_C), T) - INF
    place = tl.zeros((ROWS, BLOCK_C), tl.int32)
    for first in range(0, C, BLOCK_C):
        j = first + tl.arange(0, BLOCK_C)
        z = load_logits(x, j, within(j, C, there, VEC), x_c, A, T, ADJUST, UNIT, VEC)
        place = tl.where(z > largest, j[None, :], place)
        largest = tl.maximum(largest, z)
    return largest, place


@triton.jit
def soft_sums(
    x, x_c, t, t_c, weight, C, there, top, m, A,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, T: tl.constexpr, ADJUST: tl.constexpr,
    UNIT: tl.constexpr, VEC: tl.constexpr, SMOOTH: tl.constexpr, LABELS: tl.constexpr,
):  # fmt: skip
    """soft_terms of all classes, and the targets (LABELS), added up element by element."""
    R = tl.zeros((ROWS, BLOCK_C), T)
    W = tl.zeros((ROWS, BLOCK_C), T)
    B = tl.zeros((ROWS, BLOCK_C), T)
    D = tl.zeros((ROWS, BLOCK_C), T)
    labels = tl.zeros((ROWS, BLOCK_C), T)
    for first in range(0, C, BLOCK_C):
        j = first + tl.arange(0, BLOCK_C)
        inside = within(j, C, there, VEC)
        z = load_logits(x, j, inside, x_c, A, T, ADJUST, UNIT, VEC)
        t_j, tw_j = load_targets(t, j, inside, t_c, weight, C, T, UNIT, VEC)
        e, tw_j, B_j, D_j = soft_terms(z, tw_j, inside, j, top, m, SMOOTH)
        R += e
        W += tw_j
        B += B_j
        D += D_j
        if LABELS:
            labels += t_j
    return R, W, B, D, labels


@triton.jit
def put_soft_gradient(
    x, x_c, t, t_c, weight, g, g_c, C, there, m, k, uniform, hard, A,
    BLOCK_C: tl.constexpr, T: tl.constexpr, ADJUST: tl.constexpr, UNIT: tl.constexpr,
    VEC: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    for first in range(0, C, BLOCK_C):
        j = first + tl.arange(0, BLOCK_C)
        inside = within(j, C, there, VEC)
        z = load_logits(x, j, inside, x_c, A, T, ADJUST, UNIT, VEC)
        _, tw_j = load_targets(t, j, inside, t_c, weight, C, T, UNIT, VEC)
        e = exp(below(z, m[:, None]))
        values = soft_gradient(e, tw_j, k, uniform, hard, SMOOTH)
        tl.store(elements(g, j, g_c, UNIT, VEC), values.to(g.dtype.element_ty), inside)


@kernel
def softmax_soft(
    logits, target, weight, sample_weight, normalizer, grad, scale, parts, logit_bias, grad_loss,
    losses, saved,
    rows: i32, C: i32, K: i32, x_n: i64, x_c: i64, x_k: i64, t_n: i64, t_c: i64, t_k: i64,
    g_n: i64, g_c: i64, g_k: i64, gamma: f64, eps: f64, zeta: f64, logit_scale: f64,
    denominator: f64,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, T: tl.constexpr, UNIT: tl.constexpr,
    VEC: tl.constexpr, SINGLE: tl.constexpr, SMOOTH: tl.constexpr, Z: tl.constexpr,
    ADJUST: tl.constexpr, FOLD: tl.constexpr, VECTOR: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """SINGLE: all classes are one tile, read once."""
    n, k_inner, row, there = row_starts(rows, K, ROWS)
    # Whether r is needed and made here.
    LABELS: tl.constexpr = (
        (weight is not None) and (SMOOTH or Z) and (grad_loss is None) and (parts is None)
    )
    if grad_loss is not None:
        incoming = tl.load(grad_loss + row * VECTOR, there, 0.0)
        s = tl.load(saved + row, there, 0.0) * incoming
        r = tl.load(saved + rows + row, there, 0.0) * incoming
    else:
        s, r = soft_inputs(
            sample_weight, parts, scale, normalizer, row, there, denominator, T, FOLD
        )  # fmt: skip
    A = (logit_bias, None, logit_scale_of(logit_scale, T, ADJUST))
    x = logits + n * x_n + k_inner * x_k
    t = target + n * t_n + k_inner * t_k
    c = tl.arange(0, BLOCK_C)
    if SINGLE:
        inside = within(c, C, there, VEC)
        z = load_logits(x, c, inside, x_c, A, T, ADJUST, UNIT, VEC)
        t_j, tw_j = load_targets(t, c, inside, t_c, weight, C, T, UNIT, VEC)
        if LABELS:  # here, where no more than these are in registers
            r *= mean_weight(tl.sum(t_j, 1), tl.sum(tw_j, 1))
        largest = z
        place = tl.broadcast_to(c[None, :], (ROWS, BLOCK_C))
    else:
        largest, place = soft_largest(
            x, x_c, C, there, A, ROWS, BLOCK_C, T, ADJUST, UNIT, VEC
        )  # fmt: skip
    M = tl.max(largest, 1)
    top = tl.min(tl.where(largest == M[:, None], place, C), 1)
    m = clamp_finite(M)
    found = there & (top < C)
    at_top = t + top.to(tl.int64) * t_c
    if weight is None:
        W_top = tl.load(at_top, found, 0.0).to(T)
    if SINGLE:
        e, tw_j, B, D = soft_terms(z, tw_j, inside, c, top, m, SMOOTH)
        R = e
        W = tw_j
    else:
        R, W, B, D, labels = soft_sums(
            x, x_c, t, t_c, weight, C, there, top, m, A,
            ROWS, BLOCK_C, T, ADJUST, UNIT, VEC, SMOOTH, LABELS,
        )  # fmt: skip
    R = tl.sum(R, 1)
    W = tl.sum(W, 1)
    B = tl.sum(B, 1)
    D = tl.sum(D, 1)
    if weight is not None:  # not before the sums, or tiles of 8192 classes would spill
        W_top = tl.load(at_top, found, 0.0).to(T) * tl.load(weight + top, found, 0.0)
    infinite = M == INF  # then all others are -inf below it; of two such there is no limit
    R = tl.where((infinite & (R > 0)) | (M == -INF), float("nan"), R)
    B = tl.where(infinite & (W != 0), -INF, B)
    D = tl.where(infinite & (C > 1), -INF, D)
    if LABELS and not SINGLE:
        r *= mean_weight(tl.sum(labels, 1), W + W_top)
    loss, k, g_top, uniform, hard = soft_row(
        R, s, r, W + W_top, W, B, D, C, M, softmax_formula(gamma, eps, zeta, T), A[2], SMOOTH, Z
    )  # fmt: skip
    if losses is not None:
        store_losses(losses, row, there, loss, PER_ROW)
        if saved is not None:
            tl.store(saved + row, s, there)
            tl.store(saved + rows + row, r, there)
    if grad is not None:
        g = grad + n * g_n + k_inner * g_k
        if SINGLE:
            values = soft_gradient(e, tw_j, k, uniform, hard, SMOOTH)
            tl.store(elements(g, c, g_c, UNIT, VEC), values.to(grad.dtype.element_ty), inside)
        else:
            put_soft_gradient(
                x, x_c, t, t_c, weight, g, g_c, C, there, m, k, uniform, hard, A,
                BLOCK_C, T, ADJUST, UNIT, VEC, SMOOTH,
            )  # fmt: skip
        tl.debug_barrier()  # the top's element once more, when all are there
        at = g + top.to(tl.int64) * g_c
        tl.store(at, g_top.to(grad.dtype.element_ty), found)
