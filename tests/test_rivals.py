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
