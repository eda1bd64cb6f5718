"""Rows of the sigmoid family without a positive class: a detector's background."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.backends import DEVICE, loss_and_grad
from support.marks import IGNORED, REDUCTIONS
from support.multilabel import (
    ANYWHERE,
    DTYPE,
    FOCAL,
    MODES,
    SMOOTHING,
    agree,
    expected,
    one_hot,
    problem,
    terms,
)
from support.tolerances import assert_loss

from cbloss_fused import ClassBalancedLoss, check_target, class_balanced_loss, class_counts


def with_background(target, b, seed=0):
    """Two thirds of the rows."""
    g = torch.Generator(DEVICE).manual_seed(seed)
    return torch.where(torch.rand(target.shape, generator=g) < 2 / 3, b, target)


def row_scale(target, weight, sample_weight):
    labelled = (target >= 0) & (target < len(weight))
    return torch.where(labelled, weight[torch.where(labelled, target, 0)], 1.0) * sample_weight


@pytest.mark.parametrize("b", ("C", -1, 2**32 + 3), ids=str)
@pytest.mark.parametrize("alpha", (None, 0.25), ids="a{}".format)
@MODES
@SMOOTHING
@FOCAL
@ANYWHERE
@DTYPE
def test_background_rows(backend, dtype, C, gamma, eps, recompute, alpha, b):
    logits, target, weight, sample_weight = problem(C, dtype)
    b = C if b == "C" else b
    target = with_background(target, b)
    target[:3] = torch.tensor([0, C - 1, b])
    want = expected(
        logits, one_hot(target, C), row_scale(target, weight, sample_weight), gamma=gamma,
        alpha=alpha, eps=eps, denominator=len(target),
    )  # fmt: skip
    agree(
        backend, logits, target, weight, want, sample_weight=sample_weight, gamma=gamma,
        alpha=alpha, label_smoothing=eps, recompute=recompute, background_index=b,
        slack=1e-15 if eps and dtype == torch.float64 else 1e-7 if eps else 0,
    )  # fmt: skip


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("C", (7, 300), ids="C{}".format)
def test_reductions_with_background(backend, C, reduction):
    """Ignored rows beside them; one of the indices may be narrowed to a class's."""
    for b, ignored in ((C, IGNORED), (-1, 2**32 + 3), (2**32 + 3, -(2**32) + 2), (-(2**40), None)):
        logits, target, weight, sample_weight = problem(C)
        target = with_background(target, b)
        target[4] = b if ignored is None else ignored
        keep = (
            target != ignored if ignored is not None else torch.ones_like(target, dtype=torch.bool)
        )
        r = torch.where(keep, row_scale(target, weight, sample_weight), 0.0)
        denominator = {"mean": keep.sum(), "weighted_mean": r.sum()}.get(reduction, 1.0)
        want = expected(logits, one_hot(target, C), r, gamma=2.0, denominator=denominator)
        agree(
            backend, logits, target, weight, want, sample_weight=sample_weight, gamma=2.0,
            reduction=reduction, background_index=b, ignore_index=ignored,
        )  # fmt: skip


@pytest.mark.parametrize("shape", ((2, 5, 5, 7), (2, 300, 3), (3, 4, 2, 9)), ids=str)
@pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels-last"))
def test_background_of_images(backend, shape, last):
    g = torch.Generator(DEVICE).manual_seed(1)
    logits = torch.randn(shape, generator=g)
    if last:
        logits = logits.movedim(1, -1).contiguous().movedim(-1, 1)
    target = with_background(
        torch.randint(shape[1], shape[:1] + shape[2:], generator=g), 255 + shape[1]
    )
    b = 255 + shape[1]
    want = expected(
        logits, one_hot(target, shape[1]), torch.ones(target.shape), gamma=0.5,
        denominator=target.numel(),
    )  # fmt: skip
    agree(backend, logits, target, None, want, gamma=0.5, background_index=b)


@pytest.mark.parametrize("C", (9000, 20_001), ids="C{}".format)
def test_background_of_long_rows(gpu, C):
    """Registers, loops, and several programs a row."""
    logits, target, weight, _ = problem(C, torch.float32, N=3)
    target[0] = C
    want = expected(
        logits, one_hot(target, C), row_scale(target, weight, torch.ones(3)), denominator=3.0
    )
    for multiprocessors in (1, 132):
        with gpu.on_a_gpu_of(multiprocessors):
            agree(gpu, logits, target, weight, want, background_index=C)


@pytest.mark.parametrize("C", (7, 300), ids="C{}".format)
def test_a_background_row_has_no_margin_and_no_class_weight(backend, C):
    logits, target, weight, _ = problem(C)
    bias, margin = weight.double() - 1, weight.double() / 2
    target = with_background(target, C)
    adjusted = 1.5 * (logits + bias - margin * one_hot(target, C))
    losses, grad = expected(adjusted, one_hot(target, C), row_scale(target, weight, torch.ones(1)))
    options = {"logit_bias": bias, "margin": margin, "logit_scale": 1.5, "reduction": "sum"}
    agree(backend, logits, target, weight, (losses, 1.5 * grad), background_index=C, **options)
    # class_weighting="class": w_j multiplies class j's term, of every row
    leaf = adjusted.clone().requires_grad_()
    total = (weight.double() * terms(leaf, one_hot(target, C), 0.0, None, None)).sum()
    (grad,) = torch.autograd.grad(total, leaf)
    agree(
        backend, logits, target, weight, (total.detach(), 1.5 * grad), background_index=C,
        class_weighting="class", **options,
    )  # fmt: skip


@MODES
@pytest.mark.parametrize("C", (7, 300), ids="C{}".format)
def test_background_belongs_to_no_class_of_the_statistics(backend, C, recompute):
    logits, target, weight, _ = problem(C, torch.float32)
    target = with_background(target, C)
    target[3] = IGNORED
    leaf = logits.clone().requires_grad_()
    loss, stats = class_balanced_loss(
        leaf, target, weight, activation="sigmoid", gamma=0.5, background_index=C, alpha=0.25,
        return_stats=True, recompute=recompute, backend=backend.argument,
    )  # fmt: skip
    loss.backward()
    keep = (target != IGNORED).sum()
    r = torch.where(target != IGNORED, row_scale(target, weight, torch.ones(1)), 0.0)
    losses, grad = expected(logits, one_hot(target, C), r, gamma=0.5, alpha=0.25, denominator=keep)
    assert_loss(loss.detach(), losses.sum(), logits.dtype)
    labelled = (target >= 0) & (target < C)
    y = target[labelled]
    assert torch.equal(stats.rows, torch.bincount(y, minlength=C))
    zeros = torch.zeros(C, dtype=torch.float64)
    torch.testing.assert_close(
        stats.loss, zeros.index_add(0, y, losses[labelled]), rtol=1e-5, atol=1e-9
    )
    own = grad[labelled].gather(1, y.unsqueeze(1)).squeeze(1).abs()
    torch.testing.assert_close(stats.gradient, zeros.index_add(0, y, own), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("C", (7, 300), ids="C{}".format)
def test_another_index_is_out_of_range_as_ever(backend, C):
    logits, target, _, _ = problem(C)
    good = with_background(target, C + 5)
    for wrong in (C, -1, 2**32 + C + 5):
        bad = good.clone()
        bad[2] = wrong
        options = {"activation": "sigmoid", "background_index": C + 5, "reduction": "none"}
        if not backend.gpu:
            with pytest.raises(
                IndexError, match=rf"target\[2\] = {wrong}.*background_index={C + 5}"
            ):
                loss_and_grad(backend, logits, bad, **options)
            continue
        loss, grad = loss_and_grad(backend, logits, bad, **options)
        assert loss.isnan().nonzero().flatten().tolist() == [2]
        assert grad.isnan().all(1).nonzero().flatten().tolist() == [2]


def test_background_index_must_be_apart():
    x, y = torch.zeros(2, 3), torch.tensor([0, 3])
    for options, text in (
        ({"activation": "softmax"}, "every row has one"),
        ({"background_index": 2}, "one of the 3 classes"),
        ({"background_index": -100}, "either background or ignored"),
        ({"background_index": 2.5}, "background_index must be None or an int"),
    ):
        given: dict[str, Any] = {"activation": "sigmoid", "background_index": 3, **options}
        with pytest.raises((ValueError, TypeError), match=text):
            class_balanced_loss(x, y, **given)
        with pytest.raises((ValueError, TypeError), match=text):
            ClassBalancedLoss([5, 3, 1], beta=0.9, **given)
    with pytest.raises(ValueError, match="a multi-hot row without a positive class is all 0"):
        class_balanced_loss(x, torch.zeros(2, 3), activation="sigmoid", background_index=3)


def test_background_is_not_counted():
    labels = torch.tensor([3, 0, 1, 3, -1, 0])
    counts = class_counts(labels, 3, ignore_index=-1, background_index=3)
    assert counts.tolist() == [2, 1, 0]
    with pytest.raises(ValueError, match=r"labels\[0\] = 3"):
        class_counts(labels, 3, ignore_index=-1)
    module = ClassBalancedLoss.from_labels(
        labels, 3, 0.9, empty="zero", activation="sigmoid", background_index=3, ignore_index=-1
    )
    assert module.counts.tolist() == [2, 1, 0]
    assert module.background_index == 3
    check_target(labels, 3, -1, 3)
    with pytest.raises(IndexError, match=r"3 is out of range.*or ignore_index=-1"):
        check_target(labels, 3, -1)
