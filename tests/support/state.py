"""What a ClassBalancedLoss is at a moment."""

from __future__ import annotations

from typing import Any

import torch

from cbloss_fused import ClassBalancedLoss

COUNTS = [100, 10, 1, 40]


def snapshot(loss_fn: ClassBalancedLoss) -> dict[str, Any]:
    state = {name: value.clone() for name, value in loss_fn.state_dict().items()}
    return state | {"options": loss_fn.options, "version": loss_fn.weight._version}


def assert_unchanged(loss_fn: ClassBalancedLoss, before: dict[str, Any]) -> None:
    after = snapshot(loss_fn)
    assert after.keys() == before.keys()
    for name, value in before.items():
        same = torch.equal(after[name], value) if isinstance(value, torch.Tensor) else None
        assert after[name] == value if same is None else same, name
