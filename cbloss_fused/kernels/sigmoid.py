"""The sigmoid family: the formula of an element, then its row kernels.

Every element stands alone, so one pass serves rows of any length.
"""

import triton
import triton.language as tl

from .rows import (
    INF,
    body,
    edges,
    exp,
    exp_neg,
    f64,
    i32,
    i64,
    kernel,
    log,
    log1m_over,
    number,
    peel,
    rcp,
    row_inputs,
    row_pointer,
    weighted,
)

# The focal exponents with code of their own
ZERO = tl.constexpr(0)
HALF = tl.constexpr(1)
ONE = tl.constexpr(2)
TWO = tl.constexpr(3)
ANY = tl.constexpr(4)


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
def sigmoid_element(z, gamma, G: tl.constexpr, SHORT: tl.constexpr):
    """(L, g = dL/dz) of an element with t = 0; t = 1: the same at -z, the gradient's sign turned.

    L = s^gamma sp(z),  g = s^gamma (gamma sigma(-z) sp(z) + s),  s = sigma(z) = 1 - p_t
    """
    s, c, root, tail = logistic(z, SHORT, G == ANY)
    sp = tail + tl.maximum(z, 0.0)
    if G == ZERO:
        return sp, s
    else:
        if G == HALF:
            f = root
        elif G == ONE:
            f = s
        elif G == TWO:
            f = s * s
        else:
            f = exp(-gamma * (tail + tl.maximum(-z, 0.0)))
        # Past sp = 50 c sp is below 1e-20; the cap keeps 0 * inf and roundings of c away.
        return f * sp, f * tl.fma(gamma * c, tl.minimum(sp, 50.0), s)


@triton.jit
def smoothed(z, gamma, t, G: tl.constexpr, SHORT: tl.constexpr, SMOOTH: tl.constexpr):
    """(L, g) of an element with target t; without SMOOTH t is 0."""
    if not SMOOTH:
        return sigmoid_element(z, gamma, G, SHORT)
    elif G == ZERO:
        s, _, _, tail = logistic(z, SHORT, False)
        return tail + tl.maximum((1.0 - t) * z, -t * z), s - t
    else:
        L_0, g_0 = sigmoid_element(z, gamma, G, SHORT)
        L_1, g_1 = sigmoid_element(-z, gamma, G, SHORT)
        return t * L_1 + (1.0 - t) * L_0, (1.0 - t) * g_0 - t * g_1


@triton.jit
def at_target(z_y, gamma, eps, t, G: tl.constexpr, SHORT: tl.constexpr, SMOOTH: tl.constexpr):
    """(L, g) of the target's element, which is that of 1 - t at -z; t is the others' target."""
    L, g = smoothed(-z_y, gamma, eps - t, G, SHORT, SMOOTH)
    return L, -g


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
    """Sum, or product as above, of what one thread holds of (V,): LANES are left, one a thread."""
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
    z, mask, gamma, t, V: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr,
    G: tl.constexpr, SHORT: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """(lanes that add up to the sum of L, g) of (V, VEC) elements; masked ones are -inf: L = 0."""
    if G == ZERO:  # one logarithm a thread, of a product that is at most 2^64
        e = exp_neg(tl.abs(z))
        s = rcp(1.0 + e)
        g = tl.where(z >= 0, s, e * s)
        linear = tl.maximum(z, 0.0)
        if SMOOTH:
            g -= t
            linear = tl.where(mask, tl.maximum((1.0 - t) * z, -t * z), 0.0)
        lanes = softplus_sum(fold(product(e, V, VEC), V, LANES, True))
        return lanes + fold(tl.sum(linear, 1), V, LANES, False), g
    else:
        L, g = smoothed(z, gamma, t, G, SHORT, SMOOTH)
        if SMOOTH:
            L = tl.where(mask, L, 0.0)
        return fold(tl.sum(L, 1), V, LANES, False), g


@kernel
def sigmoid_rows(
    logits, target, grad, scale, normalizer, grad_loss, losses, saved,
    rows: i32, C: i32, K: i32, x_n: i64, x_k: i64, g_n: i64, g_k: i64,
    gamma: f64, eps: f64, denominator: f64, span: i32,
    V: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr, T: tl.constexpr, G: tl.constexpr,
    SINGLE: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr, SMOOTH: tl.constexpr,
    FOLD: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """A row, or span vectors of it, a program: one read of the logits, one write of the gradient.

    SINGLE: the row is one tile, without a loop.
    """
    row = tl.program_id(0)
    split = tl.program_id(1)
    SHORT: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth == 16
    gamma = number(gamma, T)
    eps = number(eps, T)
    t = eps / C
    denominator = number(denominator, T)
    y, r, keep, read = row_inputs(
        target, scale, normalizer, grad_loss, row, row < rows, C, denominator, FOLD, VECTOR
    )
    x = row_pointer(logits, row, K, x_n, x_k, INNER)
    g = x
    if grad is not None:
        g = row_pointer(grad, row, K, g_n, g_k, INNER)
    head, whole, at_y = peel(x, C, y, VEC)
    if SINGLE:
        at, mask = body(x, head, tl.where(read, whole, 0), at_y, 0, V, VEC)
        z = tl.load(at, mask, -INF).to(T)

    column, there, others = edges(head, whole, at_y, C, y, read, split == 0, VEC)
    z_edge = tl.load(x + column, others, -INF).to(T)
    z_y = tl.load(x + y, read, 0.0).to(T)
    L_edge, g_edge = smoothed(z_edge, gamma, t, G, SHORT, SMOOTH)
    if SMOOTH:
        L_edge = tl.where(others, L_edge, 0.0)
    L_y, g_y = at_target(z_y, gamma, eps, t, G, SHORT, SMOOTH)
    L = tl.sum(L_edge) + tl.where(split == 0, L_y, 0.0)
    if grad is not None:
        tl.debug_barrier()  # in place: every warp has read the edges
        g_edge = r * tl.where(column == y, g_y, g_edge)
        tl.store(g + column, g_edge.to(grad.dtype.element_ty), there)

    if SINGLE:
        lanes, g_body = vectors(z, mask, gamma, t, V, VEC, LANES, G, SHORT, SMOOTH)
        if grad is not None:
            at, mask = body(g, head, whole, at_y, 0, V, VEC, ALIGNED)
            tl.store(at, (r * g_body).to(grad.dtype.element_ty), mask)
    else:
        end = tl.minimum(whole, (split + 1) * span)
        lanes = tl.zeros((min(V, LANES),), T)
        for first in range(split * span, end, V):
            at, mask = body(x, head, tl.where(read, end, 0), at_y, first, V, VEC)
            z = tl.load(at, mask, -INF).to(T)
            more, g_body = vectors(z, mask, gamma, t, V, VEC, LANES, G, SHORT, SMOOTH)
            lanes += more
            if grad is not None:
                at, mask = body(g, head, end, at_y, first, V, VEC, ALIGNED)
                tl.store(at, (r * g_body).to(grad.dtype.element_ty), mask)

    if losses is not None:
        loss = weighted(r, L + tl.sum(lanes))
        tl.store(losses + row.to(tl.int64) * tl.num_programs(1) + split, loss)
        if saved is not None:
            if split == 0:
                tl.store(saved + row, tl.where(keep, r, -1.0))
