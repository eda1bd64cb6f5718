"""What every row kernel shares: where a row lies, its 16-byte accesses, its scale; the small steps.

A row in memory is head | whole 16-byte vectors | tail. The vectors are a (V, VEC) tile under one
predicate a vector; head, tail and the vector that holds the target are a tile of EDGES * VEC
columns, one predicate each. So nothing outside the row is touched and every class count, stride and
offset costs the same; and the target is left out of the large tile at no cost an element.
"""

import triton
import triton.language as tl

# Nothing is specialised on an argument's value, alignment or size: a compiled kernel is kept and
# serves every call of its types and constants.
POINTERS = (
    "logits target weight sample_weight normalizer logit_bias margin grad_loss loss grad saved "
    "scale losses parts"
)
NUMBERS = (
    "rows C K x_n x_c x_k t_n t_c t_k g_n g_c g_k "
    "gamma gamma_neg alpha alpha_neg clip eps zeta logit_scale "
    "denominator ignored splits span count numel"
)
kernel = triton.jit(do_not_specialize=[*POINTERS.split(), *NUMBERS.split()])
i32, i64, f64 = tl.int32, tl.int64, tl.float64  # of a kernel's numbers

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
PARTIALS = tl.constexpr(32)  # of the denominator: what one warp adds up without shared memory
EDGES = tl.constexpr(4)  # head, tail, the target's vector, and one spare: a power of two


# Numbers -----------------------------------------------------------------------------------------


@triton.jit
def largest_finite(T: tl.constexpr):
    largest: tl.constexpr = 1.7976931348623157e308 if tl.float64 == T else 3.4028234663852886e38
    return tl.full((), largest, T)


@triton.jit
def clamp_finite(M):
    """So that -inf - M is -inf and inf - M is inf, never NaN."""
    largest = largest_finite(M.dtype)
    return tl.maximum(tl.minimum(M, largest, tl.PropagateNan.ALL), -largest, tl.PropagateNan.ALL)


@triton.jit
def number(x, T: tl.constexpr):
    """A float64 argument in the type that is computed in."""
    return tl.full((), x, T)


@triton.jit
def exp(x):
    """e^x; one special function but for float64."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x * LOG2E)


@triton.jit
def exp_neg(x):
    """e^-x: the sign in the constant, where it costs nothing."""
    if x.dtype == tl.float64:
        return tl.exp(-x)
    else:
        return tl.exp2(x * -LOG2E)


@triton.jit
def log(x):
    if x.dtype == tl.float64:
        return tl.log(x)
    else:
        return tl.log2(x) * LN2


@triton.jit
def rcp(x):
    """1/x of x >= 1 (infinity too): a division costs some eight instructions, rsqrt^2 two."""
    if x.dtype == tl.float64:
        return 1.0 / x
    else:
        root = tl.rsqrt(x)
        return root * root


@triton.jit
def log1m_over(m, SHORT: tl.constexpr):
    """-log(1 - m)/m on [0, 1/2], minimax: relative error 2e-7 (SHORT, for half types: 7e-6)."""
    if m.dtype == tl.float64:
        u = 1.0 - m
        return tl.where(u == 1.0, 1.0, -tl.log(u) / (1.0 - u))  # the rounding of u cancels
    elif SHORT:
        p = tl.fma(m, 0.8463787436, -0.3110924959)
        p = tl.fma(p, m, 0.4033622444)
        p = tl.fma(p, m, 0.3136711717)
        p = tl.fma(p, m, 0.5008954406)
        return tl.fma(p, m, 0.9999935031)
    else:
        p = tl.fma(m, 1.184951782, -1.081576824)
        p = tl.fma(p, m, 0.7854571939)
        p = tl.fma(p, m, 0.03800872341)
        p = tl.fma(p, m, 0.2722522616)
        p = tl.fma(p, m, 0.3318624794)
        p = tl.fma(p, m, 0.5000365376)
        return tl.fma(p, m, 0.9999998808)


@triton.jit
def weighted(r, loss):
    """r * loss where an overflowed loss of a row without weight counts 0, not 0 * inf = NaN."""
    return r * tl.where(r == 0, tl.where(loss == INF, 0.0, loss), loss)


# A row's inputs ----------------------------------------------------------------------------------


@triton.jit
def row_pointer(base, row, K, stride_n, stride_k, INNER: tl.constexpr):
    """Row n * K + k of (N, C, K), INNER: K > 1; 64-bit offsets."""
    if INNER:
        n = row // K
        return base + n.to(tl.int64) * stride_n + (row - n * K).to(tl.int64) * stride_k
    else:
        return base + row.to(tl.int64) * stride_n


@triton.jit
def divisor(scale, normalizer, denominator, FOLD: tl.constexpr):
    """The denominator: the sum of the prologue's parts, the normalizer's value, or the number."""
    if FOLD:
        return tl.sum(tl.load(scale + tl.arange(0, PARTIALS)), 0)
    elif normalizer is not None:
        return tl.load(normalizer)
    else:
        return denominator


@triton.jit
def divided(r, denominator):
    return tl.where(denominator != 0, r / denominator, r)  # nothing to average: 0 stays 0


@triton.jit
def row_inputs(
    target, scale, normalizer, grad_loss, row, there, C, denominator,
    FOLD: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """(y, r, keep, read) of a row or a vector of rows.

    r is r_i / denominator, or what the forward saved times grad_loss; 0 where the row is ignored
    (not keep), NaN where the target is no class: read says that neither is so. What is not read
    counts as logits of -inf with a target at 0: loss 0, gradient 0, whatever memory holds.
    """
    y = tl.load(target + row, there, 0)
    valid = (y >= 0) & (y < C)
    if grad_loss is not None:
        r = tl.load(scale + row, there, 0.0)
        keep = (r >= 0) | (r != r)
        r *= tl.load(grad_loss + row * VECTOR, there, 0.0)
    else:
        if scale is None:
            r = (y * 0 + 1).to(denominator.dtype)  # in the shape of row
        else:
            r = tl.load(scale + PARTIALS + row, there, 0.0)
        keep = (r >= 0) | (r != r)
        r = divided(r, divisor(scale, normalizer, denominator, FOLD))
    r = tl.where(keep, tl.where(valid, r, float("nan")), 0.0)
    return tl.where(valid, y, 0).to(tl.int32), r, keep, keep & valid & there


@triton.jit
def scale_of(logit_scale, T: tl.constexpr, ADJUST: tl.constexpr):
    """The last of A = (bias, margin, scale): z = scale (x + bias - margin of the target)."""
    if ADJUST:
        return number(logit_scale, T)
    else:
        return 1.0


@triton.jit
def adjusted(z, column, there, A, ADJUST: tl.constexpr):
    """z of the logits of these columns; A as above."""
    if ADJUST:
        if A[0] is not None:
            z += tl.load(A[0] + column, there, 0.0)
        z *= A[2]
    return z


@triton.jit
def target_logit(at, y, read, A, T: tl.constexpr, ADJUST: tl.constexpr):
    """z of the target, whose logit is at the pointer; 0 where nothing is read."""
    z = tl.load(at, read, 0.0).to(T)
    if ADJUST:
        if A[1] is not None:
            z -= tl.load(A[1] + y, read, 0.0)
        z = adjusted(z, y, read, A, True)
    return z


# A row's layout ----------------------------------------------------------------------------------


@triton.jit
def peel(pointer, C, y, VEC: tl.constexpr):
    """(head, whole, at_y): columns before the first vector, vectors, the one that holds y."""
    size: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth // 8
    first = pointer.to(tl.int64, bitcast=False) // size
    head = tl.minimum((-first & (VEC - 1)).to(tl.int32), C)
    return head, (C - head) // VEC, tl.where(y >= head, (y - head) // VEC, -1)


@triton.jit
def edges(head, whole, at_y, C, y, read, here, VEC: tl.constexpr):
    """(columns, there, others): which a program has, and which of them it reads, all but y's."""
    t = tl.arange(0, EDGES * VEC)
    tail = head + whole * VEC + t - VEC
    of_y = head + at_y * VEC + t - 2 * VEC
    column = tl.where(t < VEC, t, tl.where(t < 2 * VEC, tail, of_y))
    in_body = (at_y >= 0) & (at_y < whole) & (t < 3 * VEC)
    there = tl.where(t < VEC, t < head, tl.where(t < 2 * VEC, tail < C, in_body))
    there &= column < tl.where(here, C, 0)
    return column, there, there & (column != y) & (column < tl.where(read, C, 0))


@triton.jit
def body(
    pointer, head, whole, at_y, first, V: tl.constexpr, VEC: tl.constexpr,
    ALIGNED: tl.constexpr = True,
):  # fmt: skip
    """(pointers, mask) of V vectors from the one numbered first, without the target's."""
    v = first + tl.arange(0, V)
    start = pointer + head
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    at = start + (v[:, None] * VEC + tl.arange(0, VEC)[None, :])
    mask = (v < whole) & (v != at_y)
    return at, tl.broadcast_to(mask[:, None], (V, VEC))


@triton.jit
def load_body(
    x, head, end, at_y, first, A,
    V: tl.constexpr, VEC: tl.constexpr, T: tl.constexpr, ADJUST: tl.constexpr,
):  # fmt: skip
    """(z, mask) of V vectors, -inf where there is none and at the target's."""
    at, mask = body(x, head, end, at_y, first, V, VEC)
    z = tl.load(at, mask, -INF).to(T)
    if ADJUST:
        v = first + tl.arange(0, V)
        column = head + (v[:, None] * VEC + tl.arange(0, VEC)[None, :])
        z = adjusted(z, column, mask, A, True)
    return z, mask


@triton.jit
def load_edges(x, column, others, A, T: tl.constexpr, ADJUST: tl.constexpr):
    z = tl.load(x + column, others, -INF).to(T)
    return adjusted(z, column, others, A, ADJUST)


# The small steps ---------------------------------------------------------------------------------


@triton.jit
def prologue_part(
    part, target, weight, sample_weight, scale, rows, C, ignored,
    IGNORE: tl.constexpr, TOTAL: tl.constexpr, BLOCK: tl.constexpr,
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
            r *= tl.load(weight + tl.minimum(tl.maximum(y, 0), C - 1), keep, 0.0)
        if sample_weight is not None:
            r *= tl.load(sample_weight + i, keep, 0.0)
        if TOTAL:
            lanes += r
        else:
            lanes += tl.where(keep, 1.0, 0.0).to(T)
        tl.store(scale + PARTIALS + i, tl.where(keep, r, -1.0), there)
    if part * share < rows:  # a program beyond the last share has none
        tl.store(scale + part, tl.sum(lanes, 0))


@kernel
def prologue(
    target, weight, sample_weight, scale, rows: i32, C: i32, ignored: i64,
    IGNORE: tl.constexpr, TOTAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One number a row, and the denominator in PARTIALS parts, one a program."""
    prologue_part(
        tl.program_id(0), target, weight, sample_weight, scale, rows, C, ignored,
        IGNORE, TOTAL, BLOCK,
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
