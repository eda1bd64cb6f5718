"""Saturated, huge, nearly certain and infinite logits: exact, never a NaN without a NaN."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from support.backends import DEVICE, long_if_interpreted, loss_and_grad
from support.marks import DTYPES, FAMILIES, GAMMAS, name_of
from support.oracle import oracle
from support.tolerances import EXACT, assert_grad, assert_loss

CLASSES = (1, 2, 10, 1000, 8142)
MAGNITUDES = (0.5, 6.25, 8.5, 11.1, 17.0, 20.0, 44.0, 88.75, 104.0, 1e3, 1e4, 65504.0)
FOCAL = pytest.mark.parametrize("gamma", GAMMAS, ids="g{}".format)
FAMILY = pytest.mark.parametrize("family", FAMILIES)
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


def bound(dtype: torch.dtype, C: int) -> float:
    """The largest |z| of the finite contract, for weights of 1."""
    return 65504.0 if dtype == torch.float16 else 0.99e37 / C


@cache
def saturated(C: int, dtype: torch.dtype, beyond: bool = False):
    """Rows of every pattern at every magnitude: right, wrong, alternating, one rival, all alike."""
    magnitudes: tuple[float, ...] = MAGNITUDES
    if dtype != torch.float16:
        magnitudes = (*MAGNITUDES, 1e30, bound(dtype, C))
    if C > 1000:
        magnitudes = magnitudes[-1::-4]
    if beyond:
        largest = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).max
        magnitudes = (1e37, 1e38, largest)
    y, sign = C // 2, 1 - 2 * (torch.arange(C) % 2)
    at_y = (torch.arange(C) == y).double()
    rival = (torch.arange(C) == C - 1).double() - at_y
    one = torch.ones(C)
    patterns = [2 * at_y - 1, 1 - 2 * at_y, sign, -sign, at_y, -at_y, rival, one, -one]
    rows = torch.stack([m * p.double() for m in magnitudes for p in patterns])
    return rows.to(dtype), torch.full((len(rows),), y)


@cache
def expected(family, gamma, eps, dtype, C):
    logits, target = saturated(C, dtype)
    options = {"activation": family, "gamma": gamma, "label_smoothing": eps}
    return oracle(logits, target, **options, reduction="none")


@long_if_interpreted
@pytest.mark.parametrize("C", CLASSES, ids="C{}".format)
@FOCAL
@DTYPE
@FAMILY
def test_exact_up_to_the_bound(backend, family, dtype, gamma, C):
    logits, target = saturated(C, dtype)
    for eps in (0.0, 0.1) if C < 8142 else (0.0,):
        want = expected(family, gamma, eps, dtype, C)
        assert want[0].isfinite().all()
        assert want[1].isfinite().all()
        options = {"activation": family, "gamma": gamma, "label_smoothing": eps}
        for reduction in ("none", "sum"):  # recomputed and stored
            loss, grad = loss_and_grad(
                backend, logits, target, **options, reduction=reduction, recompute=False
            )
            if reduction == "none":
                assert_loss(loss, want[0], dtype, C, smoothing=eps)
            assert_grad(grad, want[1], dtype, smoothing=eps, reduction=reduction)


@pytest.mark.parametrize("eps", (0.0, 0.1), ids="s{}".format)
@pytest.mark.parametrize("C", CLASSES, ids="C{}".format)
@FOCAL
@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=name_of)
@FAMILY
def test_beyond_the_bound_never_nan(backend, family, dtype, gamma, C, eps):
    logits, target = saturated(C, dtype, beyond=True)
    options = {"activation": family, "gamma": gamma, "label_smoothing": eps}
    for reduction in ("none", "sum", "mean"):
        loss, grad = loss_and_grad(backend, logits, target, **options, reduction=reduction)
        assert not loss.isnan().any()
        assert (loss >= 0).all()
        assert grad.isfinite().all()
        loss, grad = loss_and_grad(
            backend, logits, target, torch.zeros(C), **options, reduction=reduction
        )
        assert (loss == 0).all()  # not 0 * inf
        assert (grad == 0).all()


# Near certainty -----------------------------------------------------------------------------------


@cache
@pytest.mark.parametrize("gamma", (1e38, 3.4e38, 1e39, 1e300), ids="g{:g}".format)
@pytest.mark.parametrize("C", (5, 131), ids="C{}".format)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name_of)
@FAMILY
def test_the_largest_focal_exponents(backend, family, dtype, C, gamma):
    """Beyond float32's largest number there is no larger power."""
    logits, target = saturated(C, dtype)
    loss, grad = loss_and_grad(backend, logits, target, activation=family, gamma=gamma)
    assert loss.isfinite()
    assert grad.isfinite().all()


def exact_loss(family: str, gamma: float, margin: int, C: int) -> float:
    """A row whose target is `margin` above the others (softmax), above and below 0 (sigmoid)."""
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(250):
        if family == "softmax":
            p = 1 / (1 + (C - 1) * mpmath.exp(-margin))
            return float((1 - p) ** gamma * -mpmath.log(p))
        s = 1 / (1 + mpmath.exp(-margin))
        return float(C * (1 - s) ** gamma * -mpmath.log(s))


@pytest.mark.parametrize("C", (2, 10, 1000), ids="C{}".format)
@FOCAL
@DTYPE
@FAMILY
def test_near_certainty(backend, family, dtype, gamma, C):
    """Relative accuracy down to 1e-30 (float64: 1e-200); whole margins, exact in every type."""
    smallest, step = (1e-200, 10) if dtype == torch.float64 else (1e-30, 1)
    margins = [m for m in range(1, 451, step) if exact_loss(family, gamma, m, C) > smallest]
    assert len(margins) >= 8
    rows = torch.tensor(margins, dtype=torch.float64).unsqueeze(1)
    at_y = torch.arange(C) == 1
    logits = (rows * at_y if family == "softmax" else rows * (2.0 * at_y - 1)).to(dtype)
    target = torch.ones(len(margins), dtype=torch.int64)
    options = {"activation": family, "gamma": gamma, "reduction": "none"}
    loss, grad = loss_and_grad(backend, logits, target, **options)
    want = torch.tensor([exact_loss(family, gamma, m, C) for m in margins], dtype=torch.float64)
    assert_loss(loss, want, dtype)
    assert ((loss.double() - want).abs() <= EXACT[dtype != torch.float64] * want).all()
    assert_grad(grad, oracle(logits, target, **options)[1], dtype)


@pytest.mark.parametrize("offset", (1e4, -(2.0**19), 2.0**21), ids=str)
@pytest.mark.parametrize("C", (3, 300), ids="C{}".format)
@pytest.mark.parametrize("gamma", (0.0, 0.5), ids="g{}".format)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=name_of)
def test_small_differences_of_large_logits(backend, dtype, gamma, C, offset):
    """2^(z log2 e - M log2 e) would round M log2 e to the next 1/1024, 1/16 or 1/4."""
    logits = (offset + torch.arange(5 * C).reshape(5, C) % 41 / 4).to(dtype)
    target = torch.arange(5) % C
    for options in ({"gamma": gamma}, {"label_smoothing": 0.1}):
        loss, grad = loss_and_grad(backend, logits, target, **options, reduction="none")
        want = oracle(logits, target, **options, reduction="none")
        assert_loss(loss, want[0], dtype)
        assert_grad(grad, want[1], dtype)


# Where other implementations give NaN -------------------------------------------------------------

SATURATION = (6.0, 6.25, 8.5, 17.0, 18.42, 40.0, 100.0)


def check(backend, z, target, dtype, **options):
    """One row against float64, finite, stored and recomputed."""
    logits = torch.tensor([z], dtype=dtype)
    y = torch.tensor([target])
    want = oracle(logits, y, **options, reduction="sum")
    for recompute in (False, True):
        loss, grad = loss_and_grad(
            backend, logits, y, **options, reduction="sum", recompute=recompute
        )
        assert_loss(loss, want[0], dtype)
        assert_grad(grad, want[1], dtype)


@pytest.mark.parametrize("z", SATURATION, ids="z{}".format)
@pytest.mark.parametrize("gamma", (0.1, 0.5, 0.9), ids="g{}".format)
@DTYPE
@FAMILY
def test_focal_exponent_below_1_where_p_is_1(backend, family, dtype, gamma, z):
    """(1 - p)^gamma differentiated as a power: infinity times 0 where 1 - p rounds to 0."""
    check(backend, [z, -z, -z], 0, dtype, activation=family, gamma=gamma)
    check(backend, [z, -z, -z], 1, dtype, activation=family, gamma=gamma)


@pytest.mark.parametrize("z", (-11.09, -11.2, -88.75, -89.0, -104.0), ids="z{}".format)
@pytest.mark.parametrize("target", (0, 1), ids=("positive", "negative"))
@FOCAL
@DTYPE
def test_exp_of_minus_z_overflows(backend, dtype, gamma, target, z):
    """exp(-γ t z - γ log1p(exp(-z))): infinite below -88.75, in float16 below -11.09."""
    check(backend, [z, 0.0], target, dtype, activation="sigmoid", gamma=gamma)


def test_float16_positive_at_minus_20(backend):
    """A clamped probability has no gradient there, a power of it gives NaN."""
    check(backend, [-20.0, -30.0], 0, torch.float16, activation="sigmoid", gamma=2.0)


# Infinite logits and NaN --------------------------------------------------------------------------

Y, OTHER, inf, nan = 1, 2, float("inf"), float("nan")  # the target's class, another one


def on_infinite(function):
    for mark in (
        pytest.mark.parametrize("C", (3, 131), ids="C{}".format),  # vectors of rows, of classes
        pytest.mark.parametrize("gamma", (0.0, 0.1, 0.5), ids="g{}".format),
        DTYPE,
    ):
        function = mark(function)
    return function


def special_row(backend, C, dtype, changes, ignored=False, **options):
    """A row with some logits changed, among others that it must not touch."""
    logits = torch.linspace(-2, 2, 5 * C, dtype=torch.float64).reshape(5, C).to(dtype)
    target = torch.full((5,), Y)
    weight = torch.full((C,), 2.0)
    others = torch.arange(5) != 2
    plain = loss_and_grad(backend, logits, target, weight, reduction="none", **options)
    logits[2] = logits[2].sin()
    for j, value in changes.items():
        logits[2, j] = value
    if ignored:
        target[2] = -100
    loss, grad = loss_and_grad(backend, logits, target, weight, reduction="none", **options)
    assert torch.equal(loss[others], plain[0][others])
    assert torch.equal(grad[others], plain[1][others])
    total, stored = loss_and_grad(
        backend, logits, target, weight, reduction="sum", recompute=False, **options
    )
    torch.testing.assert_close(stored[2], grad[2], rtol=0.01, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(total, loss.sum(), rtol=1e-4, atol=0.0, equal_nan=True)
    return logits[2:3], loss[2:3], grad[2:3]


def without(j, z, target=Y, **options):
    """Oracle of a row from which class j is absent; its gradient there is 0."""
    there = torch.arange(z.shape[1]) != j
    y = torch.tensor([target - (target > j)])
    weight = torch.full((z.shape[1] - 1,), 2.0)
    loss, g = oracle(z[:, there], y, weight, reduction="none", **options)
    grad = torch.zeros_like(z, dtype=torch.float64)
    grad[:, there] = g
    return loss, grad


@FAMILY
@on_infinite
def test_minus_infinity_masks_a_class(backend, family, dtype, gamma, C):
    options = {"activation": family, "gamma": gamma}
    z, loss, grad = special_row(backend, C, dtype, {0: -inf}, **options)
    want = without(0, z, **options)
    assert_loss(loss, want[0], dtype)
    assert_grad(grad, want[1], dtype)
    assert grad[0, 0] == 0
    _, loss, grad = special_row(backend, C, dtype, {0: -inf}, **options, label_smoothing=0.1)
    assert loss == inf
    assert grad.isfinite().all()


@FAMILY
@on_infinite
def test_target_at_minus_infinity(backend, family, dtype, gamma, C):
    options = {"activation": family, "gamma": gamma}
    _, loss, grad = special_row(backend, C, dtype, {Y: -inf}, **options)
    _, _, far = special_row(backend, C, dtype, {Y: -3e4}, **options)
    assert loss == inf
    assert grad[0, Y] == -2
    torch.testing.assert_close(grad, far, rtol=1e-3, atol=0.0)


@on_infinite
def test_softmax_plus_infinity_takes_all(backend, dtype, gamma, C):
    _, loss, grad = special_row(backend, C, dtype, {OTHER: inf}, gamma=gamma)
    assert loss == inf
    assert (grad[0, OTHER], grad[0, Y], grad.abs().sum()) == (2, -2, 4)
    _, loss, grad = special_row(backend, C, dtype, {Y: inf}, gamma=gamma)
    assert loss == 0
    assert (grad == 0).all()
    for second in (0, Y):
        _, loss, grad = special_row(backend, C, dtype, {OTHER: inf, second: inf}, gamma=gamma)
        assert loss.isnan().all()
        assert grad.isnan().any()


@pytest.mark.parametrize("soft", (False, True), ids=("index", "soft"))
@pytest.mark.parametrize("recompute", (False, True), ids=("stored", "recompute"))
@pytest.mark.parametrize("C", (3, 131), ids="C{}".format)
def test_z_loss_of_plus_infinity(backend, C, recompute, soft):
    """Its limit is infinite, also where the class is right; the gradient is bounded."""
    logits = torch.zeros(2, C)
    logits[:, 0] = inf
    target = torch.tensor([0, 1])
    if soft:
        target = torch.nn.functional.one_hot(target, C).float()
    options = {"z_loss": 0.01, "reduction": "sum", "recompute": recompute}
    loss, grad = loss_and_grad(backend, logits, target, **options)
    assert loss == inf
    assert grad.isfinite().all()
    assert (grad[:, 0] > 1e36).all()
    assert grad[:, 1].tolist() == [0, -1]
    assert (grad[:, 2:] == 0).all()


@on_infinite
def test_sigmoid_plus_infinity(backend, dtype, gamma, C):
    options = {"activation": "sigmoid", "gamma": gamma}
    z, loss, grad = special_row(backend, C, dtype, {0: inf}, **options)
    want = without(0, z, **options)[1]
    want[0, 0] = 2
    assert loss == inf
    assert_grad(grad, want, dtype)
    z, loss, grad = special_row(backend, C, dtype, {Y: inf}, **options)
    assert loss.isfinite()
    assert grad[0, Y] == 0


@pytest.mark.parametrize("eps", (0.0, 0.1), ids="s{}".format)
@pytest.mark.parametrize("where", (Y, OTHER), ids=("target", "other"))
@FAMILY
@on_infinite
def test_nan_stays_in_its_row(backend, family, dtype, gamma, C, where, eps):
    options = {"activation": family, "gamma": gamma, "label_smoothing": eps}
    for rest in ({}, {0: inf}, {0: -inf}):
        _, loss, grad = special_row(backend, C, dtype, {**rest, where: nan}, **options)
        assert loss.isnan().all()
        assert grad[0, where].isnan()


@pytest.mark.parametrize("value", (nan, inf, -inf), ids=str)
@pytest.mark.parametrize("eps", (0.0, 0.1), ids="s{}".format)
@FAMILY
@on_infinite
def test_rows_of_nothing_else(backend, family, dtype, gamma, C, value, eps):
    """Ignored: exactly 0 whatever they hold. Else they must not touch another row, and NaN where
    there is no limit."""
    options = {"activation": family, "gamma": gamma, "label_smoothing": eps}
    changes = dict.fromkeys(range(C), value)
    _, loss, grad = special_row(backend, C, dtype, changes, **options)
    if family == "softmax":
        assert loss.isnan().all()
        assert grad.isnan().all()
    _, loss, grad = special_row(backend, C, dtype, changes, ignored=True, **options)
    assert loss == 0
    assert (grad == 0).all()


def test_a_rounded_z_to_a_large_power(backend):
    """z of scale and bias is rounded: p is off by 1e-7 |z|, (1 - p)^gamma (-log p) by 1 + gamma as
    much."""
    x = torch.tensor([[13.6875, -2.96875, -18.5, 4.3125, -6.40625, 3.234375, 1.765625, 12.5]])
    bias = torch.tensor([0.5731, 0.9973, 1.0495, 0.5277, 0.6405, 0.9076, 0.9631, 0.9149])
    logits, target = x.bfloat16().to(DEVICE), torch.tensor([0], device=DEVICE)
    options: dict[str, Any] = {"gamma": 5.0, "logit_scale": 3.0, "logit_bias": bias.to(DEVICE)}
    loss, grad = loss_and_grad(backend, logits, target, **options)
    want, want_grad = oracle(logits, target, **options)
    relative = 6 * 1.2e-7 * 3 * 20
    assert_loss(loss, want, torch.bfloat16, slack=relative * want.abs())
    assert_grad(grad, want_grad, torch.bfloat16, slack=relative * want_grad.abs().max())
