"""Every backend against the eager formula in float64, and that against torch and the paper."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.backends import BACKENDS, DEVICE, INTERPRETED, Backend, loss_and_grad
from support.marks import DTYPES, FAMILIES, GAMMAS, IGNORED, REDUCTIONS, name_of
from support.oracle import mark, option_sets, oracle, sample, soft_targets
from support.tolerances import assert_grad, assert_loss

from cbloss_fused import class_balanced_loss

# 1 to 65: vectors of rows; 131 on: vectors of classes; 8142: rows not aligned
CLASSES = (1, 2, 10, 63, 64, 65, 131, 1000, 8142)
SMOOTHING = pytest.mark.parametrize("eps", (0.0, 0.1), ids="s{}".format)
FOCAL = pytest.mark.parametrize("gamma", GAMMAS, ids="g{}".format)
FAMILY = pytest.mark.parametrize("family", FAMILIES)
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


@cache
def expected(family, gamma, eps, dtype, C, reduction="mean"):
    logits, target, weight, sample_weight = sample(C, dtype)
    return oracle(
        logits,
        target,
        weight,
        sample_weight=sample_weight,
        activation=family,
        gamma=gamma,
        label_smoothing=eps,
        reduction=reduction,
    )


@SMOOTHING
@pytest.mark.parametrize("C", CLASSES, ids="C{}".format)
@FOCAL
@DTYPE
@FAMILY
def test_oracle(backend, family, dtype, gamma, C, eps):
    logits, target, weight, sample_weight = sample(C, dtype)
    want = expected(family, gamma, eps, dtype, C)
    # Near its optimum a smoothed row's terms cancel: what is left of their rounding is not small
    # beside the gradient.
    slack = 0 if dtype == torch.float64 else 1e-8 * eps
    for recompute in (False, True):
        loss, grad = loss_and_grad(
            backend,
            logits,
            target,
            weight,
            sample_weight=sample_weight,
            activation=family,
            gamma=gamma,
            label_smoothing=eps,
            recompute=recompute,
        )
        assert_loss(loss, want[0], dtype, recompute=recompute)
        assert_grad(grad, want[1], dtype, slack=slack, recompute=recompute)


@SMOOTHING
@pytest.mark.parametrize("C", (1, 2, 10, 65, 131, 1000, 8142, 20_000), ids="C{}".format)
@pytest.mark.parametrize("gamma", (0.0, 0.5), ids="g{}".format)
@DTYPE
def test_z_loss(backend, dtype, gamma, C, eps):
    logits, target, weight, sample_weight = sample(C, dtype)
    logits = logits + 3  # the log-sum-exp is far from 0
    options = {"gamma": gamma, "label_smoothing": eps, "z_loss": 0.01, "reduction": "none"}
    want = oracle(logits, target, weight, sample_weight=sample_weight, **options)
    for recompute in (False, True):
        loss, grad = loss_and_grad(
            backend, logits, target, weight, sample_weight=sample_weight,
            **options | {"reduction": "sum" if recompute else "none"}, recompute=recompute,
        )  # fmt: skip
        assert_loss(loss, want[0].sum() if recompute else want[0], dtype)
        assert_grad(grad, want[1], dtype)


@given(data=st.data())
@settings(
    max_examples=12 if INTERPRETED else 40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@DTYPE
def test_every_combination_of_options(backend, dtype, data):
    """That has a meaning: all that option_sets draws, with vectors or without."""
    C = data.draw(st.sampled_from((1, 2, 10, 131, 1000)))
    options = data.draw(option_sets())
    logits, target, weight, sample_weight = sample(C, dtype, data.draw(st.integers(0, 9)))
    vectors = {"logit_bias": weight - 1, "margin": weight / 2, "sample_weight": sample_weight}
    soft = data.draw(st.booleans())
    if soft:
        generator = torch.Generator(DEVICE).manual_seed(C)
        target = soft_targets(data.draw, logits, generator)
        del vectors["margin"]
        if options["activation"] == "softmax":
            options["gamma"] = 0.0
    if options["activation"] == "sigmoid":
        target, vectors["pos_weight"] = target.clone(), 2 * weight
        mark(data.draw, options, target, C)
    options |= {name: v for name, v in vectors.items() if data.draw(st.booleans())}
    weight = data.draw(st.sampled_from((None, weight)))
    want = oracle(logits, target, weight, **options)
    f64 = dtype == torch.float64
    cancelling = 1.0 if options["label_smoothing"] else 0.0  # t and (sum of t) p may cancel
    if soft:
        cancelling = max(1.0, target.double().clamp(min=0).sum(1).max().item())
    slack = (1e-14 if f64 else 4e-7) * cancelling
    if options.get("clip") and not f64:  # p is within 1e-7 where it is clipped
        slack = 1e-6
    recompute = data.draw(st.booleans())
    loss, grad = loss_and_grad(backend, logits, target, weight, recompute=recompute, **options)
    assert_loss(loss, want[0], dtype, C, slack=slack)
    assert_grad(grad, want[1], dtype, slack=slack)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("C", (10, 1000), ids="C{}".format)
@pytest.mark.parametrize("gamma", (0.0, 0.5), ids="g{}".format)
@DTYPE
@FAMILY
def test_reductions_row_by_row(backend, family, dtype, gamma, C, reduction):
    logits, target, weight, sample_weight = sample(C, dtype)
    want = expected(family, gamma, 0.0, dtype, C, reduction)
    loss, grad = loss_and_grad(
        backend,
        logits,
        target,
        weight,
        sample_weight=sample_weight,
        activation=family,
        gamma=gamma,
        reduction=reduction,
    )
    assert_loss(loss, want[0], dtype)
    assert_grad(grad, want[1], dtype)


@pytest.mark.parametrize("given", ("nothing", "weight", "sample_weight", "both"))
@pytest.mark.parametrize("reduction", REDUCTIONS)
@FAMILY
def test_weights_are_optional(backend, family, reduction, given):
    logits, target, weight, sample_weight = sample(10, torch.float64)
    w = weight if given in ("weight", "both") else None
    s = sample_weight if given in ("sample_weight", "both") else None
    options = {"sample_weight": s, "activation": family, "gamma": 1.0, "reduction": reduction}
    loss, grad = loss_and_grad(backend, logits, target, w, **options)
    want = oracle(logits, target, w, **options)
    assert_loss(loss, want[0], logits.dtype)
    assert_grad(grad, want[1], logits.dtype)


@pytest.mark.parametrize("form", (float, torch.tensor), ids=("float", "tensor"))
@FAMILY
def test_normalizer_replaces_the_denominator(backend, family, form):
    logits, target, weight, _ = sample(10, torch.float64)
    loss, grad = loss_and_grad(
        backend, logits, target, weight, activation=family, normalizer=form(7.0)
    )
    want = oracle(logits, target, weight, activation=family, reduction="sum")
    assert_loss(loss, want[0] / 7, logits.dtype)
    assert_grad(grad, want[1] / 7, logits.dtype)


@pytest.mark.parametrize("soft", (False, True), ids=("index", "soft"))
@pytest.mark.parametrize("C", (10, 300), ids="C{}".format)
@FAMILY
def test_a_normalizer_of_zero_has_nothing_to_average(backend, family, C, soft):
    """An int, as a count of positives is."""
    logits, target, weight, _ = sample(C, torch.float32)
    if soft:
        target = torch.full(logits.shape, 0.25)
    for recompute in (False, True):
        loss, grad = loss_and_grad(
            backend, logits, target, weight, activation=family, normalizer=torch.tensor(0),
            recompute=recompute,
        )  # fmt: skip
        assert loss == 0
        assert (grad == 0).all()
    eager = loss_and_grad(
        Backend("reference"), logits, target, weight, activation=family, normalizer=torch.tensor(0)
    )
    assert eager[0] == 0
    assert (eager[1] == 0).all()


@pytest.mark.parametrize("ignore_index", (None, -1, 3, 10**9), ids=str)
@FAMILY
def test_ignore_index(backend, family, ignore_index):
    logits, target, weight, _ = sample(10, torch.float64)
    target = target.where(target != IGNORED, 4 if ignore_index is None else ignore_index)
    loss, grad = loss_and_grad(
        backend, logits, target, weight, activation=family, ignore_index=ignore_index
    )
    keep = target != (-1 if ignore_index is None else ignore_index)
    want = oracle(logits[keep], target[keep], weight, activation=family, ignore_index=None)
    assert_loss(loss, want[0], logits.dtype)
    assert_grad(grad[keep], want[1], logits.dtype)
    assert (grad[~keep] == 0).all()


@pytest.mark.parametrize("options", ({}, {"recompute": True}), ids=("loss", "recompute"))
@pytest.mark.parametrize("C", (10, 1000), ids="C{}".format)
@FOCAL
@DTYPE
@FAMILY
def test_loss_without_gradient_is_the_same(backend, family, dtype, gamma, C, options):
    logits, target, weight, _ = sample(C, dtype)
    options = {"activation": family, "gamma": gamma, "backend": backend.argument, **options}
    alone = class_balanced_loss(logits, target, weight, **options)
    assert not alone.requires_grad
    together = class_balanced_loss(logits.clone().requires_grad_(), target, weight, **options)
    assert_loss(alone, together.detach().double(), dtype)


# Parity -------------------------------------------------------------------------------------------

ANYWHERE = pytest.mark.parametrize("C", (2, 10, 131, 1000), ids="C{}".format)


def with_autograd(function, logits):
    leaf = logits.clone().requires_grad_()
    loss = function(leaf)
    loss.sum().backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("weighted", (False, True), ids=("plain", "weighted"))
@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
@ANYWHERE
def test_cross_entropy(backend, C, reduction, weighted):
    logits, target, weight, _ = sample(C, torch.float64)
    w = weight.double() if weighted else None
    want = with_autograd(
        lambda x: F.cross_entropy(x, target, w, ignore_index=IGNORED, reduction=reduction), logits
    )
    ours = "weighted_mean" if reduction == "mean" else reduction
    loss, grad = loss_and_grad(backend, logits, target, w, reduction=ours)
    torch.testing.assert_close(loss, want[0], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(grad, want[1], rtol=1e-12, atol=1e-15)


@ANYWHERE
def test_cross_entropy_with_label_smoothing(backend, C):
    logits, target, _, _ = sample(C, torch.float64)
    want = with_autograd(lambda x: F.cross_entropy(x, target, label_smoothing=0.1), logits)
    loss, grad = loss_and_grad(backend, logits, target, label_smoothing=0.1)
    torch.testing.assert_close(loss, want[0], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(grad, want[1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("eps", (0.0, 0.1), ids="s{}".format)
@ANYWHERE
def test_binary_cross_entropy_on_one_hot_times_row_weight(backend, C, eps):
    logits, target, weight, _ = sample(C, torch.float64)
    logits, target, w = logits[2:], target[2:], weight.double()
    t = F.one_hot(target, C).double() * (1 - eps) + eps / C

    def bce(x):
        rows = F.binary_cross_entropy_with_logits(x, t, reduction="none").sum(1)
        return (w[target] * rows).sum() / len(target)

    want = with_autograd(bce, logits)
    loss, grad = loss_and_grad(
        backend, logits, target, w, activation="sigmoid", label_smoothing=eps
    )
    torch.testing.assert_close(loss, want[0], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(grad, want[1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("gamma", (0.5, 1.0, 2.0), ids="g{}".format)
@ANYWHERE
def test_focal_loss_of_the_paper(backend, C, gamma):
    """The published code: modulator exp(-γ t z - γ log(1 + e^-z)), here where it is stable."""
    np = pytest.importorskip("numpy")
    logits, target, weight, _ = sample(C, torch.float64)
    logits, target = logits[2:].clamp(-30, 30), target[2:]
    z, t = logits.cpu().numpy(), np.eye(C)[target.cpu().numpy()]
    bce = np.maximum(z, 0) - z * t + np.log1p(np.exp(-np.abs(z)))
    modulator = np.exp(-gamma * t * z - gamma * np.log1p(np.exp(-z)))
    w = weight.double().cpu().numpy()[target.cpu().numpy()]
    want = (w[:, None] * modulator * bce).sum() / t.sum()
    loss, _ = loss_and_grad(backend, logits, target, weight, activation="sigmoid", gamma=gamma)
    assert loss.item() == pytest.approx(want, rel=1e-11)


def test_there_are_kernels_to_test():
    """Where the extension was built, the parametrisation holds its variants."""
    assert {"fallback", "triton"} & BACKENDS.keys()
