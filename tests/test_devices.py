"""Devices that lack something, played by a CPU in eager PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.backends import DEVICE, INTERPRETED, Backend
from support.oracle import sample
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cbloss_fused import (
    class_balanced_loss,
    inputs,
    linear_autograd,
    linear_class_balanced_loss,
)


class Without(TorchDispatchMode):
    """Raises for a tensor of a dtype, as a device does that has none."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            assert not isinstance(tensor, Tensor) or tensor.dtype != self.dtype, func
        return found


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="of eager PyTorch, on the CPU")
@pytest.mark.parametrize("options", (
    {}, {"activation": "sigmoid"}, {"label_smoothing": 0.1}, {"reduction": "none"},
    {"return_stats": True}, {"return_stats": True, "recompute": True}, {"z_loss": 1e-3},
), ids=str)  # fmt: skip
@pytest.mark.parametrize("head", (False, True), ids=("", "head"))
def test_devices_without_float64(options, head, monkeypatch):
    monkeypatch.setattr(inputs, "WITHOUT_FLOAT64", ("cpu",))
    inside = linear_autograd._Operators(linear_autograd._loss, linear_autograd._gradient)
    monkeypatch.setattr(linear_autograd, "_operators", inside)  # a mode sees no operator's own
    logits, target, weight, sample_weight = sample(10, torch.float32)
    leaf = logits.clone().requires_grad_()
    given: dict[str, Any] = {"sample_weight": sample_weight} | options
    if head:
        given.pop("recompute", None)
    with Backend(None, fallback=True).active(), Without(torch.float64):
        if head:
            eye = torch.eye(10)
            found: Any = linear_class_balanced_loss(leaf, eye, target, weight, **given)
        else:
            found = class_balanced_loss(leaf, target, weight, **given)
        loss = found[0] if options.get("return_stats") else found
        loss.sum().backward()
    want = class_balanced_loss(logits, target, weight, **(given | {"return_stats": False}))
    torch.testing.assert_close(loss, want)
