"""Rows whose targets are a number per class (soft or multi-hot), or whose classes have weights.

A program takes ROWS rows of any strides, BLOCK_C classes at a time. With r the row weight (soft
targets: the sample weight s times the mean weight of the labels), class index y counts as t_y = 1:

    softmax   s sum_c t_c w_c (-log p_c), and r times smoothing and z-loss
    sigmoid   r sum_j (t_j L(z_j, 1) + (1 - t_j) L(z_j, 0)), or w_j in each term and none in r
"""

import triton
import triton.language as tl

from .rows import (
    INF,
    adjusted,
    clamp_finite,
    divided,
    divisor,
    exp,
    f64,
    i32,
    i64,
    kernel,
    log,
    log1m_over,
    number,
    row_inputs,
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
def per_class(vector, c, C, UNIT: tl.constexpr, VEC: tl.constexpr):
    """A vector's numbers of the classes c, for every row."""
    at = vector + c
    there = c < C
    if UNIT == UNIT_C:
        size: tl.constexpr = vector.dtype.element_ty.primitive_bitwidth // 8
        at = tl.multiple_of(at, (VEC * size,))
        there = tl.max_constancy(there, (VEC,))
    return tl.load(at, there, 0.0)[None, :]


@triton.jit
def load_logits(
    x, c, inside, x_c, A, T: tl.constexpr, ADJUST: tl.constexpr, UNIT: tl.constexpr,
    VEC: tl.constexpr,
):  # fmt: skip
    """z of classes c of rows, -inf beyond the last."""
    z = tl.load(elements(x, c, x_c, UNIT, VEC), inside, -INF).to(T)
    return adjusted(z, c[None, :], inside, A, ADJUST)


@triton.jit
def load_targets(
    t, c, inside, t_c, weight, C, T: tl.constexpr, UNIT: tl.constexpr, VEC: tl.constexpr
):
    """(t_j, t_j w_j) of classes c of rows, 0 beyond the last."""
    t_j = tl.load(elements(t, c, t_c, UNIT, VEC), inside, 0.0).to(T)
    if weight is None:
        return t_j, t_j
    else:
        return t_j, t_j * per_class(weight, c, C, UNIT, VEC)


@triton.jit
def mean_weight(labels, weights):
    """Of a row's labels: sum t_j w_j / sum t_j; 1 without labels."""
    return tl.where(labels != 0, weights / labels, 1.0)


@kernel
def label_weights(
    target, weight, sample_weight, parts,
    rows: i32, C: i32, K: i32, t_n: i64, t_c: i64, t_k: i64,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, T: tl.constexpr, UNIT: tl.constexpr,
    VEC: tl.constexpr,
):  # fmt: skip
    """r_i of soft targets, for a row kernel that needs it first or a prologue that adds them up."""
    n, k, row, there = row_starts(rows, K, ROWS)
    t = target + n * t_n + k * t_k
    labels = tl.zeros((ROWS, BLOCK_C), T)
    weights = tl.zeros((ROWS, BLOCK_C), T)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        inside = within(c, C, there, VEC)
        t_j, tw_j = load_targets(t, c, inside, t_c, weight, C, T, UNIT, VEC)
        labels += t_j
        weights += tw_j
    r = mean_weight(tl.sum(labels, 1), tl.sum(weights, 1))
    if sample_weight is not None:
        r *= tl.load(sample_weight + row, there, 0.0)
    tl.store(parts + row, r, there)


@triton.jit
def soft_inputs(
    sample_weight, parts, scale, normalizer, row, there, denominator,
    T: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """(s, r) by the denominator; r is s where label_weights has not made it."""
    s = tl.zeros_like(row).to(T) + 1.0
    if sample_weight is not None:
        s = tl.load(sample_weight + row, there, 0.0)
    r = s
    if parts is not None:
        r = tl.load(parts + row, there, 0.0)
    denominator = divisor(scale, normalizer, number(denominator, T), FOLD)
    return divided(s, denominator), divided(r, denominator)


@triton.jit
def store_losses(losses, row, there, loss, PER_ROW: tl.constexpr):
    if PER_ROW:
        tl.store(losses + row, loss, there)
    else:
        tl.store(losses + tl.program_id(0), tl.sum(tl.where(there, loss, 0.0)))


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
        g_top += slope * eps * (1.0 - q) - uniform
    if Z:
        lse = M + nll
        steep = clamp_finite(slope * (2 * zeta) * clamp_finite(lse))
        loss += weighted(r, zeta * lse * lse)
        k += steep / S
        g_top += steep * (1.0 - q)
    return loss, k, g_top, uniform, hard


@triton.jit
def soft_terms(z, tw_j, inside, c, top, m, SMOOTH: tl.constexpr):
    """(e, t w, B, D) of elements, 0 at the top; whose sums are R, W_others, B, D."""
    other = c[None, :] != top[:, None]
    d = below(z, m[:, None])
    e = tl.where(other, exp(d), 0.0)
    tw_j = tl.where(other, tw_j, 0.0)
    B = tl.where(tw_j == 0, 0.0, tw_j * d)
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


@kernel
def softmax_dense(
    logits, target, weight, sample_weight, normalizer, grad, scale, parts, logit_bias, grad_loss,
    losses, saved,
    rows: i32, C: i32, K: i32, x_n: i64, x_c: i64, x_k: i64, t_n: i64, t_c: i64, t_k: i64,
    g_n: i64, g_c: i64, g_k: i64, gamma: f64, eps: f64, zeta: f64, logit_scale: f64,
    denominator: f64,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, T: tl.constexpr, UNIT: tl.constexpr,
    VEC: tl.constexpr, SINGLE: tl.constexpr, SMOOTH: tl.constexpr, Z: tl.constexpr,
    ADJUST: tl.constexpr, FOLD: tl.constexpr, VECTOR: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """The largest logit, of equals the first, is left out of the sums as a class index elsewhere.

    SINGLE: all classes are one tile, read once. Else sums are kept an element of the tile until the
    end: a reduction in a loop costs more, and Triton 3.6 and 3.7 fail on one whose result is used
    twice.
    """
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
    A = (logit_bias, None, scale_of(logit_scale, T, ADJUST))
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
    found = there & (top < C)
    W_top = tl.load(t + top.to(tl.int64) * t_c, found, 0.0).to(T)
    if weight is not None:
        W_top *= tl.load(weight + top, found, 0.0)
    if SINGLE:
        e, tw_j, B, D = soft_terms(z, tw_j, inside, c, top, m, SMOOTH)
        R = e
        W = tw_j
    else:
        R = tl.zeros((ROWS, BLOCK_C), T)
        W = tl.zeros((ROWS, BLOCK_C), T)
        B = tl.zeros((ROWS, BLOCK_C), T)
        D = tl.zeros((ROWS, BLOCK_C), T)
        labels = tl.zeros((ROWS, BLOCK_C), T)
        for first in range(0, C, BLOCK_C):
            j = first + c
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
    R = tl.sum(R, 1)
    W = tl.sum(W, 1)
    B = tl.sum(B, 1)
    D = tl.sum(D, 1)
    infinite = M == INF  # then all others are -inf below it; of two such there is no limit
    R = tl.where((infinite & (R > 0)) | (M == -INF), float("nan"), R)
    B = tl.where(infinite & (W != 0), -INF, B)
    D = tl.where(infinite & (C > 1), -INF, D)
    if LABELS and not SINGLE:
        r *= mean_weight(tl.sum(labels, 1), W + W_top)
    loss, k, g_top, uniform, hard = soft_row(
        R, s, r, W + W_top, W, B, D, C, M, softmax_numbers(gamma, eps, zeta, T), A[2], SMOOTH, Z
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
            for first in range(0, C, BLOCK_C):
                j = first + c
                inside = within(j, C, there, VEC)
                z = load_logits(x, j, inside, x_c, A, T, ADJUST, UNIT, VEC)
                t_j, tw_j = load_targets(t, j, inside, t_c, weight, C, T, UNIT, VEC)
                e = exp(below(z, m[:, None]))
                values = soft_gradient(e, tw_j, k, uniform, hard, SMOOTH)
                tl.store(elements(g, j, g_c, UNIT, VEC), values.to(grad.dtype.element_ty), inside)
        tl.debug_barrier()  # the top's element once more, when all are there
        at = g + top.to(tl.int64) * g_c
        tl.store(at, g_top.to(grad.dtype.element_ty), found)


@kernel
def sigmoid_dense(
    logits, target, weight, sample_weight, normalizer, grad, scale, parts, logit_bias, margin,
    grad_loss, losses, saved,
    rows: i32, C: i32, K: i32, x_n: i64, x_c: i64, x_k: i64, t_n: i64, t_c: i64, t_k: i64,
    g_n: i64, g_c: i64, g_k: i64, gamma: f64, gamma_neg: f64, alpha: f64, alpha_neg: f64,
    clip: f64, eps: f64, logit_scale: f64, denominator: f64,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, T: tl.constexpr, UNIT: tl.constexpr,
    VEC: tl.constexpr, G: tl.constexpr, ALPHA: tl.constexpr, ADJUST: tl.constexpr,
    INDEX: tl.constexpr, FOLD: tl.constexpr, VECTOR: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """One read of logits and targets, one write of the gradient; weight: of the classes' terms."""
    n, k_inner, row, there = row_starts(rows, K, ROWS)
    SHORT: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth == 16
    f = sigmoid_numbers(gamma, gamma_neg, alpha, alpha_neg, clip, eps, C, ALPHA, T)
    A = (logit_bias, margin, scale_of(logit_scale, T, ADJUST))
    x = logits + n * x_n + k_inner * x_k
    t = target
    y = row
    keep = there
    read = there
    if INDEX:
        y, r, keep, read = row_inputs(
            target, saved if grad_loss is not None else scale, normalizer, grad_loss, row, there,
            C, number(denominator, T), FOLD, VECTOR,
        )  # fmt: skip
    else:
        t = target + n * t_n + k_inner * t_k
        if grad_loss is not None:
            r = tl.load(saved + row, there, 0.0)
            r *= tl.load(grad_loss + row * VECTOR, there, 0.0)
        else:
            _, r = soft_inputs(
                sample_weight, parts, scale, normalizer, row, there, denominator, T, FOLD
            )  # fmt: skip
    g = x
    if grad is not None:
        g = grad + n * g_n + k_inner * g_k
    slope = r * A[2]
    L = tl.zeros((ROWS, BLOCK_C), T)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        inside = within(c, C, read, VEC)
        z = load_logits(x, c, inside, x_c, A, T, ADJUST, UNIT, VEC)
        if INDEX:
            at_y = c[None, :] == y[:, None]
            t_j = tl.where(at_y, 1.0, 0.0).to(T)
            if ADJUST:
                if margin is not None:
                    off = A[2] * tl.load(margin + y, read, 0.0)
                    z -= tl.where(at_y, off[:, None], 0.0)
        else:
            t_j = tl.load(elements(t, c, t_c, UNIT, VEC), inside, 0.0).to(T)
        t_j = (1.0 - f[5]) * t_j + f[6]
        L_j, g_j = mixed(z, t_j, f, G, SHORT)
        if weight is not None:
            w = per_class(weight, c, C, UNIT, VEC)
            L_j = weighted(w, L_j)
            g_j *= w
        L += tl.where(inside, L_j, 0.0)
        if grad is not None:
            values = tl.where(keep[:, None], slope[:, None] * g_j, 0.0)
            at = elements(g, c, g_c, UNIT, VEC)
            tl.store(at, values.to(grad.dtype.element_ty), within(c, C, there, VEC))
    if losses is not None:
        loss = tl.where(keep, weighted(r, tl.sum(L, 1)), 0.0)
        store_losses(losses, row, there, loss, PER_ROW)
        if saved is not None:
            tl.store(saved + row, tl.where(keep, r, -1.0), there)
