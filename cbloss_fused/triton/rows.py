"""What every row kernel shares: a row's inputs, and its accesses of 16 bytes.

A row in memory is head | whole 16-byte vectors | tail. The vectors are a (V, VEC) tile under one
predicate per vector; head, tail and the vector that holds the target are a tile of EDGES * VEC
columns, one predicate per column. So nothing outside the row is touched and every class count,
stride and offset costs the same; and the target is left out of the large tile at no cost per
element.
"""

import triton
import triton.language as tl

from .numerics import INF, scalar
from .prologue import PARTIALS

EDGES = tl.constexpr(4)  # head, tail, the target's vector, and one spare: a power of two


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
    return tl.where(denominator != 0, r / denominator, 0.0)  # 0: nothing to average


@triton.jit
def row_inputs(
    target, scale, normalizer, grad_loss, row, there, C, denominator,
    FOLD: tl.constexpr, VECTOR: tl.constexpr, background=0, BACKGROUND: tl.constexpr = False,
):  # fmt: skip
    """(y, r, keep, read) of a row or a vector of rows; y = C in a background row.

    r is r_i / denominator, or what the forward saved times grad_loss; 0 where the row is ignored
    (not keep), NaN where the target is out of range: read says that neither is so. What is not read
    counts as logits of -inf with a target at 0: loss 0, gradient 0, whatever memory holds.
    """
    y = tl.load(target + row, there, 0)
    valid = (y >= 0) & (y < C)
    if BACKGROUND:
        valid |= y == background
        y = tl.where(y == background, C, y)
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
def logit_scale_of(logit_scale, T: tl.constexpr, ADJUST: tl.constexpr):
    """The last of A = (bias, margin, scale): z = scale (x + bias - margin of the target)."""
    if ADJUST:
        return scalar(logit_scale, T)
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
