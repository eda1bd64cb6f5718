"""Training that other packages cut off and resume: what is trained, and how it goes if they do not.

Four epochs of three steps, all of the same batch, so that no order of batches matters. The weights
are 1 for two epochs, half of the way in the third, the loss's own in the fourth.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from cbloss_fused import ClassBalancedLoss, DeferredReweighting

from .backends import DEVICE, INTERPRETED

EPOCHS, STEPS = 4, 3
BATCH = 8
MARKS = [
    pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="frameworks on the CPU"),
    pytest.mark.filterwarnings("ignore", "error:::cbloss_fused"),  # they warn of each other
    pytest.mark.filterwarnings("ignore:cbloss_fused runs in eager PyTorch"),
]


def framework(name: str) -> None:
    """Skip the module where the package is missing; it may be imported from then on."""
    with warnings.catch_warnings():  # that it gives of others while it is imported
        warnings.simplefilter("ignore")
        pytest.importorskip(name)


class Step(NamedTuple):
    epoch: int  # of the schedule
    weight: list[float]
    loss: float

    @classmethod
    def now(cls, loss_fn: ClassBalancedLoss, loss: Tensor) -> Step:
        return cls(int(loss_fn.schedule[0]), loss_fn.weight.tolist(), loss.item())


class Net(nn.Module):
    """A head with its loss, always the same when it is made, and the steps that it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        with torch.no_grad():
            self.head.weight.copy_(torch.linspace(-1, 1, 12).reshape(3, 4).sin())
            self.head.bias.zero_()
        self.loss_fn = ClassBalancedLoss([90, 9, 1], 0.99)
        self.steps: list[Step] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        loss = self.loss_fn(logits, y)
        if torch.is_grad_enabled():
            self.steps.append(Step.now(self.loss_fn, loss))
        return loss


def deferred(loss_fn: ClassBalancedLoss) -> DeferredReweighting:
    return DeferredReweighting(loss_fn, start_epoch=2, anneal_epochs=1)


def data(batches: int = 1) -> tuple[Tensor, Tensor]:
    """(8 * batches, 4) features and their labels: the batch, so many times."""
    x, y = torch.linspace(0, 20, 4 * BATCH).reshape(BATCH, 4).cos(), torch.arange(BATCH) % 3
    return x.repeat(batches, 1), y.repeat(batches)


def adam(net: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(net.parameters(), lr=0.1)


@cache
def straight() -> list[Step]:
    """All steps of training that is not cut off, by torch alone."""
    net, (x, y) = Net(), data()
    optimizer, schedule = adam(net), deferred(net.loss_fn)
    for epoch in range(EPOCHS):
        assert schedule.epoch == epoch
        for _ in range(STEPS):
            optimizer.zero_grad()
            net.loss(net(x), y).backward()
            optimizer.step()
        schedule.step()
    return net.steps


def assert_goes_on(steps: list[Step], done: int) -> None:
    """These are the steps that follow so many ones of training that is not cut off."""
    want = straight()[done:]
    assert [step.epoch for step in steps] == [step.epoch for step in want]
    assert [step.weight for step in steps] == [step.weight for step in want]
    assert [step.loss for step in steps] == pytest.approx([step.loss for step in want], rel=1e-4)
