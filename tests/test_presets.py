"""Losses that people train with, by the formulas of their papers and by their packages."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.backends import DEVICE, loss_and_grad
from support.oracle import sample

from bench import losses
from bench.cases import preset_data
from cbloss_fused import class_balanced_loss, ldam_margin, logit_adjustment

COUNTS = torch.logspace(3, 0, 10, dtype=torch.float64).round()


def data(C=10):
    logits, target, weight, _ = sample(C, torch.float64)
    rows = target >= 0
    return logits[rows], target[rows], weight.double()


def assert_same(backend, function, options, logits, target, weight=None):
    """Loss and gradient of a plain formula, and ours."""
    leaf = logits.clone().requires_grad_()
    want = function(leaf)
    want.backward()
    loss, grad = loss_and_grad(backend, logits, target, weight, **options)
    torch.testing.assert_close(loss, want.detach(), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("tau", (1.0, 0.5), ids=str)
def test_logit_adjustment_and_balanced_softmax(backend, tau):
    """Menon et al., equation 10: -log softmax(f + tau log pi); balanced softmax is tau = 1."""
    logits, target, _ = data()
    prior = (COUNTS / COUNTS.sum()).log().float().double() * tau  # a vector counts as float32
    bias = logit_adjustment(COUNTS, tau)
    torch.testing.assert_close(bias.double(), prior, rtol=1e-6, atol=0)
    assert_same(
        backend,
        lambda x: F.cross_entropy(losses.adjusted_logits(x, bias.double().to(DEVICE)), target),
        {"logit_bias": bias.to(DEVICE)},
        logits,
        target,
    )


def test_ldam(backend):
    """Cao et al.: s (z_y - Delta_y), Delta_c = C n_c^(-1/4), s = 30."""
    logits, target, weight = data()
    cosine = F.normalize(logits, dim=1)
    margin = ldam_margin(COUNTS, max_margin=0.5)
    torch.testing.assert_close(margin.double(), losses.ldam_margins(COUNTS), rtol=1e-6, atol=0)
    margin = margin.to(DEVICE)

    def ldam(x):
        return F.cross_entropy(losses.ldam_logits(x, target, margin.double()), target, weight)

    options = {"margin": margin, "logit_scale": 30.0, "reduction": "weighted_mean"}
    assert_same(backend, ldam, options, cosine, target, weight)


@pytest.mark.parametrize("clip", (0.0, 0.05), ids=str)
@pytest.mark.parametrize("gammas", ((1.0, 4.0), (0.0, 2.0), (0.5, 0.0)), ids=str)
def test_asymmetric_loss(backend, gammas, clip):
    """Ridnik et al., equations 4 to 7."""
    logits, target, _ = data()
    t = F.one_hot(target, 10)
    gamma, gamma_neg = gammas

    def asymmetric(x):
        return losses.asymmetric(x, t, gamma, gamma_neg, clip) / len(target)

    options = {"activation": "sigmoid", "gamma": gamma, "gamma_neg": gamma_neg, "clip": clip}
    assert_same(backend, asymmetric, options, logits.clamp(-12, 12), target)


@pytest.mark.parametrize("alpha", (0.25, 1.0, 0.0), ids=str)
@pytest.mark.parametrize("gamma", (0.0, 2.0), ids=str)
def test_alpha_balanced_focal_loss(backend, gamma, alpha):
    """Lin et al., equation 5."""
    logits, target, _ = data(131)
    t = F.one_hot(target, 131).double()

    def focal(x):
        return losses.sigmoid_focal(x, t, gamma, alpha) / len(target)

    options = {"activation": "sigmoid", "gamma": gamma, "alpha": alpha}
    assert_same(backend, focal, options, logits.clamp(-12, 12), target)


@pytest.mark.skipif(DEVICE != "cpu", reason="their packages are compared once, on the CPU")
def test_every_line_of_the_migration_table():
    """balanced-loss, where it is installed, and PyTorch's own, in float32."""
    x, y, t = preset_data()
    for preset in losses.presets(y, t):
        loss, grad = losses.difference(preset, x)
        assert loss < 1e-6, preset.theirs
        assert grad < 1e-5, preset.theirs


def test_a_margin_is_taken_off_the_target_alone():
    logits = torch.zeros(2, 3)
    loss = class_balanced_loss(
        logits, torch.tensor([0, 2]), margin=torch.tensor([1.0, 50.0, 2.0]), reduction="none"
    )
    want = torch.log(torch.tensor([2 + 2.718281828**-1, 2 + 2.718281828**-2]))
    torch.testing.assert_close(loss, want + torch.tensor([1.0, 2.0]))
