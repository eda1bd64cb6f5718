"""Lightning's checkpoints, wherever in an epoch they are written."""

from __future__ import annotations

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
    adam,
    assert_goes_on,
    data,
    deferred,
    framework,
)
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

framework("lightning")
import lightning
from lightning.pytorch.callbacks import ModelCheckpoint

pytestmark = MARKS


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return self.net.loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor]) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adam(self.net)


class Deferred(lightning.Callback):
    """As in docs/recipes.md."""

    def __init__(self, net: Net) -> None:
        self.schedule = deferred(net.loss_fn)

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.schedule.step(trainer.current_epoch)

    on_train_start = on_train_epoch_start


class Stepped(lightning.Callback):
    """By what the loss has saved."""

    def __init__(self, net: Net) -> None:
        self.schedule = deferred(net.loss_fn)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.schedule.step()


def train(callback: type[Any], folder: Path, start: Path | None = None, **options: Any) -> Net:
    module = Module()
    kept = ModelCheckpoint(folder, "{step}", save_top_k=-1, **options)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=EPOCHS, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback(module.net), kept],
    )  # fmt: skip
    loader = DataLoader(TensorDataset(*data(STEPS)), batch_size=BATCH)
    trainer.fit(module, loader, loader, ckpt_path=start)
    return module.net


@pytest.mark.parametrize(
    "callback, options, done",
    [
        pytest.param(Deferred, {"every_n_train_steps": 1}, (2, 3, 6, 7, 8), id="any-step"),
        pytest.param(Deferred, {}, (3, 6, 9), id="epochs"),
        pytest.param(Deferred, {"save_on_train_epoch_end": True}, (3, 6, 9), id="epochs-end"),
        pytest.param(Stepped, {}, (3, 6, 9), id="epochs-stepped"),
        pytest.param(Stepped, {"every_n_train_steps": 5}, (5, 10), id="middle-stepped"),
    ],
)
def test_lightning(callback: type[Any], options: Any, done: tuple[int], tmp_path: Path) -> None:
    assert_goes_on(train(callback, tmp_path / "saved", **options).steps, 0)
    for n in done:
        start = tmp_path / "saved" / f"step={n}.ckpt"
        assert_goes_on(train(callback, tmp_path / str(n), start).steps, n)
