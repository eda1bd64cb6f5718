"""The reference itself: its two implementations against each other, its derivatives, torch.func."""

from __future__ import annotations

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.marks import FAMILIES, GAMMAS, IGNORED, REDUCTIONS
from support.oracle import mark, option_sets, sample, soft_targets
from support.tolerances import assert_grad, assert_loss
from torch.autograd import gradcheck, gradgradcheck

from cbloss_fused import class_balanced_loss, reference
from cbloss_fused.inputs import Inputs, is_soft
from cbloss_fused.options import Formula, Options

FAMILY = pytest.mark.parametrize("family", FAMILIES)
FOCAL = pytest.mark.parametrize("gamma", GAMMAS, ids="g{}".format)
SMOOTHING = pytest.mark.parametrize("eps", (0.0, 0.1), ids="s{}".format)


@st.composite
def problems(draw):
    """Logits, their inputs and the options of a loss, in any combination that has a meaning."""
    N, C = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    rest = tuple(draw(st.lists(st.integers(1, 4), max_size=2)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = draw(st.sampled_from((1e-3, 1.0, 10.0, 300.0)))
    logits = size * torch.randn(N, C, *rest, generator=g, dtype=torch.float64)

    def vector(shape):
        return torch.rand(shape, generator=g, dtype=torch.float64) if draw(st.booleans()) else None

    rows = (N, *rest)
    options = draw(option_sets())
    normalizer = None
    if options["reduction"] == "mean" and draw(st.booleans()):
        normalizer = torch.tensor(3.0)
    options["ignore_index"] = draw(st.sampled_from((None, -100, 0)))
    target, margin, pos_weight = torch.randint(C, rows, generator=g), vector(C), None
    sigmoid = options["activation"] == "sigmoid"
    if draw(st.booleans()):
        target, margin, options["ignore_index"] = soft_targets(draw, logits, g), None, None
        if not sigmoid:
            options["gamma"] = 0.0
    if sigmoid:
        mark(draw, options, target, C)
        pos_weight = vector(C)
    inputs = Inputs(target, vector(C), vector(rows), normalizer, vector(C), margin, pos_weight)
    return logits, inputs, options


@given(problems())
@settings(max_examples=400)
def test_explicit_gradient_is_autograd_of_the_loss(problem):
    logits, inputs, options = problem
    leaf = logits.clone().requires_grad_()
    marks = options.pop("ignore_index"), options.pop("background_index", None)
    reduction = options.pop("reduction")
    f = Formula.of(Options(**options))
    want = reference.eager_loss(leaf, inputs, f, *marks, reduction)
    (g,) = torch.autograd.grad(want.sum(), leaf)
    losses, grad, s, r = reference.loss_and_grad(logits, inputs, f, *marks, reduction)
    loss = losses if reduction == "none" else losses.sum()
    assert_loss(loss, want.detach(), torch.float64, logits.shape[1])
    # t and p may cancel: what is left is relative to them.
    slack = (
        1e-14 * options["logit_scale"] * (max(s.max(), r.max()) if is_soft(inputs.target) else 0)
    )
    assert_grad(grad, g, torch.float64, slack=slack)

    incoming = torch.tensor(-2.5, dtype=torch.float64)
    again = reference.gradient(logits, inputs, s, r, incoming, f, *marks)
    assert_grad(again, -2.5 * g, torch.float64, slack=3 * slack)
    incoming = torch.linspace(-1, 2, r.numel(), dtype=torch.float64).reshape(r.shape)
    again = reference.gradient(logits, inputs, s, r, incoming, f, *marks)
    assert_grad(again, incoming.unsqueeze(1) * g, torch.float64, slack=3 * slack)


@SMOOTHING
@FOCAL
@FAMILY
def test_against_forty_digits(family, gamma, eps):
    """The formulas of the paper, written down once more and evaluated with mpmath."""
    z = [[0.5, -1.0, 2.0], [40.0, 1.0, 0.25], [-60.0, 3.0, 90.0], [300.0, -300.0, 0.0]]
    target = [2, 0, 0, 1]
    with mpmath.workdps(400):
        want = [exact(family, gamma, eps, row, y) for row, y in zip(z, target, strict=True)]
    loss = reference.loss(
        torch.tensor(z, dtype=torch.float64), torch.tensor(target),
        activation=family, gamma=gamma, label_smoothing=eps, reduction="none",
    )  # fmt: skip
    assert_loss(loss, torch.tensor(want, dtype=torch.float64), torch.float64)


def exact(family, gamma, eps, row, y):
    z, C = [mpmath.mpf(v) for v in row], len(row)
    t = [(1 - mpmath.mpf(eps)) * (j == y) + mpmath.mpf(eps) / C for j in range(C)]
    if family == "softmax":
        e = [mpmath.exp(v) for v in z]
        q, lse = (sum(e) - e[y]) / sum(e), mpmath.log(sum(e))
        hard = (1 - mpmath.mpf(eps)) * q**gamma * (lse - z[y])
        return float(hard + mpmath.mpf(eps) / C * sum(lse - v for v in z))

    def element(s):
        p = 1 / (1 + mpmath.exp(-s))
        return (1 - p) ** gamma * -mpmath.log(p) if p < 1 else mpmath.mpf(0)

    return float(
        sum(t_j * element(v) + (1 - t_j) * element(-v) for t_j, v in zip(t, z, strict=True))
    )


# Derivatives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@SMOOTHING
@FOCAL
@FAMILY
def test_first_and_second_derivatives(family, gamma, eps, reduction):
    logits, target, weight, sample_weight = sample(4, torch.float64)
    rows = slice(14, 18)
    target = target[rows].clone()
    target[1] = IGNORED

    def loss(x):
        return class_balanced_loss(
            x, target, weight, sample_weight=sample_weight[rows], activation=family, gamma=gamma,
            label_smoothing=eps, reduction=reduction, backend="reference",
        )  # fmt: skip

    x = logits[rows].clamp(-6, 6).requires_grad_()
    assert gradcheck(loss, x)
    assert gradgradcheck(loss, x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch.func.jvp's own
@FOCAL
@FAMILY
def test_func_grad_and_vmap(family, gamma):
    logits, target, weight, _ = sample(10, torch.float64)
    target = target.clamp(min=0)

    def row_loss(x, y):
        return class_balanced_loss(
            x, y, weight, activation=family, gamma=gamma, reduction="sum", backend="reference"
        )

    leaf = logits.clone().requires_grad_()
    options = {"activation": family, "gamma": gamma, "reduction": "none"}
    losses = class_balanced_loss(leaf, target, weight, **options)
    losses.sum().backward()
    assert leaf.grad is not None
    assert_grad(torch.func.grad(row_loss)(logits, target), leaf.grad, torch.float64)
    per_sample = torch.func.vmap(torch.func.grad(row_loss))(logits, target)
    assert_grad(per_sample, leaf.grad, torch.float64)
    assert_loss(torch.func.vmap(row_loss)(logits, target), losses.detach(), torch.float64)
    ones = (torch.ones_like(logits),)
    tangent = torch.func.jvp(lambda x: row_loss(x, target), (logits,), ones)[1]
    assert tangent.item() == pytest.approx(leaf.grad.sum().item(), abs=1e-10)


@pytest.mark.parametrize("transform", (torch.func.grad, torch.func.vmap, torch.func.jacrev))
def test_func_of_the_kernels_says_what_to_do(transform):
    def loss(x):
        return class_balanced_loss(x, torch.tensor(1))

    x = torch.zeros(2, 3) if transform is torch.func.vmap else torch.zeros(3)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        transform(loss)(x)
