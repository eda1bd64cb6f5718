"""Multi-hot targets with unknown labels; pos_weight."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
import torch.nn.functional as F
from support.backends import DEVICE, loss_and_grad
from support.marks import name_of
from support.multilabel import (
    ANYWHERE,
    DTYPE,
    FOCAL,
    MODES,
    SMOOTHING,
    agree,
    expected,
    labels_weight,
    multi_hot,
    one_hot,
    problem,
)
from support.tolerances import same_bits

from cbloss_fused import ClassBalancedLoss, class_balanced_loss

# Partial labels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("given", (torch.float32, torch.float64, torch.bfloat16), ids=name_of)
@pytest.mark.parametrize("unknown", (-1, -100))
@MODES
@SMOOTHING
@FOCAL
@ANYWHERE
@DTYPE
def test_partial_labels(backend, dtype, C, gamma, eps, recompute, unknown, given):
    logits, _, weight, sample_weight = problem(C, dtype)
    target, t, known = multi_hot(logits, unknown, given, soft=given == torch.float64)
    r = labels_weight(t, weight, sample_weight)
    for reduction, denominator in (("mean", len(logits)), ("weighted_mean", r.sum())):
        want = expected(logits, t, r, gamma=gamma, eps=eps, known=known, denominator=denominator)
        agree(
            backend, logits, target, weight, want, sample_weight=sample_weight, gamma=gamma,
            label_smoothing=eps, recompute=recompute, ignore_index=unknown, reduction=reduction,
            slack=1e-15 if dtype == torch.float64 else 2e-7,
        )  # fmt: skip


@pytest.mark.parametrize("layout", ("image", "transposed"))
def test_partial_labels_that_lie_otherwise(backend, layout):
    logits = torch.randn(2, 5, 3, 7, generator=torch.Generator(DEVICE).manual_seed(3))
    if layout == "transposed":
        logits = logits.movedim(1, -1).contiguous().movedim(-1, 1)
    target, t, known = multi_hot(logits, -1, torch.float32)
    ones = torch.ones(2, 3, 7)
    want = expected(logits, t, ones, known=known, denominator=ones.numel())
    for each in (target, target.movedim(1, -1).contiguous().movedim(-1, 1)):
        agree(backend, logits, each, None, want, ignore_index=-1)


@FOCAL
@pytest.mark.parametrize("C", (7, 300), ids="C{}".format)
def test_what_nobody_knows_has_no_influence(backend, C, gamma):
    logits, _, weight, _ = problem(C, torch.float32)
    target, _, known = multi_hot(logits, -1, torch.float32)
    options = {"activation": "sigmoid", "gamma": gamma, "ignore_index": -1, "alpha": 0.3}
    for recompute in (False, True):
        want = loss_and_grad(backend, logits, target, weight, **options, recompute=recompute)
        for value in (nan, inf, -inf):
            wild = torch.where(known, logits, value)
            got = loss_and_grad(backend, wild, target, weight, **options, recompute=recompute)
            assert all(backend.same(a, b) for a, b in zip(got, want, strict=True))
            assert (got[1][~known] == 0).all()


def test_other_values_out_of_range_are_named(backend):
    if backend.gpu:
        pytest.skip("values are used as given there")
    for C in (5, 300):
        logits, *_ = problem(C)
        target, _, _ = multi_hot(logits, -1.0, torch.float64)
        for value in (-2.0, -100.0, 1.5, nan, -inf):
            bad = target.clone()
            bad[3, 2] = value
            text = rf"target\[3, 2\] = {value:g}(\.0)?: must be in \[0, 1\] or ignore_index=-1"
            for recompute in (False, True):
                for inplace in (False, True):
                    x = logits.clone().requires_grad_() * 1
                    with pytest.raises(ValueError, match=text):
                        class_balanced_loss(
                            x, bad, activation="sigmoid", ignore_index=-1, inplace=inplace,
                            recompute=recompute, backend=backend.argument,
                        )  # fmt: skip
                    assert torch.equal(x, logits)
        with pytest.raises(ValueError, match=r"-1(\.0)?: must be in \[0, 1\]$"):
            loss_and_grad(backend, logits, target, activation="sigmoid", ignore_index=None)
        with pytest.raises(ValueError, match=r"-1(\.0)?: must be finite and >= 0$"):
            loss_and_grad(backend, logits, target, ignore_index=-1)


def test_an_index_that_a_half_type_cannot_hold_ignores_nothing(backend):
    logits, *_ = problem(5)
    t = torch.zeros(logits.shape, dtype=torch.float16)
    got = loss_and_grad(backend, logits, t, activation="sigmoid", ignore_index=-(10**9))
    want = loss_and_grad(backend, logits, t.bool(), activation="sigmoid")
    assert all(map(same_bits, got, want)) or backend.gpu or backend.fallback
    torch.testing.assert_close(got, want)


# pos_weight ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ("index", "multi-hot", "bool", "soft", "partial"))
@MODES
@SMOOTHING
@FOCAL
@ANYWHERE
@DTYPE
def test_pos_weight(backend, dtype, C, gamma, eps, recompute, kind):
    logits, target, weight, sample_weight = problem(C, dtype)
    v = 3 * weight.flip(0)
    v[0] = 0.0
    t, known, r = one_hot(target, C), None, weight[target] * sample_weight
    if kind != "index":
        target, t, known = multi_hot(logits, -1, torch.float32, soft=kind == "soft")
        if kind != "partial":
            target, known = t.bool() if kind == "bool" else t.float(), None
            t = target.double()
        r = labels_weight(t, weight, sample_weight)
    options = {"gamma": gamma, "alpha": 0.3 if gamma == 2.0 else None}
    want = expected(
        logits, t, r, eps=eps, pos_weight=v, known=known, denominator=len(logits), **options
    )
    agree(
        backend, logits, target, weight, want, sample_weight=sample_weight, pos_weight=v,
        label_smoothing=eps, recompute=recompute, ignore_index=-1, **options,
        slack=1e-15 if dtype == torch.float64 else 4e-7,
    )  # fmt: skip


@pytest.mark.parametrize("shape", ((2, 5, 3, 7), (33, 5), (3, 300, 2)), ids=str)
@SMOOTHING
def test_pos_weight_is_that_of_torch(backend, shape, eps):
    """Per class, row by row, of images too; class weights beside."""
    C = shape[1]
    logits = torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(C))
    target = torch.arange(logits[:, 0].numel()).reshape(logits[:, 0].shape) % C
    v, w = (torch.linspace(low, 4.0, C, dtype=torch.float64) for low in (0.0, 0.5))
    t = (1 - eps) * one_hot(target, C) + eps / C
    leaf = logits.double().detach().clone().requires_grad_()
    along = [-1, *[1] * (len(shape) - 2)]
    total = F.binary_cross_entropy_with_logits(
        leaf, t, w.reshape(along), pos_weight=v.reshape(along), reduction="sum"
    )
    (grad,) = torch.autograd.grad(total, leaf)
    agree(
        backend, logits, target, w.float(), (total.detach(), grad), pos_weight=v.float(),
        label_smoothing=eps, class_weighting="class", reduction="sum", slack=1e-6,
    )  # fmt: skip


@SMOOTHING
@pytest.mark.parametrize("gamma", (0.0, 2.0), ids="g{}".format)
@pytest.mark.parametrize("C", (7, 300), ids="C{}".format)
def test_a_positive_without_weight_is_no_nan(backend, C, gamma, eps):
    logits, target, _, _ = problem(C, torch.float32)
    logits[0, target[0]] = -inf
    v = torch.ones(C)
    v[target[0]] = 0.0
    options = {"activation": "sigmoid", "gamma": gamma, "reduction": "none"}
    for each in (target, one_hot(target, C).bool()):
        loss, grad = loss_and_grad(
            backend, logits, each, pos_weight=v, label_smoothing=eps, **options
        )
        assert loss.isfinite().all()
        assert grad.isfinite().all()


def test_pos_weight_of_a_module():
    v = torch.tensor([1.0, 2.0, 5.0])
    module = ClassBalancedLoss([9, 3, 1], 0.9, activation="sigmoid", pos_weight=v)
    v.zero_()
    assert module.state_dict()["pos_weight"].tolist() == [1, 2, 5]
    assert "pos_weight" in repr(module)
    other = ClassBalancedLoss([9, 3, 1], 0.9, activation="sigmoid", pos_weight=v)
    other.load_state_dict(module.state_dict())
    assert other.state_dict()["pos_weight"].tolist() == [1, 2, 5]
    assert module.half().state_dict()["pos_weight"].dtype is torch.float32
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 2])
    want = class_balanced_loss(
        x, y, module.weight, activation="sigmoid", pos_weight=torch.tensor([1.0, 2.0, 5.0])
    )
    assert torch.equal(module(x, y), want)
    for bad, text in (([1.0, -1, 2], ">= 0"), ([1.0, 2], "shape"), ([1.0, nan, 1], "finite")):
        with pytest.raises(ValueError, match=f"pos_weight.*{text}"):
            module.pos_weight = torch.tensor(bad)
        if DEVICE == "cuda" and text != "shape":
            continue  # values there are not looked at
        with pytest.raises(ValueError, match=f"pos_weight.*{text}"):
            class_balanced_loss(x, y, activation="sigmoid", pos_weight=torch.tensor(bad))
    with pytest.raises(ValueError, match="softmax' has no such terms"):
        class_balanced_loss(x, y, pos_weight=torch.ones(3))
    with pytest.raises(ValueError, match="softmax' has no such terms"):
        ClassBalancedLoss([9, 3, 1], 0.9, pos_weight=torch.ones(3))


def test_a_pos_weight_that_changes_before_the_backward_raises(backend):
    logits, target, _, _ = problem(7)
    v = torch.ones(7)
    loss = class_balanced_loss(
        logits.requires_grad_(), target, activation="sigmoid", pos_weight=v.double(),
        recompute=True, backend=backend.argument,
    )  # fmt: skip
    loss.backward()
    v = v.double()
    loss = class_balanced_loss(
        logits, target, activation="sigmoid", pos_weight=v, recompute=True,
        backend=backend.argument,
    )  # fmt: skip
    v.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
