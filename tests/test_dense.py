"""Targets that are a number a class: soft, multi-hot; and weights of classes instead of rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    DEVICE,
    DTYPES,
    FAMILIES,
    assert_grad,
    assert_loss,
    loss_and_grad,
    name_of,
    oracle,
)
from conftest import sample as conftest_sample

from cbloss_fused import ClassBalancedLoss, class_balanced_loss

FAMILY = pytest.mark.parametrize("family", FAMILIES)
ANYWHERE = pytest.mark.parametrize("C", (1, 2, 10, 131, 1000), ids="C{}".format)


def sample(C, dtype=torch.float64):
    """logits, class indices, weight, sample_weight; no row is ignored."""
    logits, target, weight, sample_weight = conftest_sample(C, dtype)
    return logits, target.clamp(min=0), weight, sample_weight


def soft(logits, seed=0):
    generator = torch.Generator(logits.device).manual_seed(seed)
    t = torch.rand(logits.shape, generator=generator, dtype=torch.float64).pow(4)
    return t / t.sum(1, keepdim=True)


def with_autograd(function, logits):
    leaf = logits.clone().requires_grad_()
    loss = function(leaf)
    loss.sum().backward()
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


@pytest.mark.parametrize("weighting", ("sample", "class"))
@ANYWHERE
def test_binary_cross_entropy(backend, C, weighting):
    """Multi-label: torch's weight is one a class, ours one a row unless told."""
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

    options = {"activation": "sigmoid", "alpha": p / (1 + p)}
    assert_close(loss_and_grad(backend, logits, t, **options), with_autograd(bce, logits))


def test_weights_of_classes_with_class_indices(backend):
    logits, target, weight, _ = sample(131)
    t, w = F.one_hot(target, 131).double(), weight.double()

    def bce(x):
        return F.binary_cross_entropy_with_logits(x, t, w, reduction="sum") / len(t)

    options = {"activation": "sigmoid", "class_weighting": "class"}
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


LAYOUTS = {
    "vector": ((5,), None),
    "rows": ((6, 5), None),
    "transposed": ((6, 5), (1, 0)),
    "many-classes-apart": ((131, 9), (1, 0)),
    "image": ((2, 5, 5, 7), None),
    "channels-last": ((2, 3, 4, 5), (0, 3, 1, 2)),
}


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


@pytest.mark.parametrize("recompute", (False, True), ids=("stored", "recomputed"))
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
    """Softmax: nothing to learn. Sigmoid: every class is a negative, with weight 1."""
    logits, _, weight, _ = sample(10)
    t = torch.zeros_like(logits)
    loss, grad = loss_and_grad(backend, logits, t, weight)
    assert loss == 0
    assert (grad == 0).all()
    loss, _ = loss_and_grad(backend, logits, t, weight, activation="sigmoid")
    torch.testing.assert_close(loss, F.softplus(logits).sum(1).mean())


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
