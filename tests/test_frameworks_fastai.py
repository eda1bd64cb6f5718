"""fastai: what a Learner saves, without its loss, and what it exports, with it."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.frameworks import (
    BATCH,
    EPOCHS,
    MARKS,
    STEPS,
    Net,
    assert_goes_on,
    data,
    deferred,
    framework,
)
from torch.utils.data import TensorDataset

from cbloss_fused import ClassBalancedLoss, class_balanced_loss

framework("fastai.basics")
from fastai.basics import Callback, DataLoaders, Learner, OptimWrapper
from fastai.losses import BaseLoss

pytestmark = MARKS


class Deferred(Callback):
    """As in docs/recipes.md."""

    def __init__(self, schedule: Any) -> None:
        self.schedule = schedule

    def before_epoch(self) -> None:
        self.schedule.step(self.epoch)


def made(folder: Path) -> tuple[Any, Net]:
    net, dataset = Net(), TensorDataset(*data(STEPS))
    loaders = DataLoaders.from_dsets(
        dataset, dataset, bs=BATCH, shuffle=False, device=torch.device("cpu")
    )
    learner = Learner(
        loaders, net.head, net.loss, lr=0.1, path=folder, cbs=Deferred(deferred(net.loss_fn)),
        opt_func=partial(OptimWrapper, opt=torch.optim.Adam),
    )  # fmt: skip
    return learner, net


@pytest.mark.parametrize("done", range(EPOCHS))
def test_learner(done: int, tmp_path: Path) -> None:
    if done:
        cut_off, _ = made(tmp_path)
        cut_off.fit(done)
        cut_off.save("middle")
    learner, net = made(tmp_path)
    if done:
        learner.load("middle")
    learner.fit(EPOCHS, start_epoch=done)
    assert_goes_on(net.steps, done * STEPS)


def test_base_loss(tmp_path: Path) -> None:
    """Its losses row by row, and what it pickles, as a Learner does to export itself."""
    loss = BaseLoss(ClassBalancedLoss, [90, 9, 1], 0.99)
    deferred(loss.func).step(2)
    learner, _ = made(tmp_path)
    learner.loss_func = loss
    logits, labels, rows = learner.get_preds(with_loss=True)
    want = class_balanced_loss(logits, labels, loss.func.weight, reduction="none")
    torch.testing.assert_close(rows, want)
    assert loss.reduction == "mean"
    state = pickle.loads(pickle.dumps(loss)).func.state_dict()
    for name, value in loss.func.state_dict().items():
        assert torch.equal(state[name], value), name
