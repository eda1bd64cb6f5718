"""Targets with one number per class: soft, multi-hot; and weights of classes instead of rows."""

from __future__ import annotations

from itertools import product
from math import inf
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.backends import DEVICE, Backend, loss_and_grad, operator_arguments
from support.marks import DTYPES, FAMILIES, REDUCTIONS, name_of
from support.oracle import oracle
from support.oracle import sample as conftest_sample
from support.soft import LAYOUTS, soft
from support.tolerances import assert_grad, assert_loss, same_bits

from cbloss_fused import ClassBalancedLoss, class_balanced_loss
from cbloss_fused.buffers import new_saved

FAMILY = pytest.mark.parametrize("family", FAMILIES)
ANYWHERE = pytest.mark.parametrize("C", (1, 2, 10, 131, 1000), ids="C{}".format)
EAGER = Backend("reference")
MODES = pytest.mark.parametrize("recompute", (False, True), ids=("stored", "recomputed"))


def sample(C, dtype=torch.float64):
    """logits, class indices, weight, sample_weight; no row is ignored."""
    logits, target, weight, sample_weight = conftest_sample(C, dtype)
    return logits, target.clamp(min=0), weight, sample_weight


def with_autograd(function, logits, grad_output=None):
    leaf = logits.clone().requires_grad_()
    loss = function(leaf)
    loss.backward(torch.ones_like(loss) if grad_output is None else grad_output)
    return loss.detach(), leaf.grad


def assert_close(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("reduction", ("none", "mean", "weighted_mean", "sum"))
@ANYWHERE
@FAMILY
def test_one_hot_is_the_class_index(backend, family, C, reduction):
    """To the last digits even of a sure row."""
    logits, target, weight, sample_weight = sample(C)
    one_hot = F.one_hot(target, C).double()
    options = {"sample_weight": sample_weight, "activation": family, "reduction": reduction}
    options |= {"label_smoothing": 0.1} if C == 10 else {"logit_bias": weight}
    want = loss_and_grad(backend, logits, target, weight, **options)
    for t in (one_hot, one_hot.bool(), one_hot.half()):
        got = loss_and_grad(backend, logits, t, weight, **options)
        torch.testing.assert_close(got[0], want[0], rtol=1e-11, atol=1e-300)
        assert_grad(got[1], want[1], torch.float64)


@pytest.mark.parametrize("eps", (0.0, 0.1), ids="s{}".format)
@ANYWHERE
def test_cross_entropy_with_probabilities(backend, C, eps):
    logits, *_ = sample(C)
    t = soft(logits)
    want = with_autograd(lambda x: F.cross_entropy(x, t, label_smoothing=eps), logits)
    assert_close(loss_and_grad(backend, logits, t, label_smoothing=eps), want)


@MODES
@pytest.mark.parametrize("reduction", REDUCTIONS)
@ANYWHERE
def test_cross_entropy_with_probabilities_and_weights(backend, C, reduction, recompute):
    """Row by row, of labels that sum to anything; "weighted_mean" divides by their mean weights."""
    logits, _, weight, sample_weight = sample(C)
    t, w, s = 3 * soft(logits), weight.double(), sample_weight.double()
    r = s * (t @ w) / t.sum(1)
    divisor = {"mean": len(t), "weighted_mean": r.sum()}.get(reduction, 1)

    def ce(x):
        rows = s * F.cross_entropy(x, t, w, reduction="none") / divisor
        return rows if reduction == "none" else rows.sum()

    incoming = torch.linspace(-1, 2, len(t)).double() if reduction == "none" else None
    options = {"sample_weight": s, "reduction": reduction, "recompute": recompute}
    want = with_autograd(ce, logits, incoming)
    for each in (backend, EAGER):
        assert_close(loss_and_grad(each, logits, t, w, incoming, **options), want)


def two_labels(target, C, share):
    """share of each row's own label, the rest of another row's."""
    other = target.flip(0)
    own, rest = (F.one_hot(y, C).double() for y in (target, other))
    return other, share * own + (1 - share) * rest


@MODES
@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
@ANYWHERE
def test_mixup_is_the_two_losses(backend, C, reduction, recompute):
    """With weights, label smoothing and z-loss: what people write, from torch's log_softmax."""
    logits, target, weight, sample_weight = sample(C)
    w, s, share, eps, zeta = weight.double(), sample_weight.double(), 0.3, 0.1, 0.01
    other, t = two_labels(target, C, share)

    def one(x, y):
        log_p, z = F.log_softmax(2 * x, 1), 2 * x
        hard = -log_p.gather(1, y.unsqueeze(1)).squeeze(1)
        return w[y] * ((1 - eps) * hard - eps * log_p.mean(1) + zeta * torch.logsumexp(z, 1) ** 2)

    def mixup(x):
        rows = s * (share * one(x, target) + (1 - share) * one(x, other))
        return {"none": rows, "sum": rows.sum(), "mean": rows.mean()}[reduction]

    options = {"label_smoothing": eps, "z_loss": zeta, "logit_scale": 2.0, "sample_weight": s}
    options |= {"reduction": reduction, "recompute": recompute}
    incoming = torch.linspace(-1, 2, len(t)).double() if reduction == "none" else None
    want = with_autograd(mixup, logits, incoming)
    for each in (backend, EAGER):
        assert_close(loss_and_grad(each, logits, t, w, incoming, **options), want)
    losses = [loss_and_grad(backend, logits, y, w, incoming, **options) for y in (target, other)]
    for got, a, b in zip(want, *losses, strict=True):
        torch.testing.assert_close(got, share * a + (1 - share) * b, rtol=1e-11, atol=1e-13)


@MODES
@pytest.mark.parametrize("C", (4, 131), ids="C{}".format)
def test_what_weighs_nothing_costs_nothing(backend, C, recompute):
    """An infinite -log p of a class or a sample of weight 0; a row with such a label alone."""
    logits, _, weight, _ = sample(C)
    w, s, t = weight.double(), torch.ones(len(logits)).double(), soft(logits)
    masked, kept = logits.clone(), [j for j in range(C) if j != 1]
    masked[:, 1], w[1] = -inf, 0
    t[0], t[0, 1] = 0, 1
    masked[2, 2], s[2] = -inf, 0
    options = {"sample_weight": s, "reduction": "none", "recompute": recompute}
    want = with_autograd(
        lambda x: F.cross_entropy(x, t[:, kept], w[kept], reduction="none"), logits[:, kept]
    )
    rows = [i for i in range(len(t)) if i != 2]
    loss, grad = loss_and_grad(backend, masked, t, w, **options)
    assert_close((loss[rows], grad[rows][:, kept]), (v[rows] for v in want))
    assert loss[0] == loss[2] == 0
    assert (grad[:, 1] == 0).all()
    assert (grad[2] == 0).all()
    assert_close((class_balanced_loss(masked, t, w, backend="reference", **options),), (loss,))


@pytest.mark.parametrize("C", (10, 131), ids="C{}".format)
def test_what_the_forward_leaves(backend, C):
    """The scales of the hard part and of the rest: sample weight and row weight / denominator."""
    if backend.argument == "cuda":
        pytest.skip("leaves soft targets to Triton")
    logits, _, weight, sample_weight = sample(C)
    t, w, s = soft(logits), weight.double(), sample_weight.double()
    arguments, loss, _ = operator_arguments(
        logits, t, "softmax", 0.0, 0.1, "weighted_mean", (w, s, None)
    )
    saved = new_saved(logits, False)
    backend.record.loss(*arguments, loss, None, saved)
    r = s * (t @ w) / t.sum(1)
    assert_close(saved[:2], (s / r.sum(), r / r.sum()))


def test_a_weight_that_changes_before_the_backward(backend):
    """Of the classes it is read again; of sigmoid's rows it is in their scale."""
    logits, _, weight, _ = sample(10)
    t, w = soft(logits), weight.double()
    for family in FAMILIES:
        leaf, w_now = logits.clone().requires_grad_(), w.clone()
        options: dict[str, Any] = {"activation": family, "recompute": True}
        loss = class_balanced_loss(leaf, t, w_now, backend=backend.argument, **options)
        w_now += 1
        if family == "softmax":
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        else:
            loss.backward()
            assert_close((leaf.grad,), (loss_and_grad(backend, logits, t, w, **options)[1],))


@pytest.mark.parametrize("weighting", ("sample", "class"))
@ANYWHERE
def test_binary_cross_entropy(backend, C, weighting):
    """Multi-label: torch's weight is one per class, ours one per row by default."""
    logits, _, weight, _ = sample(C)
    t, w = (soft(logits) > 0.3).double(), weight.double()

    def bce(x):
        L = F.binary_cross_entropy_with_logits(x, t, reduction="none")
        labels = t.sum(1)
        r = torch.where(labels > 0, (t * w).sum(1) / labels.clamp(min=1), 1.0)
        return (L * (w if weighting == "class" else r.unsqueeze(1))).sum() / len(t)

    options = {"activation": "sigmoid", "class_weighting": weighting}
    assert_close(loss_and_grad(backend, logits, t, w, **options), with_autograd(bce, logits))


def test_binary_cross_entropy_with_one_pos_weight(backend):
    """pos_weight p for every class is alpha = p / (1 + p), times 1 + p."""
    logits, *_ = sample(131)
    t, p = (soft(logits) > 0.01).double(), 3.0
    pos_weight = torch.full((131,), p, dtype=torch.float64)

    def bce(x):
        return F.binary_cross_entropy_with_logits(x, t, pos_weight=pos_weight) * 131 / (1 + p)

    options: dict[str, Any] = {"activation": "sigmoid", "alpha": p / (1 + p)}
    assert_close(loss_and_grad(backend, logits, t, **options), with_autograd(bce, logits))


def test_weights_of_classes_with_class_indices(backend):
    logits, target, weight, _ = sample(131)
    t, w = F.one_hot(target, 131).double(), weight.double()

    def bce(x):
        return F.binary_cross_entropy_with_logits(x, t, w, reduction="sum") / len(t)

    options: dict[str, Any] = {"activation": "sigmoid", "class_weighting": "class"}
    for recompute in (False, True):
        got = loss_and_grad(backend, logits, target, w, recompute=recompute, **options)
        assert_close(got, with_autograd(bce, logits))


@pytest.mark.parametrize("C", (131, 8200), ids="C{}".format)
@FAMILY
def test_equal_logits_and_long_rows(backend, family, C):
    """Several largest logits, which may lie in different tiles of a kernel."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.randint(-2, 3, (6, C), generator=generator).float()
    t, bias = soft(logits).float(), torch.arange(C) % 2.0
    options = {"activation": family, "label_smoothing": 0.1, "logit_bias": bias}
    for chosen in ({"activation": family}, options):
        got = loss_and_grad(backend, logits, t, **chosen)
        want = oracle(logits, t, **chosen)
        assert_loss(got[0], want[0], torch.float32)
        assert_grad(got[1], want[1], torch.float32, slack=4e-7)


@pytest.mark.parametrize("C", (3, 8200), ids="C{}".format)
def test_an_infinite_logit_takes_all(backend, C):
    """It costs nothing without labels on others, else everything; of two there is no limit."""
    logits, t = torch.zeros(3, C), torch.zeros(3, C)
    logits[:, 1] = logits[2, 2] = float("inf")
    t[:, 1], t[1, 0] = 1, 0.5
    loss, grad = loss_and_grad(backend, logits, t, reduction="none")
    assert loss[0] == 0
    assert (grad[0] == 0).all()
    assert loss[1] == float("inf")
    assert loss[2].isnan()
    loss, grad = loss_and_grad(backend, logits, t, reduction="none", label_smoothing=0.1)
    p = t[0]
    assert loss[0] == float("inf")
    torch.testing.assert_close(grad[0], p - (0.9 * t[0] + 0.1 / C))


@pytest.mark.parametrize("C", (1, 3, 131), ids="C{}".format)
@pytest.mark.parametrize("z", ("nan", "-inf"))
def test_no_logit_is_a_number(backend, C, z):
    logits, t = torch.full((3, C), float(z)), torch.full((3, C), 1 / C)
    loss, grad = loss_and_grad(backend, logits, t, reduction="none")
    assert loss.isnan().all()
    assert grad.isnan().all()


@FAMILY
def test_one_number_expanded(backend, family):
    """All strides 0, logits or targets: they say nothing of where classes lie."""
    logits, *_ = sample(131)
    half, zero = torch.tensor(0.5).double(), torch.tensor(0.0).double()
    for x, t in ((logits, half.expand(logits.shape)), (zero.expand(logits.shape), soft(logits))):
        want = oracle(x.contiguous(), t.contiguous(), activation=family)
        got = class_balanced_loss(x, t, activation=family, backend=backend.argument)
        assert_loss(got, want[0], torch.float64)


@pytest.mark.parametrize("reduction", ("none", "weighted_mean"))
@pytest.mark.parametrize("target_dtype", (*DTYPES, torch.bool), ids=name_of)
@pytest.mark.parametrize("shape, order", LAYOUTS.values(), ids=LAYOUTS.keys())
@FAMILY
def test_layouts_and_types(backend, family, shape, order, target_dtype, reduction):
    generator = torch.Generator(DEVICE).manual_seed(0)

    def laid_out(values):
        return values if order is None else values.permute(order)

    logits = laid_out(torch.randn(shape, generator=generator))
    target = laid_out((torch.rand(shape, generator=generator) > 0.6).to(target_dtype))
    if target_dtype.is_floating_point:
        target = target * 0.5
    before = target.clone()
    options = {"activation": family, "reduction": reduction}
    if logits.dim() == 1:
        weight = torch.rand(logits.shape[0], generator=generator)
        want = oracle(logits[None], target[None], weight, **options)
        want = want[0].reshape(()), want[1][0]
    else:
        weight = torch.rand(logits.shape[1], generator=generator)
        want = oracle(logits, target, weight, **options)
    for recompute in (False, True):
        got = loss_and_grad(backend, logits, target, weight, recompute=recompute, **options)
        assert got[0].shape == want[0].shape
        torch.testing.assert_close(got[0], want[0].float(), rtol=2e-5, atol=1e-6)
        torch.testing.assert_close(got[1], want[1].float(), rtol=2e-5, atol=1e-6)
    assert torch.equal(target, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@FAMILY
def test_a_masked_class_without_a_label_has_no_influence(backend, family, dtype):
    logits, *_ = sample(131, dtype)
    t = soft(logits)
    masked = logits.clone()
    t[:, 3:40], masked[:, 3:40] = 0, -float("inf")
    kept = [j for j in range(131) if not 3 <= j < 40]
    loss, grad = loss_and_grad(backend, masked, t, activation=family)
    want = oracle(logits[:, kept], t[:, kept], activation=family)
    assert_loss(loss, want[0], dtype)
    slack = 1e-14 if dtype == torch.float64 else 4e-7
    assert_grad(grad[:, kept], want[1], dtype, slack=slack)
    assert (grad[:, 3:40] == 0).all()


@pytest.mark.parametrize("ignore_index", (None, -100, -(2**20)), ids=str)
@FAMILY
def test_minus_zero_is_zero(backend, family, ignore_index):
    cases: tuple[dict[str, Any], ...] = ({}, {"reduction": "none"}, {"recompute": True})
    for C, dtype, options in product((3, 131), (torch.float32, torch.float16), cases):
        logits, _, weight, _ = sample(C, dtype)
        t = (logits > logits.median(1, keepdim=True).values).to(dtype)
        given = {"activation": family, "ignore_index": ignore_index, **options}
        want = loss_and_grad(backend, logits, t, weight, **given)
        got = loss_and_grad(backend, logits, torch.where(t == 0, -t, t), weight, **given)
        assert same_bits(got[0], want[0])
        assert same_bits(got[1], want[1])


@MODES
@FAMILY
def test_in_place(backend, family, recompute):
    logits, *_ = sample(131, torch.float32)
    t, options = soft(logits), {"activation": family, "recompute": recompute}
    want = loss_and_grad(backend, logits, t, **options)
    leaf = logits.clone().requires_grad_()
    x = leaf * 1
    loss = class_balanced_loss(x, t, inplace=True, backend=backend.argument, **options)
    loss.backward()
    torch.testing.assert_close(loss.detach(), want[0])
    torch.testing.assert_close(leaf.grad, want[1])
    with pytest.raises(ValueError, match="over target"):
        class_balanced_loss(x, x.detach(), inplace=True, backend=backend.argument, **options)


def test_no_labels_at_all(backend):
    """Softmax: nothing to learn but smoothness. Sigmoid: all are negatives. Both with weight 1."""
    logits, _, weight, _ = sample(10)
    t = torch.zeros_like(logits)
    loss, grad = loss_and_grad(backend, logits, t, weight)
    assert loss == 0
    assert (grad == 0).all()
    loss, _ = loss_and_grad(backend, logits, t, weight, label_smoothing=0.1)
    torch.testing.assert_close(loss, -0.1 * F.log_softmax(logits, 1).mean())
    loss, _ = loss_and_grad(backend, logits, t, weight, activation="sigmoid")
    torch.testing.assert_close(loss, F.softplus(logits).sum(1).mean())


@pytest.mark.parametrize("shape", ((300, 1031), (9000, 3), (2, 5, 60, 60)), ids=str)
@pytest.mark.parametrize("reduction", ("mean", "weighted_mean"))
@FAMILY
def test_threads_change_no_bit(backend, family, reduction, shape):
    if backend.gpu:
        pytest.skip("has none of torch's threads")
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits, w = torch.randn(shape, generator=generator), torch.rand(shape[1], generator=generator)
    t, options = soft(logits), {"activation": family, "reduction": reduction}
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(loss_and_grad(backend, logits, t, w, recompute=threads > 2, **options))
    finally:
        torch.set_num_threads(before)
    assert all(backend.same(loss, results[0][0]) for loss, _ in results)
    assert backend.same(results[1][1], results[0][1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@FAMILY
def test_compile(family):
    torch._dynamo.reset()
    logits, *_ = sample(10, torch.float32)
    t = soft(logits).float()
    loss_fn = ClassBalancedLoss(range(1, 11), activation=family)
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    got = with_autograd(lambda x: compiled(x, t), logits)
    want = with_autograd(lambda x: loss_fn(x, t), logits)
    torch.testing.assert_close(got, want)
