"""timm's checkpoints, with the loss in the model or not."""

from __future__ import annotations

from pathlib import Path

import pytest
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

framework("timm")
from timm.models import resume_checkpoint
from timm.utils import CheckpointSaver

pytestmark = MARKS


def train(saved: bool, folder: Path, start: Path | None = None) -> Net:
    """As timm's script: a file after every epoch, and the epoch that follows from the file."""
    folder.mkdir(exist_ok=True)
    net, (x, y) = Net(), data()
    model, optimizer, schedule = net if saved else net.head, adam(net), deferred(net.loss_fn)
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=str(folder), max_history=EPOCHS)
    first = 0
    if start is not None:
        first = resume_checkpoint(model, str(start), optimizer, log_info=False)
        schedule.step(first)
    for epoch in range(first, EPOCHS):
        for _ in range(STEPS):
            optimizer.zero_grad()
            net.loss(model(x), y).backward()
            optimizer.step()
        schedule.step(epoch + 1)
        saver.save_checkpoint(epoch)
    return net


@pytest.mark.parametrize("saved", (True, False), ids=("in-the-model", "beside"))
def test_timm(saved: bool, tmp_path: Path) -> None:
    assert_goes_on(train(saved, tmp_path / "saved").steps, 0)
    for epoch in range(1, EPOCHS):
        start = tmp_path / "saved" / f"checkpoint-{epoch - 1}.pth.tar"
        assert_goes_on(train(saved, tmp_path / "again", start).steps, epoch * STEPS)
