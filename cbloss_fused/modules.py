"""The nn.Modules and the schedule of their weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import Self, Unpack

from .arguments import check_class_vector, check_inputs
from .arrays import Array, Vector, reals
from .counts import class_counts
from .dispatch import dispatch
from .options import LossOptions, check_options, lists_options, options_of
from .stats import ClassStats
from .weights import Empty, beta_from_prototypes, class_balanced_weights


class ModuleOptions(LossOptions, total=False):
    """All keywords of `ClassBalancedLoss`, for type checkers."""

    empty: Empty
    logit_bias: Tensor | None
    margin: Tensor | None


class ClassBalancedLoss(torch.nn.Module):
    """`class_balanced_loss` with the weights of given class counts.

    Args:
        counts: (C,) samples of each class in the training set; a tensor, an array or a sequence.
        beta: in [0, 1]; 0 weighs all classes alike, 1 by inverse frequency.
        empty: what a class without samples gets, see `class_balanced_weights`.
        options: all others as in `class_balanced_loss`; logit_bias and margin become buffers.

    Shape: input (C,), (N, C) or (N, C, d1, ..., dk); target (), (N,) or (N, d1, ..., dk).
    Attributes: weight, a (C,) float32 buffer: moves with .to(), saved in state_dict; counts and
        beta, float64 on the CPU, which are saved with it. `set_beta` and `update_counts` change the
        weights in place: a compiled model uses the new weights without recompiling.
    Raises: ValueError or TypeError for bad counts, beta or options, here and not in forward.
    Source: Cui et al., CVPR 2019 (arXiv 1901.05555).

    >>> loss_fn = ClassBalancedLoss([500, 50, 5], beta=0.99, activation="sigmoid", gamma=0.5)
    >>> loss = loss_fn(torch.zeros(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 2]))
    >>> loss.backward()
    """

    weight: Tensor
    logit_bias: Tensor | None
    margin: Tensor | None

    @lists_options
    def __init__(
        self,
        counts: Vector,
        beta: float | Vector = 0.999,
        *,
        empty: Empty = "error",
        logit_bias: Tensor | None = None,
        margin: Tensor | None = None,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__()
        self.options = options_of("ClassBalancedLoss", options)
        self.spec = check_options(self.options)
        weight = class_balanced_weights(counts, beta, empty=empty)
        for name, vector in (("logit_bias", logit_bias), ("margin", margin)):
            if vector is not None:
                vector = check_class_vector(name, vector, len(weight))
            self.register_buffer(name, vector)
        self.register_buffer("weight", weight)
        self.counts, self.beta, self.empty = reals(counts, "counts"), reals(beta, "beta"), empty

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
        """The loss, or (loss, ClassStats); what changes from batch to batch comes here."""
        buffers = self._buffers  # Module.__getattr__ would take half a microsecond for each
        inputs = check_inputs(
            input, target, buffers["weight"], sample_weight, normalizer, buffers["logit_bias"],
            buffers["margin"], self.spec, return_stats,
        )  # fmt: skip
        return dispatch(input, inputs, self.spec, return_stats)

    if TYPE_CHECKING:
        __call__ = forward

    @classmethod
    def from_labels(
        cls,
        labels: Tensor | Array | Sequence[int],
        num_classes: int | None = None,
        beta: float | Vector = 0.999,
        **options: Unpack[ModuleOptions],
    ) -> Self:
        """The loss for the counts of these class indices, see `class_counts`.

        >>> ClassBalancedLoss.from_labels([0, 0, 1, 2], beta=0.9).counts
        tensor([2., 1., 1.], dtype=torch.float64)
        """
        return cls(class_counts(labels, num_classes), beta, **options)

    @classmethod
    def from_dataset(
        cls,
        dataset: Dataset[Any] | DataLoader[Any],
        num_classes: int | None = None,
        beta: float | Vector = 0.999,
        **options: Unpack[ModuleOptions],
    ) -> Self:
        """The loss for the counts of a dataset or of what a loader samples, see `class_counts`."""
        return cls(class_counts(dataset, num_classes), beta, **options)

    def set_beta(self, beta: float | Vector) -> None:
        """Recompute the weights in place for a new beta.

        Raises and warns as `class_balanced_weights` does.
        """
        self._reweight(self.counts, reals(beta, "beta"))

    def update_counts(self, new: Vector) -> None:
        """Count (C,) further samples of each class, as they stream in; the weights follow in place.

        Raises: ValueError for another number of classes, or as `class_balanced_weights`.

        >>> loss_fn = ClassBalancedLoss([8, 1], beta=0.9)
        >>> loss_fn.update_counts(class_counts([1, 1, 0], num_classes=2))
        >>> loss_fn.counts
        tensor([9., 3.], dtype=torch.float64)
        """
        more = reals(new, "new")
        if more.shape != self.counts.shape:
            raise ValueError(
                f"new must have shape {tuple(self.counts.shape)}, got {tuple(more.shape)}"
            )
        if not (more >= 0).all():
            raise ValueError(f"new must be >= 0, got {more.min().item()}")
        self._reweight(self.counts + more, self.beta)

    def _reweight(self, counts: Tensor, beta: Tensor) -> None:
        self.weight.copy_(class_balanced_weights(counts, beta, empty=self.empty))
        self.counts, self.beta = counts, beta

    def get_extra_state(self) -> dict[str, Tensor]:
        """What the weights were made of, for `state_dict`."""
        return {"counts": self.counts, "beta": self.beta}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Restore counts and beta; the weights are a buffer, which is loaded bit for bit."""
        self.counts, self.beta = state["counts"].double().cpu(), state["beta"].double().cpu()

    def extra_repr(self) -> str:
        """num_classes and beta, then whatever is not the default."""
        beta = f"beta={self.beta.item()}" if self.beta.dim() == 0 else "beta per class"
        changed = self.options.changed()
        changed += [name for name in ("logit_bias", "margin") if getattr(self, name) is not None]
        return ", ".join([f"num_classes={len(self.weight)}", beta, *changed])


class DeferredReweighting:
    """Weights of 1 for the first epochs, then the loss's own: deferred re-weighting (DRW).

    `step()` after every epoch, as torch's schedulers; it changes the loss's weights in place.

    Args:
        loss_fn: the loss, whose counts and beta are those to defer.
        start_epoch: the first epoch, counted from 0, that is re-weighted.
        anneal_epochs: how many epochs beta takes to its own value. N = 1/(1 - beta) grows from 1,
            where all weights are equal, by the same factor each epoch; 0: at once.

    Raises: ValueError for a negative epoch, or anneal_epochs where beta is 1 (N is infinite).
    Source: Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss,
        NeurIPS 2019 (arXiv 1906.07413), algorithm 1.

    >>> loss_fn = ClassBalancedLoss([90, 10], beta=0.9)
    >>> schedule = DeferredReweighting(loss_fn, start_epoch=1)
    >>> loss_fn.weight
    tensor([1., 1.])
    >>> schedule.step()
    >>> loss_fn.weight
    tensor([0.7889, 1.2111])
    """

    def __init__(
        self, loss_fn: ClassBalancedLoss, start_epoch: int, anneal_epochs: int = 0
    ) -> None:
        for name, value in (("start_epoch", start_epoch), ("anneal_epochs", anneal_epochs)):
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be an int >= 0, got {value!r}")
        if anneal_epochs and bool((loss_fn.beta == 1).any()):
            raise ValueError("anneal_epochs needs beta < 1: N = 1/(1 - beta) is infinite")
        self.loss_fn, self.start_epoch, self.anneal_epochs = loss_fn, start_epoch, anneal_epochs
        self.epoch = 0
        self._apply()

    def step(self) -> None:
        """An epoch has ended."""
        self.epoch += 1
        self._apply()

    def _apply(self) -> None:
        loss_fn, past = self.loss_fn, self.epoch - self.start_epoch + 1
        if past <= 0:
            loss_fn.weight.fill_(1)
            return
        beta = loss_fn.beta
        if past <= self.anneal_epochs:
            share = past / (self.anneal_epochs + 1)
            beta = reals(beta_from_prototypes((1 - beta) ** -share), "beta")
        with warnings.catch_warnings():  # of a beta that moves no weight yet: it grows
            warnings.simplefilter("ignore")
            weight = class_balanced_weights(loss_fn.counts, beta, empty=loss_fn.empty)
        loss_fn.weight.copy_(weight)

    def state_dict(self) -> dict[str, int]:
        """The epoch; the weights are in the loss's own."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume at a saved epoch: the weights are set again."""
        self.epoch = state["epoch"]
        self._apply()
