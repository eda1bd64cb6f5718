"""Losses of the sigmoid family from torch's own binary cross entropy in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cbloss_fused import class_balanced_loss

from .backends import DEVICE, loss_and_grad
from .marks import name_of
from .tolerances import assert_grad, assert_loss

ANYWHERE = pytest.mark.parametrize("C", (1, 7, 10, 131, 1000), ids="C{}".format)
DTYPE = pytest.mark.parametrize(
    "dtype", (torch.float64, torch.float32, torch.bfloat16), ids=name_of
)
MODES = pytest.mark.parametrize("recompute", (False, True), ids=("stored", "recomputed"))
SMOOTHING = pytest.mark.parametrize("eps", (0.0, 0.1), ids="s{}".format)
FOCAL = pytest.mark.parametrize("gamma", (0.0, 0.5, 2.0, 1.5), ids="g{}".format)


def problem(C, dtype=torch.float64, N=None):
    """logits, class indices, weight, sample_weight."""
    N = N or (37 if C < 100 else 6)
    g = torch.Generator(DEVICE).manual_seed(C)
    logits = (torch.randn(N, C, generator=g, dtype=torch.float64) * 3).to(dtype)
    target = torch.randint(C, (N,), generator=g)
    weight, sample_weight = ((torch.rand(n, generator=g) + 0.2).double() for n in (C, N))
    return logits, target, weight, sample_weight


def terms(x, t, gamma, alpha, pos_weight):
    """[v_j] alpha_t (1 - p_t)^gamma (-log p_t) of every class, t one number for each."""

    def element(one):
        nll = F.binary_cross_entropy_with_logits(x, torch.full_like(x, one), reduction="none")
        return (-torch.expm1(-nll)) ** gamma * nll if gamma else nll

    positive, negative = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)
    v = 1.0 if pos_weight is None else pos_weight.reshape(-1, *[1] * (x.dim() - 2))
    return v * positive * t * element(1.0) + negative * (1 - t) * element(0.0)


def expected(
    logits, t, r, *, gamma=0.0, alpha=None, eps=0.0, pos_weight=None, known=None, denominator=1.0
):
    """Row losses over the denominator and the gradient of their sum; t, r: with all decided."""
    leaf = logits.double().detach().clone().requires_grad_()
    t = (1 - eps) * t + eps / logits.shape[1]
    x = leaf if known is None else torch.where(known, leaf, 0.0)
    L = terms(x, t, gamma, alpha, None if pos_weight is None else pos_weight.double())
    L = L if known is None else torch.where(known, L, 0.0)
    losses = r.double() * L.sum(1) / denominator
    (grad,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), grad


def one_hot(y, C):
    """Zeros where y is no class."""
    labelled = (y >= 0) & (y < C)
    t = F.one_hot(torch.where(labelled, y, 0), C) * labelled.unsqueeze(-1)
    return t.movedim(-1, 1).double()


def agree(backend, logits, target, weight, want, slack=0.0, **options):
    """Loss, gradient, loss alone and, in place, the gradient once more."""
    losses, grad = want
    total = losses if options.get("reduction") == "none" else losses.sum()
    got = loss_and_grad(backend, logits, target, weight, activation="sigmoid", **options)
    assert_loss(got[0], total, logits.dtype, logits.shape[1])
    assert_grad(got[1], grad, logits.dtype, slack=slack)
    options |= {"backend": backend.argument, "activation": "sigmoid"}
    assert_loss(
        class_balanced_loss(logits, target, weight, **options), total, logits.dtype, logits.shape[1]
    )
    leaf = logits.clone().requires_grad_()
    middle = leaf * 1
    class_balanced_loss(middle, target, weight, inplace=True, **options).sum().backward()
    assert_grad(leaf.grad, grad, logits.dtype, slack=slack)


def multi_hot(logits, unknown, dtype, soft=False):
    """(targets with unknown labels, zeros in their place, which are known); one row of none."""
    g = torch.Generator(DEVICE).manual_seed(7)
    t = torch.rand(logits.shape, generator=g, dtype=torch.float64)
    t = t.to(dtype).double() if soft else (t < 0.3).double()
    known = torch.rand(logits.shape, generator=g) < 0.7
    known[1] = False
    return torch.where(known, t, unknown).to(dtype), torch.where(known, t, 0.0), known


def labels_weight(t, weight, sample_weight):
    labels = t.sum(1)
    mean = (t * weight.double()).sum(1) / torch.where(labels == 0, 1.0, labels)
    return torch.where(labels == 0, 1.0, mean) * sample_weight
