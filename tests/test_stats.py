"""return_stats: what each class contributes, beside the same loss and gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.backends import BEST, DEVICE, loss_and_grad
from support.marks import DTYPES, FAMILIES, IGNORED, name_of
from support.oracle import oracle, sample

from cbloss_fused import class_balanced_loss

FAMILY = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.parametrize("reduction", ("mean", "weighted_mean", "sum"))
@pytest.mark.parametrize("C", (2, 10, 131), ids="C{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@FAMILY
def test_stats_are_sums_over_the_rows_of_a_class(backend, family, dtype, C, reduction):
    logits, target, weight, sample_weight = sample(C, dtype)
    options = {
        "activation": family, "gamma": 0.5, "reduction": reduction, "sample_weight": sample_weight,
        "logit_bias": weight, "margin": weight / 2, "logit_scale": 1.5,
    }  # fmt: skip
    leaf = logits.clone().requires_grad_()
    loss, stats = class_balanced_loss(
        leaf, target, weight, return_stats=True, backend=backend.argument, **options
    )
    (loss * 3).backward()
    want, grad = loss_and_grad(backend, logits, target, weight, recompute=False, **options)
    torch.testing.assert_close(loss.detach(), want)
    if dtype.itemsize > 2:  # rounded twice
        torch.testing.assert_close(leaf.grad, 3 * grad)

    keep = target != IGNORED
    x, y, s = logits[keep].double(), target[keep], sample_weight[keep]
    rows, _ = oracle(x, y, weight, **options | {"sample_weight": s, "reduction": "none"})
    total, g = oracle(x, y, weight, **options | {"sample_weight": s})
    z = (x + weight - torch.nn.functional.one_hot(y, C) * weight / 2) * 1.5
    p = z.softmax(1) if family == "softmax" else z.sigmoid()
    at = torch.arange(len(y), device=y.device), y
    for c in range(C):
        of_class = y == c
        assert stats.rows[c] == of_class.sum()
        got = torch.stack((stats.loss[c], stats.gradient[c], stats.probability[c])).double()
        share = rows[of_class].sum() * total / rows.sum()
        want = torch.stack((share, g[at][of_class].abs().sum(), p[at][of_class].mean()))
        tolerance = 1e-2 if dtype.itemsize == 2 else 1e-4 if dtype == torch.float32 else 1e-9
        torch.testing.assert_close(got, want, rtol=tolerance, atol=1e-6, equal_nan=True)


def test_stats_of_an_image_and_of_nothing(backend):
    logits = torch.randn(2, 5, 3, 4, generator=torch.Generator(DEVICE).manual_seed(0))
    target = torch.arange(24).reshape(2, 3, 4) % 5
    for y in (target, torch.full_like(target, IGNORED)):
        loss, stats = class_balanced_loss(logits, y, return_stats=True, backend=backend.argument)
        torch.testing.assert_close(stats.loss.sum(), loss, check_dtype=False)
        assert stats.rows.sum() == (y != IGNORED).sum()
    assert stats.probability.isnan().all()


def test_sums_are_in_float64(backend):
    """Of more rows than float32 counts: shares to 1e-6."""
    if DEVICE == "cpu" and (backend is not BEST or backend.argument == "triton"):
        pytest.skip("slow, and the sums are those of the first backend")
    n = 2**24 + 5
    x = torch.zeros(n, 2, device=DEVICE, requires_grad=True)
    y = torch.zeros(n, dtype=torch.int64, device=DEVICE)
    y[:3] = 1
    loss, stats = class_balanced_loss(x, y, return_stats=True, backend=backend.argument)
    assert stats.rows.dtype == torch.int64
    assert stats.rows.tolist() == [n - 3, 3]
    share = (stats.loss / stats.loss.sum()).tolist()
    assert share == pytest.approx([(n - 3) / n, 3 / n], rel=1e-6)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert stats.loss.sum().item() == pytest.approx(math.log(2), rel=1e-6)


@FAMILY
def test_statistics_change_no_gradient(backend, family):
    """float16: a stored gradient, divided by many rows, would underflow before the loss scaler."""
    rows = 2**11
    x = torch.tensor([[10.0, 0.0]], dtype=torch.float16, device=DEVICE).repeat(rows, 1)
    y = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    options = {"activation": family, "backend": backend.argument}
    leaf, watched = (x.clone().requires_grad_() for _ in range(2))
    (2.0**16 * class_balanced_loss(leaf, y, **options)).backward()
    loss, _ = class_balanced_loss(watched, y, return_stats=True, **options)
    (2.0**16 * loss).backward()
    assert leaf.grad is not None and watched.grad is not None
    assert torch.equal(leaf.grad, watched.grad)
    q = 1 / (1 + math.exp(10))
    assert watched.grad[0, 0].item() == pytest.approx(-q * 32, rel=1e-2)


@pytest.mark.parametrize("recompute", (False, True))
def test_an_infinite_logit_takes_all_of_the_probability(backend, recompute):
    x = torch.tensor([[math.inf, 0.0, 1.0], [0.0, math.inf, 1.0]], device=DEVICE)
    leaf, y = x.requires_grad_(), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    _, stats = class_balanced_loss(
        leaf, y, return_stats=True, recompute=recompute, backend=backend.argument
    )
    assert stats.probability[0].item() == 0.5  # 1 and 0
    assert stats.gradient[0].item() == 0.5  # 0 and 1, of two rows


@pytest.mark.parametrize("smoothing", (0.0, 0.1), ids="s{}".format)
@FAMILY
def test_statistics_are_the_same_however_the_gradient_is_computed(backend, family, smoothing):
    logits, target, weight, sample_weight = sample(10, torch.float64)
    options = {
        "activation": family, "gamma": 0.5, "label_smoothing": smoothing, "logit_bias": weight,
        "margin": weight / 2, "logit_scale": 1.5, "sample_weight": sample_weight,
        "backend": backend.argument,
    }  # fmt: skip
    leaf = logits.clone().requires_grad_()
    results = [
        class_balanced_loss(x, target, weight, return_stats=True, recompute=recompute, **options)
        for x, recompute in ((leaf, False), (leaf, True), (logits, None))
    ]
    for _, stats in results:
        assert [each.dtype for each in stats] == [torch.int64] + 3 * [torch.float64]
    for loss, stats in results[1:]:
        torch.testing.assert_close((loss, *stats), (results[0][0], *results[0][1]), equal_nan=True)


@pytest.mark.parametrize("options", (
    {"reduction": "none"}, {"backend": "reference"},
    {"target": torch.ones(3, 4)},
), ids=str)  # fmt: skip
def test_stats_refuse(options):
    arguments = {"input": torch.zeros(3, 4), "target": torch.tensor([0, 1, 2])} | options
    with pytest.raises(ValueError, match="return_stats"):
        class_balanced_loss(**arguments, return_stats=True)


def test_return_stats_is_a_bool():
    wrong: Any
    for wrong in ("yes", "", None, [], 2, 0.5, torch.ones(3)):
        with pytest.raises(TypeError, match="return_stats must be True or False, got"):
            class_balanced_loss(torch.zeros(3, 4), torch.tensor([0, 1, 2]), return_stats=wrong)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@FAMILY
def test_compile(backend, family):
    if backend.fallback:
        pytest.skip("Python in an operator's place cannot be traced")
    torch._dynamo.reset()
    logits, target, weight, _ = sample(10, torch.float32)
    options = {"activation": family, "return_stats": True, "backend": backend.argument}

    def loss_and_stats(x):
        return class_balanced_loss(x, target, weight, **options)

    compiled = torch.compile(loss_and_stats, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss_and_stats, compiled):
        leaf = logits.clone().requires_grad_()
        loss, stats = function(leaf)
        loss.backward()
        results.append((loss.detach(), leaf.grad, *stats))
    torch.testing.assert_close(*results, equal_nan=True)
