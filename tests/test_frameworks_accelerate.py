"""Accelerate's checkpoints, with the loss in the model or registered beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.frameworks import (
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

framework("accelerate")
from accelerate import Accelerator, load_checkpoint_in_model

pytestmark = MARKS


def train(beside: str | None, folder: Path, start: Path | None = None, safe: bool = True) -> Net:
    """Saves after every epoch; with a start, goes on with the epoch that follows."""
    accelerator = Accelerator(cpu=True)
    net, (x, y) = Net(), data()
    schedule = deferred(net.loss_fn)
    model, optimizer = accelerator.prepare(net if beside is None else net.head, adam(net))
    if beside is not None:
        accelerator.register_for_checkpointing({"loss": net.loss_fn, "schedule": schedule}[beside])
    if start is not None:
        accelerator.load_state(str(start))
    for epoch in range(schedule.epoch, EPOCHS):
        for _ in range(STEPS):
            optimizer.zero_grad()
            accelerator.backward(net.loss(model(x), y))
            optimizer.step()
        schedule.step()
        accelerator.save_state(str(folder / str(epoch + 1)), safe_serialization=safe)
    return net


@pytest.mark.parametrize("safe", (True, False), ids=("safetensors", "pickle"))
@pytest.mark.parametrize("beside", (None, "loss", "schedule"))
def test_accelerate(beside: str | None, safe: bool, tmp_path: Path) -> None:
    assert_goes_on(train(beside, tmp_path, safe=safe).steps, 0)
    for epoch in range(1, EPOCHS):
        going_on = train(beside, tmp_path / "again", tmp_path / str(epoch), safe=safe)
        assert_goes_on(going_on.steps, epoch * STEPS)


@pytest.mark.parametrize("size", ("5GB", 100), ids=("whole", "in-parts"))
def test_save_model(size: str | int, tmp_path: Path) -> None:
    net, loaded = Net(), Net()
    net.loss_fn.update_counts([1, 1, 1])
    deferred(net.loss_fn).step(2)
    Accelerator(cpu=True).save_model(net, str(tmp_path), max_shard_size=size)
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if size == "5GB" else 2)
    load_checkpoint_in_model(loaded, str(tmp_path))
    for name, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
