"""What a call allocates: loss, gradient, and what a recomputing backward needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .inputs import compute_dtype, is_soft


def new_loss(logits: Tensor, target: Tensor, reduction: int) -> Tensor:
    """The buffer for the loss: one loss per row for reduction "none"."""
    shape: tuple[int, ...] = ()
    if not reduction:
        shape = logits.shape[:1] + logits.shape[2:] if is_soft(target) else target.shape
    return logits.new_empty(shape, dtype=compute_dtype(logits.dtype))


def co_aligned(logits: Tensor) -> Tensor:
    """The buffer for a GPU kernel's gradient: its rows lie modulo 16 bytes as those of logits do.

    So both are read and written in whole vectors, also where the logits lie at odd addresses.
    """
    if type(logits) is not Tensor or is_compiling():
        return torch.empty_like(logits)
    vector = 16 // logits.element_size()
    odd = logits.data_ptr() // logits.element_size() % vector
    if (odd == 0 and logits.is_contiguous()) or logits.stride(1) != 1 or logits.numel() == 0:
        return torch.empty_like(logits)
    N, C, *inner = logits.shape
    strides, size = list(logits.stride()), C  # classes side by side: dimensions around them
    for dim, n in ((2, inner[0]), (0, N)) if inner else ((0, N),):
        strides[dim] = size + (logits.stride(dim) - size) % vector
        size = strides[dim] * n
    buffer = logits.new_empty(odd + span_of(logits.shape, strides))
    return buffer.as_strided(logits.shape, strides, odd)


def new_saved(logits: Tensor, sigmoid: bool) -> Tensor:
    """The buffer that a forward leaves for a recomputing backward."""
    shape = (1 if sigmoid else 3, logits.shape[0] * logits.shape[2:].numel())
    return logits.new_empty(shape, dtype=compute_dtype(logits.dtype))


def fills_its_storage(grad: Tensor) -> bool:
    """Whether all memory from its first to its last element is a tensor's own, as co_aligned's."""
    end = grad.storage_offset() + span_of(grad.shape, grad.stride())
    return grad.untyped_storage().nbytes() == end * grad.element_size()


def span_of(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last of a tensor that is not empty."""
    return sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
