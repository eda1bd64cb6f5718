"""The losses and class weights of other packages: numbers that tests/data/make.py has stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.backends import loss_and_grad
from torch import Tensor

from cbloss_fused import class_balanced_weights

STORED = json.loads((Path(__file__).parent / "data" / "rivals.json").read_text())
TOLERANCES = {"float64": 1e-11, "float32": 1e-6}  # by what a package computes in; we in float64


def arguments(ours: dict[str, Any]) -> dict[str, Any]:
    """With the stored tensors in the place of their names."""
    tensors: dict[str, Tensor] = {
        **{name: torch.tensor(v, dtype=torch.float64) for name, v in STORED["floats"].items()},
        **{name: torch.tensor(v) for name, v in STORED["integers"].items()},
    }
    return {k: tensors.get(v, v) if isinstance(v, str) else v for k, v in ours.items()}


def assert_near(got: Tensor, stored: list[Any], tolerance: float) -> None:
    want = torch.tensor(stored, dtype=torch.float64)
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", STORED["losses"], ids=lambda case: case["theirs"])
def test_loss(backend, case):
    options = arguments({"upstream": "upstream", **case["ours"]})
    logits, upstream = options.pop("input"), options.pop("upstream")
    if options.get("reduction") != "none":
        upstream = None
    loss, grad = loss_and_grad(backend, logits, grad_output=upstream, **options)
    tolerance, scale = TOLERANCES[case["computed_in"]], case["scale"]
    assert_near(scale * loss, case["loss"], tolerance)
    assert_near(scale * grad, case["grad"], tolerance)


@pytest.mark.parametrize("case", STORED["weights"], ids=lambda case: case["theirs"])
def test_class_weights(case):
    assert_near(class_balanced_weights(**arguments(case["ours"])), case["weights"], 1e-6)


# What packages' own tests expect, to the digits that they have there: the mean over rows and
# classes. MMPretrain: tests/test_models/test_losses.py; kornia: tests/losses/test_focal_loss.py.
# The tests of timm and torchvision have no numbers but compare random inputs with formulas.
SCORES, LABELS = [[5.0, -5.0, 0.0]] * 2, [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
ASYMMETRIC, FOCAL = {"gamma": 1.0, "gamma_neg": 4.0}, {"gamma": 2.0, "alpha": 0.25}
PUBLISHED = {
    "mmpretrain-asymmetric": (SCORES, LABELS, ASYMMETRIC | {"clip": 0.05}, 3.80845 / 3),
    "mmpretrain-asymmetric-no-clip": (SCORES, LABELS, ASYMMETRIC, 5.1186 / 3),
    "mmpretrain-focal": (SCORES, LABELS, FOCAL, 0.8522),
    "kornia-focal": ([[100.0, -100.0]], [[1.0, 0.0]], FOCAL, 0.0),
}


@pytest.mark.parametrize("case", PUBLISHED.values(), ids=PUBLISHED)
def test_published(backend, case):
    logits, labels, options, want = case
    x, t = torch.tensor(logits, dtype=torch.float64), torch.tensor(labels, dtype=torch.float64)
    for scale in (1.0, 0.5):  # as their sample weights
        rows = torch.full((len(x),), scale, dtype=torch.float64)
        loss, _ = loss_and_grad(backend, x, t, activation="sigmoid", sample_weight=rows, **options)
        assert loss.item() / x.shape[1] == pytest.approx(scale * want, rel=5e-5, abs=1e-12)
