"""LinearClassBalancedLoss as an nn.Module."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from .arrays import Vector
from .keywords import check_keywords
from .linear import check_chunk_size, check_linear_options, linear_loss_of
from .module_state import ModuleOptions
from .modules import ClassBalancedLoss
from .options import lists_options
from .stats import ClassStats


class LinearClassBalancedLoss(torch.nn.Module):
    """A linear layer and its `ClassBalancedLoss` in one, the logits never all in memory.

    Args:
        in_features: D >= 1, features of a row of the input.
        counts, beta: as in `ClassBalancedLoss`; out_features is C, the number of counts.
        bias, device, dtype: as in torch.nn.Linear.
        chunk_size: as in `linear_class_balanced_loss`.
        options: all others as in `ClassBalancedLoss`, but for inplace and recompute.

    Shape: input (..., D); target (...) or (..., C).
    Attributes: linear, the torch.nn.Linear, whose weight may be shared with another layer; loss_fn,
        the `ClassBalancedLoss`; chunk_size.
    `logits(input)` is for evaluation. Under FSDP wrap this module, not its linear layer, whose own
    forward is never called.

    >>> head = LinearClassBalancedLoss(16, [500, 50, 5], beta=0.99)
    >>> loss = head(torch.randn(4, 16), torch.tensor([0, 1, 2, 2]))
    >>> loss.backward()
    >>> head.logits(torch.randn(4, 16)).shape
    torch.Size([4, 3])
    """

    linear: torch.nn.Linear
    loss_fn: ClassBalancedLoss

    @lists_options
    def __init__(
        self,
        in_features: int,
        counts: Vector,
        beta: float | Vector = 0.999,
        *,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        chunk_size: int | None = None,
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__()
        check_keywords("LinearClassBalancedLoss", options, ModuleOptions.__annotations__)
        try:
            operator.index(in_features)
        except TypeError:
            raise TypeError(
                f"in_features must be an int, got {type(in_features).__name__}: the order is "
                "(in_features, counts, beta)"
            ) from None
        self.loss_fn = ClassBalancedLoss(counts, beta, **options)
        check_linear_options(self.loss_fn.spec)
        check_chunk_size(chunk_size)
        if device is not None:
            self.loss_fn.to(device)
        C = len(self.loss_fn.counts)
        self.linear = torch.nn.Linear(in_features, C, bias, device, dtype)
        self.chunk_size = chunk_size

    def logits(self, input: Tensor) -> Tensor:
        """(..., C) of an input (..., D)."""
        return self.linear(input)

    @overload
    def forward(
        self,
        input: Tensor,
        target: Tensor,
        sample_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        return_stats: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        input: Tensor,
        target: Tensor,
        sample_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        *,
        return_stats: Literal[True],
    ) -> tuple[Tensor, ClassStats]: ...
    @overload
    def forward(
        self,
        input: Tensor,
        target: Tensor,
        sample_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, ClassStats]: ...
    def forward(
        self,
        input: Tensor,
        target: Tensor,
        sample_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, ClassStats]:
        """The loss, or (loss, ClassStats)."""
        loss_fn, linear = self.loss_fn, self.linear
        vectors = loss_fn.logit_bias, loss_fn.margin, loss_fn.pos_weight
        given = target, loss_fn.weight, sample_weight, normalizer, *vectors
        group = loss_fn.group if loss_fn.averages_over_ranks(normalizer) else None
        head = linear.weight, linear.bias
        call = loss_fn.spec, return_stats, self.chunk_size, group
        return linear_loss_of(input, head, given, *call)

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return "" if self.chunk_size is None else f"chunk_size={self.chunk_size}"
