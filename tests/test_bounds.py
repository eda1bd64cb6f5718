"""The error bounds of the CPU kernels' functions, which docs/numerics.md and comments state."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.backends import DEVICE, INTERPRETED
from support.oracle import oracle

from bench import bounds, bounds_samples
from cbloss_fused import class_balanced_loss
from cbloss_fused.backends import set_isa

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    DEVICE != "cpu" or INTERPRETED or shutil.which("g++") is None or not set_isa(),
    reason="needs the CPU kernels and g++",
)
BEST, *OTHERS = bounds.instruction_sets() or ["none"]
ISA = pytest.mark.parametrize(
    "isa", (BEST, *(pytest.param(isa, marks=pytest.mark.long) for isa in OTHERS))
)


def check(isa, step):
    for function in bounds.FUNCTIONS:
        error, at = bounds.worst(isa, function, step)
        assert 0 < error <= function.bound, f"{function.label}: {error:.3g} at {at:.9g}"


@ISA
def test_functions_of_one_variable(isa):
    check(isa, 20_011)


@pytest.mark.long
@ISA
def test_functions_of_one_variable_densely(isa):
    """`make bounds` takes every number, for minutes."""
    check(isa, 31)


@pytest.mark.parametrize("n", (16, pytest.param(1000, marks=pytest.mark.long)))
@pytest.mark.parametrize("function", bounds_samples.SAMPLED, ids=lambda function: function.name)
@ISA
def test_functions_of_several_variables(isa, function, n):
    found = bounds_samples.worst(bounds.library(isa), function, n, seed=n)
    for result, (error, at) in zip(function.results, found, strict=True):
        assert 0 < error <= function.bound, f"{result}: {error:.3g} at {at}"


def test_the_page_has_these_bounds():
    assert bounds.promised() in (ROOT / "docs" / "numerics.md").read_text()


@pytest.mark.parametrize("gamma", (2.0, 6.0, 10.0), ids="g{}".format)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_types_with_large_gamma(dtype, gamma):
    """One element, where no other hides its error: it grows with gamma."""
    every = torch.arange(-32768, 32768).to(torch.int16).view(dtype)
    logits = every[(every.abs() < 30) & (every.abs() > 1e-3)].unsqueeze(1)
    target = torch.zeros(len(logits), dtype=torch.int64)
    options = {"activation": "sigmoid", "gamma": gamma, "reduction": "none"}
    loss = class_balanced_loss(logits, target, **options)
    want, _ = oracle(logits, target, **options)
    assert ((loss - want).abs() <= max(2e-5, 5e-6 * gamma) * want + 1.2e-38).all()
