"""safetensors: files of a state, and of a model that holds the loss."""

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

framework("safetensors.torch")
from safetensors.torch import load_file, load_model, save_file, save_model

pytestmark = MARKS


def train(file: Path, whole: bool, epochs: range) -> Net:
    """Goes on with the file's model, unless it begins, and saves it at the end."""
    net, (x, y) = Net(), data()
    optimizer = adam(net)
    if epochs.start:
        if whole:
            load_model(net, str(file))
        else:
            net.load_state_dict(load_file(str(file)))
        optimizer.load_state_dict(torch.load(file.with_suffix(".optimizer")))
    schedule = deferred(net.loss_fn)
    for epoch in epochs:
        assert schedule.epoch == epoch
        for _ in range(STEPS):
            optimizer.zero_grad()
            net.loss(net(x), y).backward()
            optimizer.step()
        schedule.step()
    if whole:
        save_model(net, str(file))
    else:
        save_file(net.state_dict(), str(file))
    torch.save(optimizer.state_dict(), file.with_suffix(".optimizer"))
    return net


@pytest.mark.parametrize("whole", (True, False), ids=("model", "state"))
def test_safetensors(whole: bool, tmp_path: Path) -> None:
    for done in range(EPOCHS):
        file = tmp_path / f"{done}.safetensors"
        train(file, whole, range(done))
        assert_goes_on(train(file, whole, range(done, EPOCHS)).steps, done * STEPS)
