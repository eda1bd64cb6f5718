"""What labels of the sigmoid family may say: no class, unknown, and how much a positive counts.

The values are those of torch's own binary cross entropy in float64.
"""

from __future__ import annotations

from math import inf, nan
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.backends import DEVICE, loss_and_grad
from support.marks import IGNORED, REDUCTIONS, name_of
from support.tolerances import assert_grad, assert_loss, same_bits

from cbloss_fused import ClassBalancedLoss, check_target, class_balanced_loss, class_counts

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


# Background rows ----------------------------------------------------------------------------------


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


@pytest.mark.parametrize("C", (9000, 20_001, 70_000), ids="C{}".format)
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


# Partial labels -----------------------------------------------------------------------------------


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
