"""Checkpoints of the Hugging Face Trainer, wherever in an epoch they are written."""

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
from torch import Tensor, nn

framework("transformers")
from transformers import Trainer, TrainerCallback, TrainingArguments

pytestmark = MARKS


class Model(nn.Module):
    """With the loss, which is then saved with it, or without."""

    def __init__(self, net: Net, saved: bool) -> None:
        super().__init__()
        self.net = net if saved else net.head

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.net(x)}


class Deferred(TrainerCallback):
    """As in docs/recipes.md."""

    def __init__(self, net: Net) -> None:
        self.schedule = deferred(net.loss_fn)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.schedule.step(int(state.epoch))


class Stepped(Deferred):
    """By what the loss has saved."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None: ...

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.schedule.step()


def train(
    callback: type[Any], saved: bool, folder: Path, start: Path | None = None, **options: Any
) -> Net:
    net = Net()

    def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return net.loss(outputs["logits"], labels)

    arguments = TrainingArguments(
        str(folder), num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, max_grad_norm=0,
        train_sampling_strategy="sequential", lr_scheduler_type="constant", report_to="none",
        disable_tqdm=True, use_cpu=True, **options,
    )  # fmt: skip
    items = [{"x": x, "labels": y} for x, y in zip(*data(STEPS), strict=True)]
    model = Model(net, saved)
    trainer = Trainer(
        model, arguments, train_dataset=items, compute_loss_func=loss_of,
        callbacks=[callback(net)], optimizers=(adam(model), None),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=start and str(start))
    return net


@pytest.mark.parametrize(
    "callback, saved, options, done",
    [
        pytest.param(Deferred, False, {"save_steps": 1}, (2, 3, 6, 7, 8), id="any-step"),
        pytest.param(Deferred, True, {"save_steps": 1}, (2, 3, 6, 7, 8), id="saved-any-step"),
        pytest.param(Deferred, False, {"save_strategy": "epoch"}, (3, 6, 9), id="epochs"),
        pytest.param(Stepped, True, {"save_strategy": "epoch"}, (3, 6, 9), id="epochs-stepped"),
        pytest.param(Stepped, True, {"save_steps": 5}, (5, 10), id="middle-stepped"),
    ],
)
def test_trainer(
    callback: type[Any], saved: bool, options: Any, done: tuple[int, ...], tmp_path: Path
) -> None:
    assert_goes_on(train(callback, saved, tmp_path / "saved", **options).steps, 0)
    for n in done:
        start = tmp_path / "saved" / f"checkpoint-{n}"
        going_on = train(callback, saved, tmp_path / str(n), start, save_strategy="no")
        assert_goes_on(going_on.steps, n)


@pytest.mark.parametrize("parts", (1, 2, 4))
def test_accumulation(parts: int, tmp_path: Path) -> None:
    """However uneven the parts of a step are, its gradient is that of the whole batch."""
    x, y = data()
    y[3:7] = -100
    want, net = Net(), Net()
    (gradient,) = torch.autograd.grad(want.loss_fn(want(x), y), want.head.weight)

    def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return net.loss_fn(outputs["logits"], labels, normalizer=num_items_in_batch)

    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=BATCH // parts, max_grad_norm=0,
        gradient_accumulation_steps=parts, lr_scheduler_type="constant", save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, learning_rate=0.5,
    )  # fmt: skip
    items = [{"x": x, "labels": y} for x, y in zip(x, y, strict=True)]
    sgd = torch.optim.SGD(net.parameters(), lr=0.5)
    trainer = Trainer(
        Model(net, True), arguments, train_dataset=items, compute_loss_func=loss_of,
        optimizers=(sgd, None),
    )  # fmt: skip
    trainer.train()
    torch.testing.assert_close(net.head.weight, want.head.weight - 0.5 * gradient)
