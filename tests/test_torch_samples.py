"""PyTorch's own tests: the sample inputs of its losses, value and gradient against its function."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import torch_samples
from support.backends import DEVICE
from torch import Tensor

from cbloss_fused import class_balanced_loss

pytestmark = [
    pytest.mark.long,  # PyTorch's tests take seconds to import
    pytest.mark.skipif(DEVICE != "cpu", reason="the samples are compared once, on the CPU"),
]
# Of each function: how many samples are compared at least, and why the others are not.
COMPARED = {"cross_entropy": 21, "binary_cross_entropy_with_logits": 19, "nll_loss": 61}
NO_CLASSES = "an input without dimensions has no classes"
OF_ELEMENTS = "weight has one number for each element"
LEFT_OUT = {"binary_cross_entropy_with_logits": {NO_CLASSES: 1, OF_ELEMENTS: 6}}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    file = tmp_path_factory.mktemp("torch") / "samples.pt"
    command = [sys.executable, torch_samples.__file__, str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "ModuleNotFoundError" in done.stderr:
        pytest.skip(f"PyTorch's tests need more: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    loaded: dict[str, list[Any]] = torch.load(file)
    assert loaded.keys() == COMPARED.keys()
    return loaded


def no_counterpart(input: Tensor, keywords: dict[str, Any]) -> str | None:
    """Why a sample has none here."""
    weight = keywords.get("weight")
    if weight is not None and weight.dim() == 2 and weight.shape[0] > 1:
        return OF_ELEMENTS
    return NO_CLASSES if input.dim() == 0 else None


def with_magnitudes(keywords: dict[str, Any]) -> dict[str, Any]:
    """The samples draw negative weights too, which are refused here: without their signs."""
    return {k: v.abs() if isinstance(v, Tensor) else v for k, v in keywords.items()}


def ours_of_cross_entropy(
    x: Tensor, target: Tensor, keywords: dict[str, Any], backend: Any
) -> Tensor:
    """docs/migration.md: the mean with weights of class indices is "weighted_mean" here."""
    indices = not target.is_floating_point()
    options = {"reduction": "mean", "backend": backend} | keywords
    if options["reduction"] == "mean" and "weight" in options and indices:
        options["reduction"] = "weighted_mean"
    return class_balanced_loss(x, target, **options)


def ours_of_bce(x: Tensor, target: Tensor, keywords: dict[str, Any], backend: Any) -> Tensor:
    """Rows are sums over the classes here: its mean is 1/C of ours. 1-d logits are one row."""
    C = x.shape[1] if x.dim() > 1 else len(x)
    weight = keywords.get("weight")
    if weight is not None:
        weight = weight.reshape(-1).expand(C)
    reduction = keywords.get("reduction", "mean")
    loss = class_balanced_loss(
        x, target, weight, activation="sigmoid", class_weighting="class",
        pos_weight=keywords.get("pos_weight"), reduction=reduction, backend=backend,
    )  # fmt: skip
    return loss / C if reduction == "mean" else loss


def pair(name: str, target: Tensor, keywords: dict[str, Any], backend: Any) -> tuple[Any, Any]:
    """PyTorch's loss and ours, as functions of the logits."""
    if name == "cross_entropy":
        return (
            lambda x: F.cross_entropy(x, target, **keywords),
            lambda x: ours_of_cross_entropy(x, target, keywords, backend),
        )
    if name == "nll_loss":  # of log-probabilities, whose cross entropy it is
        return (
            lambda x: F.nll_loss(x.log_softmax(min(1, x.dim() - 1)), target, **keywords),
            lambda x: ours_of_cross_entropy(
                x.log_softmax(min(1, x.dim() - 1)), target, keywords, backend
            ),
        )

    def rows_of_bce(x: Tensor) -> Tensor:
        loss = F.binary_cross_entropy_with_logits(x, target, **keywords)
        return loss.sum(min(1, x.dim() - 1)) if keywords.get("reduction") == "none" else loss

    return rows_of_bce, lambda x: ours_of_bce(x, target, keywords, backend)


def loss_and_grad(function: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    loss = function(leaf)
    incoming = torch.linspace(0.5, 2, loss.numel(), dtype=x.dtype).reshape(loss.shape)
    (grad,) = torch.autograd.grad(loss, leaf, incoming)
    return loss.detach(), grad


@pytest.mark.parametrize("name", torch_samples.NAMES)
def test_samples_of_pytorch(backend, samples, name):
    compared = 0
    left_out: Counter[str] = Counter()
    for input, target, given in samples[name]:
        reason = no_counterpart(input, given)
        if reason is not None:
            left_out[reason] += 1
            continue
        theirs, ours = pair(name, target, with_magnitudes(given), backend.argument)
        want, got = loss_and_grad(theirs, input), loss_and_grad(ours, input)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
        compared += 1
    assert compared >= COMPARED[name]
    assert left_out <= Counter(LEFT_OUT.get(name))


@pytest.mark.parametrize("name", torch_samples.NAMES)
def test_negative_weights_of_the_samples_are_refused(samples, name):
    negative = 0
    for input, target, keywords in samples[name]:
        weight = keywords.get("weight")
        if no_counterpart(input, keywords) or weight is None or (weight >= 0).all():
            continue
        _, ours = pair(name, target, keywords, None)
        with pytest.raises(ValueError, match=r"^weight\[\d\] = -.* must be finite and >= 0"):
            ours(input)
        negative += 1
    assert negative
