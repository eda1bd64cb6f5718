"""skorch: checkpoints with the criterion, and pickles of the whole net."""

from __future__ import annotations

import pickle
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
    Step,
    assert_goes_on,
    data,
    deferred,
    framework,
)
from torch import Tensor

from cbloss_fused import ClassBalancedLoss

framework("skorch")
from skorch import NeuralNetClassifier
from skorch.callbacks import Callback, Checkpoint

pytestmark = MARKS


class Deferred(Callback):
    """The history, which is saved, has an entry for every epoch."""

    def on_train_begin(self, net: Any, **kwargs: Any) -> None:
        self.schedule = deferred(net.criterion_)

    def on_epoch_begin(self, net: Any, **kwargs: Any) -> None:
        self.schedule.step(len(net.history) - 1)


class Steps(Callback):
    def __init__(self) -> None:
        self.seen: list[Step] = []

    def on_batch_end(self, net: Any, loss: Tensor, **kwargs: Any) -> None:
        self.seen.append(Step.now(net.criterion_, loss))


def made(folder: Path, epochs: int) -> tuple[Any, Any]:
    """A net for so many epochs, with the checkpoint that it writes after each of them."""
    kept = Checkpoint(dirname=str(folder), monitor=None)
    net = NeuralNetClassifier(
        Net, criterion=ClassBalancedLoss, criterion__counts=[90, 9, 1], criterion__beta=0.99,
        optimizer=torch.optim.Adam, lr=0.1, batch_size=BATCH, max_epochs=epochs, train_split=None,
        verbose=0, callbacks=[Deferred(), ("steps", Steps()), kept],
    )  # fmt: skip
    return net.initialize(), kept


def steps(net: Any) -> list[Step]:
    return dict(net.callbacks_)["steps"].seen


@pytest.mark.parametrize("done", range(EPOCHS))
def test_checkpoint(done: int, tmp_path: Path) -> None:
    x, y = data(STEPS)
    if done:
        made(tmp_path, done)[0].partial_fit(x, y)
    net, kept = made(tmp_path, EPOCHS - done)
    if done:
        net.load_params(checkpoint=kept)
    assert_goes_on(steps(net.partial_fit(x, y)), done * STEPS)


@pytest.mark.parametrize("done", range(1, EPOCHS))
def test_pickle(done: int, tmp_path: Path) -> None:
    x, y = data(STEPS)
    net, _ = made(tmp_path, done)
    again = pickle.loads(pickle.dumps(net.partial_fit(x, y)))
    again.set_params(max_epochs=EPOCHS - done)
    assert_goes_on(steps(again.partial_fit(x, y)), 0)
