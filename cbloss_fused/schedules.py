"""Schedules of a loss's weights."""

from __future__ import annotations

import operator
from typing import Any

from .modules import ClassBalancedLoss


class DeferredReweighting:
    """Weights of 1 for the first epochs, then the loss's own: deferred re-weighting (DRW).

    `step()` after every epoch, as torch's schedulers, or `step(epoch)` as each begins; the loss's
    weights change in place.

    Args:
        loss_fn: the loss, whose counts and beta are those to defer.
        start_epoch: the first epoch, counted from 0, that is re-weighted.
        anneal_epochs: how many epochs beta takes to its own value. N = 1/(1 - beta) grows from 1,
            where all weights are equal, by the same factor each epoch; 0: at once.

    The loss knows how far it is re-weighted, and saves it: a schedule of a loss that was loaded
    goes on in its epoch; `reset()` starts again.

    Raises: TypeError for another loss; ValueError for a negative epoch, or anneal_epochs where beta
        is 1 (N is infinite).
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
        if not isinstance(loss_fn, ClassBalancedLoss):
            raise TypeError(f"loss_fn must be a ClassBalancedLoss, got {type(loss_fn).__name__}")
        start_epoch = _epochs("start_epoch", start_epoch)
        anneal_epochs = _epochs("anneal_epochs", anneal_epochs)
        if anneal_epochs and bool((loss_fn.beta == 1).any()):
            raise ValueError("anneal_epochs needs beta < 1: N = 1/(1 - beta) is infinite")
        self.loss_fn, self.start_epoch, self.anneal_epochs = loss_fn, start_epoch, anneal_epochs
        self._go_to(loss_fn._epoch)

    @property
    def epoch(self) -> int:
        """The epoch that the loss is in, counted from 0."""
        return self.loss_fn._epoch

    def step(self, epoch: int | None = None) -> None:
        """An epoch has ended: on to the next one, or to the given one, counted from 0.

        A caller who knows the epoch passes it as an epoch begins: wherever training was cut off and
        whatever was saved, the weights are then those of the epoch.
        """
        self._go_to(self.epoch + 1 if epoch is None else _epochs("epoch", epoch))

    def reset(self) -> None:
        """Start again at epoch 0."""
        self._go_to(0)

    def _go_to(self, epoch: int) -> None:
        past = max(0, epoch - self.start_epoch + 1)
        self.loss_fn._defer(epoch, min(1.0, past / (self.anneal_epochs + 1)))

    def state_dict(self) -> dict[str, int]:
        """The epoch, which the loss's own state has too."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on in a saved epoch: the weights are set again."""
        self._go_to(_epochs("epoch", state["epoch"]))


def _epochs(name: str, value: Any) -> int:
    """Of any integer type, as Python's."""
    try:
        epochs = operator.index(value)
    except TypeError:
        epochs = -1
    if epochs < 0:
        raise ValueError(f"{name} must be an int >= 0, got {value!r}")
    return epochs
