"""The softmax family: its formula, then its row kernels.

With M = max_j z_j, e_j = e^{z_j - M}, R = sum over j != y of e_j, every member's gradient is
k e_j - uniform, and g_y at the target: a kernel finds M and R, softmax_row gives the rest.
"""

import triton
import triton.language as tl

from .numerics import (
    INF,
    clamp_finite,
    exp,
    f64,
    i32,
    i64,
    kernel,
    largest_finite,
    log,
    log1m_over,
    scalar,
    weighted,
)
from .prologue import prologue_part
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

PART = tl.constexpr(5)  # numbers that a program leaves of its part of a row


@triton.jit
def softmax_formula(gamma, eps, zeta, T: tl.constexpr):
    return scalar(gamma, T), scalar(eps, T), scalar(zeta, T)


@triton.jit
def softmax_row(d, R, r, D, C, M, f, logit_scale, SMOOTH: tl.constexpr, Z: tl.constexpr):
    """(loss, k, g_y, uniform) from M, d = z_y - M, R and, for smoothing, D = sum_j (z_j - M)."""
    gamma, eps, zeta = f
    e_y = exp(d)
    S = R + e_y
    p = e_y / S
    q = R / S
    sure = q <= 0.5  # then -log p comes from q: exact as p -> 1
    u_sure = log1m_over(tl.minimum(q, 0.5), False)
    log_S = log(S)
    nll = tl.where(sure, q * u_sure, log_S - d)
    u = tl.minimum(nll / q, largest_finite(R.dtype))  # finite where p is 0: p u has a limit
    u = tl.where(sure, u_sure, u)
    smallest: tl.constexpr = 2.2250738585072014e-308 if R.dtype == tl.float64 else 1.1754944e-38
    focus = exp(gamma * log(tl.maximum(q, smallest)))  # q^gamma
    a = (1 - eps) * focus * (1 + gamma * p * u)
    loss = weighted(r, (1 - eps) * focus * nll)
    slope = r * logit_scale
    k = slope * a / S
    g_y = -slope * a * q
    uniform = r * 0.0
    if SMOOTH:
        uniform = slope * (eps / C)
        loss += weighted(r, eps / C * (C * tl.where(sure, nll + d, log_S) - D))
        k += slope * eps / S
        g_y += slope * eps * p - uniform
    if Z:
        lse = M + log_S
        steep = clamp_finite(slope * (2 * zeta) * clamp_finite(lse))  # finite: p may be 0
        loss += weighted(r, zeta * lse * lse)
        k += steep / S
        g_y += steep * p
    return loss, k, g_y, uniform


@triton.jit
def below(z, m):
    """z - M for m = clamp_finite(M): 0 where both are +inf, a limit. NaN stays NaN."""
    return tl.minimum(z - m, 0.0, tl.PropagateNan.ALL)


@triton.jit
def target_below(z_y, M):
    """d = z_y - M, -inf where M is another's infinity."""
    return tl.where((M == INF) & (z_y < INF), -INF, below(z_y, clamp_finite(M)))


@triton.jit
def one_limit(R, z_y, M):
    """R; NaN where more than one logit is +inf: that row has no limit."""
    count = R + tl.where(z_y == INF, 1.0, 0.0)
    return tl.where((M == INF) & (count > 1), float("nan"), R)


@triton.jit
def save(saved, rows, row, there, keep, r, M, R):
    """What a recomputing backward takes: scale, -1 where the row is ignored, M and R."""
    if saved is not None:
        tl.store(saved + row, tl.where(keep, r, -1.0), there)
        tl.store(saved + rows + row, M, there)
        tl.store(saved + rows.to(tl.int64) * 2 + row, R, there)


@triton.jit
def more_max_and_sum(M, R, D, n, z, there, AXIS: tl.constexpr, SMOOTH: tl.constexpr):
    """Take a tile z along AXIS into the running M, R, D and number n of terms in D."""
    top = tl.maximum(M, tl.max(z, AXIS))
    m = clamp_finite(top)
    step = below(clamp_finite(M), m)
    t = below(z, tl.expand_dims(m, AXIS))
    R = R * exp(step) + tl.sum(exp(t), AXIS)
    if SMOOTH:
        D += tl.where(n > 0, n * step, 0.0) + tl.sum(tl.where(there, t, 0.0), AXIS)
        n += tl.sum(tl.where(there, 1.0, 0.0), AXIS)
    return top, R, D, n


@triton.jit
def join_max_and_sum(M, R, D, n, SMOOTH: tl.constexpr):
    """(M, R, D) of a row from those of its parts."""
    top = tl.max(M)
    step = below(clamp_finite(M), clamp_finite(top))
    if SMOOTH:
        D = tl.sum(tl.where(n > 0, D + n * step, 0.0))
    else:
        D = 0.0
    return top, tl.sum(R * exp(step)), D


@triton.jit
def max_and_sum(
    x, y, read, C, first, end, A,
    V: tl.constexpr, VEC: tl.constexpr, SMOOTH: tl.constexpr, ADJUST: tl.constexpr,
):  # fmt: skip
    """(M, R, D, n, z_y) of the vectors [first, end) of a row, with the edges where first is 0.

    D has n terms; the target's logit is left out of R and D, and is in M where first is 0.
    """
    T: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    head, whole, at_y = peel(x, C, y, VEC)
    end = tl.where(read, tl.minimum(end, whole), 0)
    M = tl.zeros((V,), T) - largest_finite(T)
    R = tl.zeros((V,), T)
    D = tl.zeros((V,), T)
    n = tl.zeros((V,), T)
    for v in range(first, end, V):
        z, mask = load_body(x, head, end, at_y, v, A, V, VEC, T, ADJUST)
        M, R, D, n = more_max_and_sum(M, R, D, n, z, mask, 1, SMOOTH)
    terms = tl.sum(n)
    M, R, D = join_max_and_sum(M, R, D, n, SMOOTH)
    column, _, others = edges(head, whole, at_y, C, y, read, first == 0, VEC)
    z = load_edges(x, column, others, A, T, ADJUST)
    z_y = target_logit(x + y, y, read & (first == 0), A, T, ADJUST)
    top = tl.maximum(M, tl.max(z))
    top = tl.where(first == 0, tl.maximum(top, z_y), top)
    m = clamp_finite(top)
    step = below(clamp_finite(M), m)
    t = below(z, m)
    R = R * exp(step) + tl.sum(exp(t))
    if SMOOTH:
        D += tl.where(terms > 0, terms * step, 0.0) + tl.sum(tl.where(others, t, 0.0))
        terms += tl.sum(tl.where(others, 1.0, 0.0))
    return top, R, D, terms, z_y


@triton.jit
def write_gradient(
    x, g, y, read, C, first, end, m, k, g_y, uniform, A,
    V: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr, ADJUST: tl.constexpr,
):  # fmt: skip
    """The gradient of the vectors [first, end), last first: what was read last is still near."""
    head, whole, at_y = peel(x, C, y, VEC)
    end = tl.minimum(end, whole)
    column, there, others = edges(head, whole, at_y, C, y, read, first == 0, VEC)
    z_edge = load_edges(x, column, others, A, m.dtype, ADJUST)
    tl.debug_barrier()  # in place: every warp has read the edges
    g_edge = tl.where(column == y, g_y, exp(below(z_edge, m)) * k - uniform)
    tl.store(g + column, g_edge.to(g.dtype.element_ty), there)
    tiles = tl.cdiv(end - first, V)
    for tile in range(0, tiles):
        v = first + (tiles - 1 - tile) * V
        read_end = tl.where(read, end, 0)
        z, mask = load_body(x, head, read_end, at_y, v, A, V, VEC, m.dtype, ADJUST)
        at, mask = body(g, head, end, at_y, v, V, VEC, ALIGNED)
        tl.store(at, (exp(below(z, m)) * k - uniform).to(g.dtype.element_ty), mask)


# Kernels: whole rows -----------------------------------------------------------------------------


@kernel
def softmax_rows(
    logits, target, grad, scale, normalizer, logit_bias, margin, losses, saved,
    rows: i32, C: i32, K: i32, x_n: i64, x_k: i64, g_n: i64, g_k: i64,
    gamma: f64, eps: f64, zeta: f64, logit_scale: f64, denominator: f64,
    V: tl.constexpr, VEC: tl.constexpr, T: tl.constexpr,
    INNER: tl.constexpr, ALIGNED: tl.constexpr, SMOOTH: tl.constexpr, Z: tl.constexpr,
    FOLD: tl.constexpr, ADJUST: tl.constexpr,
):  # fmt: skip
    """One row per program, held in registers: one read of the logits, one write of the gradient."""
    row = tl.program_id(0)
    y, r, keep, read = row_inputs(
        target, scale, normalizer, None, row, row < rows, C, scalar(denominator, T), FOLD, False
    )
    x = row_pointer(logits, row, K, x_n, x_k, INNER)
    head, whole, at_y = peel(x, C, y, VEC)
    A = (logit_bias, margin, logit_scale_of(logit_scale, T, ADJUST))
    z, mask = load_body(x, head, tl.where(read, whole, 0), at_y, 0, A, V, VEC, T, ADJUST)
    column, there, others = edges(head, whole, at_y, C, y, read, row < rows, VEC)
    z_edge = load_edges(x, column, others, A, T, ADJUST)
    z_y = target_logit(x + y, y, read, A, T, ADJUST)
    M = tl.maximum(tl.maximum(tl.max(z), tl.max(z_edge)), z_y)
    m = clamp_finite(M)
    t = below(z, m)
    t_edge = below(z_edge, m)
    e = exp(t)
    e_edge = exp(t_edge)
    R = one_limit(tl.sum(e) + tl.sum(e_edge), z_y, M)
    d = target_below(z_y, M)
    D = d
    if SMOOTH:
        D += tl.sum(tl.where(mask, t, 0.0)) + tl.sum(tl.where(others, t_edge, 0.0))
    loss, k, g_y, uniform = softmax_row(
        d, R, r, D, C, M, softmax_formula(gamma, eps, zeta, T), A[2], SMOOTH, Z
    )  # fmt: skip
    if losses is not None:
        tl.store(losses + row, loss)
    save(saved, rows, row, row < rows, keep, r, M, R)
    if grad is not None:
        g = row_pointer(grad, row, K, g_n, g_k, INNER)
        at, mask = body(g, head, whole, at_y, 0, V, VEC, ALIGNED)
        tl.store(at, (e * k - uniform).to(grad.dtype.element_ty), mask)
        g_edge = tl.where(column == y, g_y, e_edge * k - uniform)
        tl.store(g + column, g_edge.to(grad.dtype.element_ty), there)


@kernel
def softmax_long(
    logits, target, grad, scale, normalizer, logit_bias, margin, losses, saved,
    rows: i32, C: i32, K: i32, x_n: i64, x_k: i64, g_n: i64, g_k: i64,
    gamma: f64, eps: f64, zeta: f64, logit_scale: f64, denominator: f64,
    V: tl.constexpr, VEC: tl.constexpr, T: tl.constexpr,
    INNER: tl.constexpr, ALIGNED: tl.constexpr, SMOOTH: tl.constexpr, Z: tl.constexpr,
    FOLD: tl.constexpr, ADJUST: tl.constexpr,
):  # fmt: skip
    """One row per program, too long for registers: a second read, of what is still in L2."""
    row = tl.program_id(0)
    y, r, keep, read = row_inputs(
        target, scale, normalizer, None, row, row < rows, C, scalar(denominator, T), FOLD, False
    )
    x = row_pointer(logits, row, K, x_n, x_k, INNER)
    A = (logit_bias, margin, logit_scale_of(logit_scale, T, ADJUST))
    M, R, D, _, z_y = max_and_sum(x, y, read, C, 0, C, A, V, VEC, SMOOTH, ADJUST)
    R = one_limit(R, z_y, M)
    m = clamp_finite(M)
    d = target_below(z_y, M)
    loss, k, g_y, uniform = softmax_row(
        d, R, r, D + d, C, M, softmax_formula(gamma, eps, zeta, T), A[2], SMOOTH, Z
    )  # fmt: skip
    if losses is not None:
        tl.store(losses + row, loss)
    save(saved, rows, row, row < rows, keep, r, M, R)
    if grad is not None:
        g = row_pointer(grad, row, K, g_n, g_k, INNER)
        write_gradient(
            x, g, y, read, C, 0, C, m, k, g_y, uniform, A, V, VEC, ALIGNED, ADJUST
        )  # fmt: skip


# Kernels: a row over several programs ------------------------------------------------------------


@kernel
def softmax_parts(
    logits, logit_bias, margin, target, weight, sample_weight, scale, parts,
    rows: i32, C: i32, K: i32, x_n: i64, x_k: i64, ignored: i64,
    logit_scale: f64, splits: i32, span: i32,
    V: tl.constexpr, VEC: tl.constexpr, INNER: tl.constexpr, SMOOTH: tl.constexpr,
    ADJUST: tl.constexpr,
    PROLOGUE: tl.constexpr, IGNORE: tl.constexpr, TOTAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """parts (rows, splits, PART) = M, R, D, terms in D, z_y of span vectors; and the prologue."""
    program = tl.program_id(0)
    if PROLOGUE:
        prologue_part(
            program, target, weight, sample_weight, scale, rows, C, ignored,
            IGNORE, TOTAL, BLOCK,
        )  # fmt: skip
    row = program // splits
    if row < rows:
        first = (program - row * splits) * span
        y = tl.load(target + row)
        read = (y >= 0) & (y < C)
        y = tl.where(read, y, 0).to(tl.int32)
        x = row_pointer(logits, row, K, x_n, x_k, INNER)
        A = (logit_bias, margin, logit_scale_of(logit_scale, parts.dtype.element_ty, ADJUST))
        M, R, D, n, z_y = max_and_sum(
            x, y, read, C, first, first + span, A, V, VEC, SMOOTH, ADJUST
        )  # fmt: skip
        out = parts + program.to(tl.int64) * PART
        tl.store(out, M)
        tl.store(out + 1, R)
        tl.store(out + 2, D)
        tl.store(out + 3, n)
        tl.store(out + 4, z_y)


@kernel
def softmax_join(
    logits, target, grad, scale, normalizer, logit_bias, margin, losses, saved, parts,
    rows: i32, C: i32, K: i32, x_n: i64, x_k: i64, g_n: i64, g_k: i64,
    gamma: f64, eps: f64, zeta: f64, logit_scale: f64, denominator: f64, splits: i32, span: i32,
    V: tl.constexpr, VEC: tl.constexpr, T: tl.constexpr,
    INNER: tl.constexpr, ALIGNED: tl.constexpr, SMOOTH: tl.constexpr, Z: tl.constexpr,
    FOLD: tl.constexpr, ADJUST: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The loss from the parts, and the gradient of span vectors; SPLITS >= splits."""
    row = tl.program_id(0)
    first = tl.program_id(1) * span
    y, r, keep, read = row_inputs(
        target, scale, normalizer, None, row, row < rows, C, scalar(denominator, T), FOLD, False
    )
    A = (logit_bias, margin, logit_scale_of(logit_scale, T, ADJUST))
    part = tl.arange(0, SPLITS)
    there = part < tl.where(read, splits, 0)
    at = parts + row.to(tl.int64) * splits * PART + part * PART
    M = tl.load(at, there, -INF)
    R = tl.load(at + 1, there, 0.0)
    D = tl.load(at + 2, there, 0.0)
    n = tl.load(at + 3, there, 0.0)
    z_y = tl.load(parts + row.to(tl.int64) * splits * PART + 4, read, 0.0)
    M, R, D = join_max_and_sum(M, R, D, n, SMOOTH)
    M = tl.maximum(M, tl.where(read, M, z_y))
    R = one_limit(R, z_y, M)
    m = clamp_finite(M)
    d = target_below(z_y, M)
    loss, k, g_y, uniform = softmax_row(
        d, R, r, D + d, C, M, softmax_formula(gamma, eps, zeta, T), A[2], SMOOTH, Z
    )  # fmt: skip
    if first == 0:
        if losses is not None:
            tl.store(losses + row, loss)
        save(saved, rows, row, row < rows, keep, r, M, R)
    if grad is not None:
        x = row_pointer(logits, row, K, x_n, x_k, INNER)
        g = row_pointer(grad, row, K, g_n, g_k, INNER)
        write_gradient(
            x, g, y, read, C, first, first + span, m, k, g_y, uniform, A, V, VEC, ALIGNED, ADJUST
        )  # fmt: skip


@kernel
def softmax_gradient(
    logits, target, grad, logit_bias, margin, saved, grad_loss,
    rows: i32, C: i32, K: i32, x_n: i64, x_k: i64, g_n: i64, g_k: i64,
    gamma: f64, eps: f64, zeta: f64, logit_scale: f64, span: i32,
    V: tl.constexpr, VEC: tl.constexpr, T: tl.constexpr,
    INNER: tl.constexpr, ALIGNED: tl.constexpr, SMOOTH: tl.constexpr, Z: tl.constexpr,
    VECTOR: tl.constexpr, ADJUST: tl.constexpr,
):  # fmt: skip
    """The gradient of span vectors of a row from what the forward saved: scale, M, R."""
    row = tl.program_id(0)
    first = tl.program_id(1) * span
    y, r, _, read = row_inputs(
        target, saved, None, grad_loss, row, row < rows, C, 1.0, False, VECTOR
    )
    x = row_pointer(logits, row, K, x_n, x_k, INNER)
    g = row_pointer(grad, row, K, g_n, g_k, INNER)
    M = tl.load(saved + rows + row)
    m = clamp_finite(M)
    R = tl.load(saved + rows.to(tl.int64) * 2 + row)
    A = (logit_bias, margin, logit_scale_of(logit_scale, T, ADJUST))
    d = target_below(target_logit(x + y, y, read, A, T, ADJUST), M)
    _, k, g_y, uniform = softmax_row(
        d, R, r, d, C, M, softmax_formula(gamma, eps, zeta, T), A[2], SMOOTH, Z
    )  # fmt: skip
    write_gradient(
        x, g, y, read, C, first, first + span, m, k, g_y, uniform, A, V, VEC, ALIGNED, ADJUST
    )  # fmt: skip
