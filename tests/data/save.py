"""Modules of this version, which every later version must load: tests/test_saved.py.

`python tests/data/save.py`, once per version, before it is released: states-VERSION.pt has inputs,
and of each module its state and loss, as tensors; modules-VERSION.pt the modules themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import cbloss_fused
from cbloss_fused import (
    ClassBalancedLoss,
    DeferredReweighting,
    LinearClassBalancedLoss,
    ldam_margin,
    logit_adjustment,
)

COUNTS = [1000, 300, 70, 5, 0]
# By name: counts, beta and options. The Linear ones have a head of 3 inputs.
MODULES: dict[str, dict[str, Any]] = {
    "softmax": {"gamma": 0.5, "label_smoothing": 0.1},
    "sigmoid": {"beta": 0.99, "activation": "sigmoid", "gamma": 2.0, "alpha": 0.25},
    "adjusted": {"beta": 0.0, "logit_bias": logit_adjustment(torch.tensor(COUNTS) + 1)},
    "LDAM": {"margin": ldam_margin(torch.tensor(COUNTS) + 1), "logit_scale": 30.0},
    "asymmetric": {"activation": "sigmoid", "gamma_neg": 4.0, "clip": 0.05},
    "a beta per class": {"beta": [0.9, 0.99, 0.5, 0.9, 0.0], "z_loss": 1e-4},
    "deferred": {},
    "linear": {"gamma": 1.0},
}
DEFER = 3  # epochs with uniform weights; two have passed


def make(name: str) -> Any:
    options = dict(MODULES[name])
    beta = options.pop("beta", 0.999)
    if name == "linear":
        return LinearClassBalancedLoss(3, COUNTS, beta, empty="zero", **options)
    loss_fn = ClassBalancedLoss(COUNTS, beta, empty="zero", **options)
    if name == "deferred":
        schedule = DeferredReweighting(loss_fn, DEFER)
        for _ in range(2):
            schedule.step()
    return loss_fn


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, logits, targets."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(7, 3, generator=g), 3 * torch.randn(7, 5, generator=g), torch.arange(7) % 4


def main() -> None:
    torch.manual_seed(0)
    folder, version = Path(__file__).parent, cbloss_fused.__version__
    features, logits, target = inputs()
    states: dict[str, Any] = {"features": features, "logits": logits, "target": target}
    modules = {name: make(name) for name in MODULES}
    for name, module in modules.items():
        with torch.no_grad():
            loss = module(features if name == "linear" else logits, target)
        states[name] = {"state": module.state_dict(), "loss": loss}
    torch.save(states, folder / f"states-{version}.pt")
    torch.save(modules, folder / f"modules-{version}.pt")


if __name__ == "__main__":
    main()
