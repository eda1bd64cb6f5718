"""Rows whose targets are a number per class (soft or multi-hot), or whose classes have weights.

A program takes ROWS rows of any strides, BLOCK_C classes at a time. With r the row weight (soft
targets: the sample weight s times the mean weight of the labels), class index y counts as t_y = 1:

    softmax   s sum_c t_c w_c (-log p_c), and r times smoothing and z-loss
    sigmoid   r sum_j (t_j L(z_j, 1) + (1 - t_j) L(z_j, 0)), or w_j in each term and none in r
"""

import triton
import triton.language as tl

from .numerics import INF, f64, i32, i64, kernel, scalar, weighted
from .rows import adjusted, divided, divisor, logit_scale_of, row_inputs
from .sigmoid import mixed, sigmoid_formula
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
    rows: i32, C: i32, K: i32, t_n: i64, t_c: i64, t_k: i64, unknown: f64,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, T: tl.constexpr, UNIT: tl.constexpr,
    VEC: tl.constexpr, PARTIAL: tl.constexpr,
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
        if PARTIAL:
            known = t_j != scalar(unknown, T)
            t_j = tl.where(known, t_j, 0.0)
            tw_j = tl.where(known, tw_j, 0.0)
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
    denominator = divisor(scale, normalizer, scalar(denominator, T), FOLD)
    return divided(s, denominator), divided(r, denominator)


@triton.jit
def store_losses(losses, row, there, loss, PER_ROW: tl.constexpr):
    if PER_ROW:
        tl.store(losses + row, loss, there)
    else:
        tl.store(losses + tl.program_id(0), tl.sum(tl.where(there, loss, 0.0)))


@kernel
def sigmoid_soft(
    logits, target, weight, sample_weight, normalizer, grad, scale, parts, logit_bias, margin,
    pos_weight, grad_loss, losses, saved,
    rows: i32, C: i32, K: i32, x_n: i64, x_c: i64, x_k: i64, t_n: i64, t_c: i64, t_k: i64,
    g_n: i64, g_c: i64, g_k: i64, gamma: f64, gamma_neg: f64, alpha: f64, alpha_neg: f64,
    clip: f64, eps: f64, logit_scale: f64, denominator: f64, background: i64, unknown: f64,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, T: tl.constexpr, UNIT: tl.constexpr,
    VEC: tl.constexpr, G: tl.constexpr, ALPHA: tl.constexpr, ADJUST: tl.constexpr,
    INDEX: tl.constexpr, BACKGROUND: tl.constexpr, PARTIAL: tl.constexpr, FOLD: tl.constexpr,
    VECTOR: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """One read of logits and targets, one write of the gradient; weight: of the classes' terms."""
    n, k_inner, row, there = row_starts(rows, K, ROWS)
    SHORT: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth == 16
    f = sigmoid_formula(gamma, gamma_neg, alpha, alpha_neg, clip, eps, C, ALPHA, T)
    A = (logit_bias, margin, logit_scale_of(logit_scale, T, ADJUST))
    x = logits + n * x_n + k_inner * x_k
    t = target
    y = row
    keep = there
    read = there
    if INDEX:
        y, r, keep, read = row_inputs(
            target, saved if grad_loss is not None else scale, normalizer, grad_loss, row, there,
            C, scalar(denominator, T), FOLD, VECTOR, background, BACKGROUND,
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
                    off = A[2] * tl.load(margin + y, read & (y < C), 0.0)
                    z -= tl.where(at_y, off[:, None], 0.0)
        else:
            t_j = tl.load(elements(t, c, t_c, UNIT, VEC), inside, 0.0).to(T)
        known = inside
        if PARTIAL:
            known = inside & (t_j != scalar(unknown, T))
        t_j = (1.0 - f[5]) * t_j + f[6]
        v = None
        if pos_weight is not None:
            v = per_class(pos_weight, c, C, UNIT, VEC)
        L_j, g_j = mixed(z, t_j, v, f, G, SHORT)
        if weight is not None:
            w = per_class(weight, c, C, UNIT, VEC)
            L_j = weighted(w, L_j)
            g_j *= w
        L += tl.where(known, L_j, 0.0)
        if grad is not None:
            values = tl.where(keep[:, None], slope[:, None] * g_j, 0.0)
            if PARTIAL:
                values = tl.where(known, values, 0.0)
            at = elements(g, c, g_c, UNIT, VEC)
            tl.store(at, values.to(grad.dtype.element_ty), within(c, C, there, VEC))
    if losses is not None:
        loss = tl.where(keep, weighted(r, tl.sum(L, 1)), 0.0)
        store_losses(losses, row, there, loss, PER_ROW)
        if saved is not None:
            tl.store(saved + row, tl.where(keep, r, -1.0), there)
