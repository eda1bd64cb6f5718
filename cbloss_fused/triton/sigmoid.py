"""The sigmoid family: the formula of an element, then its row kernels.

Elements do not depend on each other, so one pass does for rows of any length.
"""

import triton
import triton.language as tl

from .numerics import (
    exp,
    exp_neg,
    f64,
    i32,
    i64,
    kernel,
    largest_finite,
    log,
    log1m_over,
    rcp,
    scalar,
    weighted,
)
from .rows import (
    body,
    edges,
    load_body,
    load_edges,
    logit_scale_of,
    peel,
    row_inputs,
    row_pointer,
    target_logit,
)

# The focal exponents with code of their own
ZERO = tl.constexpr(0)
HALF = tl.constexpr(1)
ONE = tl.constexpr(2)
TWO = tl.constexpr(3)
ANY = tl.constexpr(4)
# and codes that also know gamma_neg and, with smoothing, alpha; the second clips too
GENERAL = tl.constexpr(5)
CLIPPED = tl.constexpr(6)


@triton.jit
def sigmoid_formula(
    gamma, gamma_neg, alpha, alpha_neg, clip, eps, C, ALPHA: tl.constexpr, T: tl.constexpr
):
    """The formula's numbers; the last is t, the smoothed target of the other classes."""
    gamma = scalar(gamma, T)
    gamma_neg = scalar(gamma_neg, T)
    clip = scalar(clip, T)
    eps = scalar(eps, T)
    if ALPHA:
        return gamma, gamma_neg, scalar(alpha, T), scalar(alpha_neg, T), clip, eps, eps / C
    else:  # constants, so that their products vanish
        return gamma, gamma_neg, 1.0, 1.0, clip, eps, eps / C


@triton.jit
def logistic(z, SHORT: tl.constexpr, EXACT: tl.constexpr):
    """(s, c, root, tail): sigma(z), sigma(-z), sqrt(sigma(z)), log(1 + e^{-|z|}).

    EXACT: c keeps its relative accuracy for large z, where a large gamma multiplies it.
    """
    e = exp_neg(z)
    root = tl.rsqrt(1.0 + e)  # an overflow to infinity gives 0
    s = root * root
    c = 1.0 - s
    if EXACT:
        c = tl.where(z > 0, e * s, c)
    m = tl.minimum(s, c)
    return s, c, root, m * log1m_over(m, SHORT)  # exact for tiny m


@triton.jit
def focus(root, s, sp_other, gamma, G: tl.constexpr):
    """s^gamma, of which sqrt(s) and -log(s) are known."""
    if G == HALF:
        return root
    elif G == ONE:
        return s
    elif G == TWO:
        return s * s
    else:
        return exp(-gamma * sp_other)


@triton.jit
def sigmoid_element(z, gamma, G: tl.constexpr, SHORT: tl.constexpr):
    """(L, g = dL/dz) of an element with t = 0; t = 1: the same at -z, the gradient's sign turned.

    L = s^gamma sp(z),  g = s^gamma (gamma sigma(-z) sp(z) + s),  s = sigma(z) = 1 - p_t
    """
    s, c, root, tail = logistic(z, SHORT, G >= ANY)
    sp = tail + tl.maximum(z, 0.0)
    if G == ZERO:
        return sp, s
    else:
        sp_other = tail + tl.maximum(-z, 0.0)
        if G > ANY:  # gamma may be 0: 0 * inf is NaN
            sp_other = tl.minimum(sp_other, largest_finite(z.dtype))
        f = focus(root, s, sp_other, gamma, G)
        # Past sp = 50 c sp is below 1e-20; the cap keeps 0 * inf and roundings of c away.
        return f * sp, f * tl.fma(gamma * c, tl.minimum(sp, 50.0), s)


@triton.jit
def clipped_element(z, gamma, clip, SHORT: tl.constexpr):
    """(L, g) of an element with t = 0 whose probability is shifted, p = max(s - clip, 0).

    L = p^gamma (-log(1-p)),  g = p^gamma (gamma u + 1/(1-p)) s (1-s),  u = -log(1-p)/p
    """
    s, c, _, _ = logistic(z, SHORT, True)
    p = tl.maximum(s - clip, 0.0, tl.PropagateNan.ALL)
    rest = c + clip
    near = p <= 0.5
    u_near = log1m_over(tl.minimum(p, 0.5), SHORT)
    nll = tl.where(near, p * u_near, -log(rest))
    u = tl.where(near, u_near, nll / p)
    smallest: tl.constexpr = 2.2250738585072014e-308 if z.dtype == tl.float64 else 1.1754944e-38
    focus = exp(gamma * log(tl.maximum(p, smallest, tl.PropagateNan.ALL)))
    return focus * nll, tl.where(p == 0, 0.0, focus * (gamma * u + 1.0 / rest) * s * c)


@triton.jit
def negative(z, f, G: tl.constexpr, SHORT: tl.constexpr):
    """(L, g) of an element with t = 0."""
    if G == CLIPPED:
        return clipped_element(z, f[1], f[4], SHORT)
    else:
        return sigmoid_element(z, f[1] if G == GENERAL else f[0], G, SHORT)


@triton.jit
def mixed(z, t, v, f, G: tl.constexpr, SHORT: tl.constexpr):
    """(L, g) of an element with any target t: v alpha t L(z, 1) + (1 - alpha) (1 - t) L(z, 0).

    v: pos_weight, or None.
    """
    t_0 = 1.0 - t
    t_1 = t
    if v is not None:
        t_1 = v * t
    if G >= GENERAL:
        L_0, g_0 = negative(z, f, G, SHORT)
        L_1, g_1 = sigmoid_element(-z, f[0], G, SHORT)
        t_1 *= f[2]
        t_0 *= f[3]
        return weighted(t_1, L_1) + weighted(t_0, L_0), t_0 * g_0 - t_1 * g_1
    s, c, root, tail = logistic(z, SHORT, True)
    if G == ZERO and v is None:  # t_0 + t_1 = 1
        share = tl.where(z > 0, t_0, t)
        L = tail + tl.where(share == 0, 0.0, share * tl.abs(z))  # not 0 * inf
        return L, t_0 * s - t * c
    sp_0 = tail + tl.maximum(z, 0.0)
    sp_1 = tail + tl.maximum(-z, 0.0)
    if G == ZERO:
        return weighted(t_1, sp_1) + weighted(t_0, sp_0), t_0 * s - t_1 * c
    f_0 = focus(root, s, sp_1, f[0], G)
    f_1 = focus(tl.sqrt(c), c, sp_0, f[0], G)
    # As in sigmoid_element, with one exponential for both.
    g_0 = f_0 * tl.fma(f[0] * c, tl.minimum(sp_0, 50.0), s)
    g_1 = f_1 * tl.fma(f[0] * s, tl.minimum(sp_1, 50.0), c)
    return weighted(t_1, f_1 * sp_1) + weighted(t_0, f_0 * sp_0), t_0 * g_0 - t_1 * g_1


@triton.jit
def other_element(z, f, G: tl.constexpr, SHORT: tl.constexpr, SMOOTH: tl.constexpr):
    """(L, g) of an element of another class; without SMOOTH alpha_neg is left to the row."""
    t = f[6]
    if not SMOOTH:
        return negative(z, f, G, SHORT)
    elif G == ZERO:
        s, _, _, tail = logistic(z, SHORT, False)
        return tail + tl.maximum((1.0 - t) * z, -t * z), s - t
    else:
        return mixed(z, t, None, f, G, SHORT)


@triton.jit
def at_target(z_y, f, G: tl.constexpr, SHORT: tl.constexpr, SMOOTH: tl.constexpr):
    """(L, g) of the target's element, which is that of 1 - t at -z."""
    if not SMOOTH:
        L, g = sigmoid_element(-z_y, f[0], G, SHORT)
        return weighted(scalar(f[2], z_y.dtype), L), -f[2] * g
    elif G == ZERO:
        t = f[5] - f[6]
        s, _, _, tail = logistic(-z_y, SHORT, False)
        return tail + tl.maximum((t - 1.0) * z_y, t * z_y), t - s
    else:
        return mixed(z_y, 1.0 - (f[5] - f[6]), None, f, G, SHORT)


@triton.jit
def target_element(
    z_y, y, labelled, pos_weight, f,
    G: tl.constexpr, SHORT: tl.constexpr, SMOOTH: tl.constexpr, BACKGROUND: tl.constexpr,
):  # fmt: skip
    """at_target times pos_weight, which has no smoothing here; L = 0 in a background row."""
    L, g = at_target(z_y, f, G, SHORT, SMOOTH)
    if pos_weight is not None:
        v = tl.load(pos_weight + y, labelled, 1.0)
        L = weighted(v, L)
        g *= v
    if BACKGROUND:
        L = tl.where(labelled, L, 0.0)
    return L, g


@triton.jit
def both(a, b):
    """(1 + a)(1 + b) - 1."""
    return a + tl.fma(a, b, b)


@triton.jit
def product(Q, V: tl.constexpr, VEC: tl.constexpr):
    """prod (1 + Q_j) - 1 over the last axis of (V, VEC)."""
    if VEC == 1:
        return tl.reshape(Q, (V,))
    else:
        a, b = tl.split(tl.reshape(Q, (V, VEC // 2, 2)))
        return product(both(a, b), V, VEC // 2)


@triton.jit
def fold(x, V: tl.constexpr, LANES: tl.constexpr, PRODUCT: tl.constexpr):
    """Sum, or product as above, of what a thread holds of (V,): LANES are left, one per thread."""
    if V <= LANES:
        return x
    else:
        a, b = tl.split(tl.trans(tl.reshape(x, (2, V // 2))))
        return fold(both(a, b) if PRODUCT else a + b, V // 2, LANES, PRODUCT)


@triton.jit
def softplus_sum(Q):
    """log(1 + Q), exact for tiny Q: sum log(1 + e_j) = log prod (1 + e_j) = log(1 + Q)."""
    S = 1.0 + Q
    m = Q * rcp(S)
    return tl.where(m <= 0.5, m * log1m_over(tl.minimum(m, 0.5), False), log(S))


@triton.jit
def vectors(
    z, mask, f, V: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr,
    G: tl.constexpr, SHORT: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """(lanes that add up to the sum of L, g) of (V, VEC) elements; masked ones are -inf: L = 0."""
    if G == ZERO:  # one logarithm per thread, of a product that is at most 2^64
        e = exp_neg(tl.abs(z))
        s = rcp(1.0 + e)
        g = tl.where(z >= 0, s, e * s)
        linear = tl.maximum(z, 0.0)
        if SMOOTH:
            t = f[6]
            g -= t
            linear = tl.where(mask, tl.maximum((1.0 - t) * z, -t * z), 0.0)
        lanes = softplus_sum(fold(product(e, V, VEC), V, LANES, True))
        return lanes + fold(tl.sum(linear, 1), V, LANES, False), g
    else:
        L, g = other_element(z, f, G, SHORT, SMOOTH)
        if SMOOTH:
            L = tl.where(mask, L, 0.0)
        return fold(tl.sum(L, 1), V, LANES, False), g


@kernel
def sigmoid_rows(
    logits, target, grad, scale, normalizer, logit_bias, margin, pos_weight, grad_loss, losses,
    saved, rows: i32, C: i32, K: i32, x_n: i64, x_k: i64, g_n: i64, g_k: i64,
    gamma: f64, gamma_neg: f64, alpha: f64, alpha_neg: f64, clip: f64, eps: f64,
    logit_scale: f64, denominator: f64, background: i64, span: i32,
    V: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr, T: tl.constexpr, G: tl.constexpr,
    SINGLE: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, SMOOTH: tl.constexpr,
    FOLD: tl.constexpr, VECTOR: tl.constexpr, ALPHA: tl.constexpr, ADJUST: tl.constexpr,
    BACKGROUND: tl.constexpr,
):  # fmt: skip
    """A row, or span vectors of it, a program: one read of the logits, one write of the gradient.

    SINGLE: the row is one tile, without a loop.
    """
    row = tl.program_id(0)
    split = tl.program_id(1)
    SHORT: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth == 16
    f = sigmoid_formula(gamma, gamma_neg, alpha, alpha_neg, clip, eps, C, ALPHA, T)
    A = (logit_bias, margin, logit_scale_of(logit_scale, T, ADJUST))
    denominator = scalar(denominator, T)
    y, r, keep, read = row_inputs(
        target, scale, normalizer, grad_loss, row, row < rows, C, denominator, FOLD, VECTOR,
        background, BACKGROUND,
    )  # fmt: skip
    labelled = read
    if BACKGROUND:
        labelled = read & (y < C)
    x = row_pointer(logits, row, K, x_n, x_k, INNER)
    g = x
    if grad is not None:
        g = row_pointer(grad, row, K, g_n, g_k, INNER)
    head, whole, at_y = peel(x, C, y, VEC)
    if SINGLE:
        z, mask = load_body(x, head, tl.where(read, whole, 0), at_y, 0, A, V, VEC, T, ADJUST)

    column, there, others = edges(head, whole, at_y, C, y, read, split == 0, VEC)
    z_edge = load_edges(x, column, others, A, T, ADJUST)
    z_y = target_logit(x + y, y, labelled, A, T, ADJUST)
    L_edge, g_edge = other_element(z_edge, f, G, SHORT, SMOOTH)
    if SMOOTH:
        L_edge = tl.where(others, L_edge, 0.0)
    L_y, g_y = target_element(
        z_y, y, labelled, pos_weight, f, G, SHORT, SMOOTH, BACKGROUND
    )  # fmt: skip
    slope = r * A[2]
    share = scalar(1.0, T) if SMOOTH else scalar(f[3], T)
    slope_others = slope * share
    L = weighted(share, tl.sum(L_edge)) + tl.where(split == 0, L_y, 0.0)
    if grad is not None:
        tl.debug_barrier()  # in place: every warp has read the edges
        g_edge = tl.where(column == y, slope * g_y, slope_others * g_edge)
        tl.store(g + column, g_edge.to(grad.dtype.element_ty), there)

    if SINGLE:
        lanes, g_body = vectors(z, mask, f, V, VEC, LANES, G, SHORT, SMOOTH)
        if grad is not None:
            at, mask = body(g, head, whole, at_y, 0, V, VEC, ALIGNED)
            tl.store(at, (slope_others * g_body).to(grad.dtype.element_ty), mask)
    else:
        end = tl.minimum(whole, (split + 1) * span)
        lanes = tl.zeros((min(V, LANES),), T)
        for first in range(split * span, end, V):
            read_end = tl.where(read, end, 0)
            z, mask = load_body(x, head, read_end, at_y, first, A, V, VEC, T, ADJUST)
            more, g_body = vectors(z, mask, f, V, VEC, LANES, G, SHORT, SMOOTH)
            lanes += more
            if grad is not None:
                at, mask = body(g, head, end, at_y, first, V, VEC, ALIGNED)
                tl.store(at, (slope_others * g_body).to(grad.dtype.element_ty), mask)

    if losses is not None:
        loss = weighted(r, L + weighted(share, tl.sum(lanes)))
        tl.store(losses + row.to(tl.int64) * tl.num_programs(1) + split, loss)
        if saved is not None:
            if split == 0:
                tl.store(saved + row, tl.where(keep, r, -1.0))
