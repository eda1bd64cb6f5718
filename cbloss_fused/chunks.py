"""A linear head and its loss, some rows at a time: the logits of all rows are never held.

The logits of a chunk of rows lie in one buffer, over which the loss writes their gradient; two
products then give the gradients of the head's input and of its weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import Backend
from .buffers import new_saved
from .inputs import Inputs, compute_dtype, is_soft, sum_dtype
from .options import MEAN, REDUCTIONS, LossSpec
from .row_weights import denominator_of
from .stats import class_stats
from .values import check_all, check_soft_target, check_target, check_values, is_weight, typed

# How large a chunk is, by type of device, others being GPUs: bytes of its buffer, but at least so
# many rows. Each chunk reads and writes the weight's gradient, which takes about as long as the
# product of that many rows.
BYTES = {"cpu": 128 << 20, "other": 512 << 20}
LEAST_ROWS = {"cpu": 128, "other": 1024}
ROUND = 64  # rows


class Head(NamedTuple):
    """What makes logits (n, C) of rows (n, D), all in one dtype."""

    weight: Tensor  # (C, D)
    bias: Tensor | None  # (C,)


class HeadGradients(NamedTuple):
    """Of a head and its input; None: not needed."""

    input: Tensor | None  # (N, D)
    weight: Tensor | None  # (C, D), as bias summed in float32 for half types
    bias: Tensor | None

    def add(self, grad: Tensor, x: Tensor, weight: Tensor, rows: slice) -> None:
        """The products of a chunk's gradient (n, C) of the logits."""
        first = rows.start == 0
        if self.input is not None:
            torch.mm(grad, weight, out=self.input[rows])
        if self.weight is not None:
            _add_product(self.weight, grad.t(), x, first)
        if self.bias is not None:
            total = grad.sum(0, dtype=self.bias.dtype)
            self.bias.copy_(total) if first else self.bias.add_(total)

    def zero(self) -> None:
        for grad in self:
            if grad is not None:
                grad.zero_()


class Result(NamedTuple):
    """What a pass over the chunks writes; None: not needed."""

    loss: Tensor  # 0-d, or one loss per row
    grads: HeadGradients
    saved: Tensor | None = None  # for `backward`: 1 or 3 numbers per row, chunk by chunk
    stats: Tensor | None = None  # (4, C), see stats.py


def chunk_rows(N: int, C: int, dtype: torch.dtype, device_type: str) -> int:
    """How many rows a chunk has unless the caller says: all chunks have nearly as many."""
    kind = device_type if device_type in BYTES else "other"
    most = max(BYTES[kind] // (C * dtype.itemsize), LEAST_ROWS[kind]) // ROUND * ROUND
    larger: Any = max if isinstance(N, int) else torch.sym_max  # a symbol of torch.export
    chunks = larger(1, -(-N // most))
    found: int = larger(1, -(-N // (chunks * ROUND))) * ROUND
    return found


def forward(
    x: Tensor, head: Head, inputs: Inputs, spec: LossSpec, backend: Backend, rows: int,
    result: Result,
) -> None:  # fmt: skip
    """Fill result. x: (N, D); inputs, spec: those of logits (N, C); rows: of a chunk."""
    _check_rows(x, head, inputs, spec)
    inputs, spec = _with_denominator(x, head, inputs, spec, rows)
    loss, grads, saved, stats = result
    needed = any(grad is not None for grad in grads)
    losses = loss.new_empty(math.ceil(len(x) / rows))  # of the chunks, if they are added up
    if stats is not None:
        stats.zero_()
    for part, logits in by_chunk(x, head, rows):
        of_part, kept = _part(inputs, part), _saved_part(saved, spec, part)
        own = loss[part] if loss.dim() else losses[part.start // rows]
        if stats is None:
            grad = logits if needed else None
            _loss(logits, of_part, spec, backend, own, grad, kept, part.start)
        else:
            kept = new_saved(logits, spec.formula.sigmoid) if kept is None else kept
            _loss_and_stats(logits, of_part, spec, backend, own, kept, stats)
            if needed:
                _gradient(logits, of_part, spec, backend, kept, torch.ones_like(own))
        if needed:
            grads.add(logits, x[part], head.weight, part)
    if not loss.dim():
        loss.copy_(losses.sum(dtype=sum_dtype(loss.device)))
    if stats is not None:
        stats[3] /= stats[0]  # sums of p over rows
    if not len(x):
        grads.zero()


def backward(
    x: Tensor, head: Head, inputs: Inputs, spec: LossSpec, backend: Backend, rows: int,
    saved: Tensor, grad_loss: Tensor, grads: HeadGradients,
) -> None:  # fmt: skip
    """Fill grads from what `forward` saved, for an incoming gradient: 0-d, or one per row."""
    for part, logits in by_chunk(x, head, rows):
        incoming = grad_loss[part] if grad_loss.dim() else grad_loss
        kept = _saved_part(saved, spec, part)
        assert kept is not None
        _gradient(logits, _part(inputs, part), spec, backend, kept, incoming)
        grads.add(logits, x[part], head.weight, part)
    if not len(x):
        grads.zero()


def by_chunk(x: Tensor, head: Head, rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Each chunk's rows and their logits, in a buffer that the next chunk overwrites."""
    N, C = len(x), len(head.weight)
    line = 64 // x.element_size()  # a GPU's products need rows that begin at whole vectors
    buffer = x.new_empty(min(rows, N), math.ceil(C / line) * line)[:, :C]
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        logits = buffer[: part.stop - start]
        if head.bias is None:
            torch.mm(x[part], head.weight.t(), out=logits)
        else:
            torch.addmm(head.bias, x[part], head.weight.t(), out=logits)
        yield part, logits


def _part(inputs: Inputs, rows: slice) -> Inputs:
    sample_weight = inputs.sample_weight
    if sample_weight is not None:
        sample_weight = sample_weight[rows]
    return inputs._replace(target=inputs.target[rows], sample_weight=sample_weight)


def _saved_part(saved: Tensor | None, spec: LossSpec, rows: slice) -> Tensor | None:
    """A chunk's own, (1 or 3, n)."""
    if saved is None:
        return None
    k = saved_numbers(spec)
    return saved[k * rows.start : k * rows.stop].view(k, rows.stop - rows.start)


def saved_numbers(spec: LossSpec) -> int:
    """Of a row."""
    return 1 if spec.formula.sigmoid else 3


def _check_rows(x: Tensor, head: Head, inputs: Inputs, spec: LossSpec) -> None:
    """Raise on the CPU for a row that is wrong; a kernel knows its own chunk's rows alone."""
    if x.is_cpu:
        check_all("sample_weight", inputs.sample_weight, is_weight, "finite and >= 0")
        if not is_soft(inputs.target):
            check_target(inputs.target, len(head.weight), spec.ignore_index, spec.background_index)
        if not len(x):  # then no kernel looks at the vectors
            check_values(x, inputs, spec.formula, spec.ignore_index)


def _with_denominator(
    x: Tensor, head: Head, inputs: Inputs, spec: LossSpec, rows: int
) -> tuple[Inputs, LossSpec]:
    """A mean's denominator, over all rows, as a normalizer."""
    if REDUCTIONS[spec.reduction] in ("none", "sum") or inputs.normalizer is not None:
        return inputs, spec
    C, dtype = len(head.weight), compute_dtype(x.dtype)
    total = torch.zeros((), dtype=sum_dtype(x.device), device=x.device)
    step = rows if is_soft(inputs.target) else max(len(x), 1)  # of soft targets it makes copies
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        total += denominator_of(_part(inputs, part), C, spec, dtype)
    return inputs._replace(normalizer=total.to(dtype)), spec._replace(reduction=MEAN)


def _loss(
    logits: Tensor, inputs: Inputs, spec: LossSpec, backend: Backend, loss: Tensor,
    grad: Tensor | None, saved: Tensor | None, start: int,
) -> None:  # fmt: skip
    """A chunk's loss; start: its first row, from which an error counts."""
    try:
        backend.loss(logits, *inputs, *spec[1:5], loss, grad, saved)
    except Exception as error:
        if start and logits.is_cpu and is_soft(inputs.target):
            given = inputs.target, logits.dtype, spec.formula, spec.ignore_index
            check_soft_target(*given, start)
        raise typed(error) from None


def _gradient(
    logits: Tensor, inputs: Inputs, spec: LossSpec, backend: Backend, saved: Tensor,
    incoming: Tensor,
) -> None:  # fmt: skip
    """The gradient of a chunk's logits over them."""
    marks = spec.ignore_index, spec.background_index
    vectors = inputs.of_gradient()
    backend.gradient(logits, *vectors, saved, incoming, spec.numbers, *marks, logits)


def _loss_and_stats(
    logits: Tensor, inputs: Inputs, spec: LossSpec, backend: Backend, loss: Tensor, saved: Tensor,
    stats: Tensor,
) -> None:  # fmt: skip
    """A chunk's loss; adds its statistics, of p the sum."""
    losses = loss.new_empty(len(logits))
    backend.loss(logits, *inputs, *spec[1:5], losses, None, saved)
    loss.copy_(losses.sum(dtype=sum_dtype(loss.device)))
    found = class_stats(logits, inputs, spec, losses, saved)
    rows, probability = found[0], found[3]
    found[3] = torch.where(rows > 0, rows * probability, 0.0)
    stats += found


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, or = for the first; total may be wider than a and b."""
    if total.dtype == a.dtype:
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)
    elif a.is_cuda:
        product = torch.mm if first else partial(torch.addmm, total)
        product(a, b, out_dtype=total.dtype, out=total)
    else:
        _add_product(total, a.to(total.dtype), b.to(total.dtype), first)
