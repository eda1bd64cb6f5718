"""Shapes, strides, offsets; nothing outside is touched; no order depends on threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.backends import (
    DEVICE,
    INTERPRETED,
    gradient_arguments,
    loss_and_grad,
    operator_arguments,
)
from support.marks import DTYPES, FAMILIES, name_of
from support.oracle import oracle
from support.tolerances import assert_grad, assert_loss, same_bits

from cbloss_fused import class_balanced_loss
from cbloss_fused.buffers import new_saved
from cbloss_fused.inputs import Inputs

FAMILY = pytest.mark.parametrize("family", FAMILIES)
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
MODES = pytest.mark.parametrize(
    "options",
    ({}, {"recompute": True}, {"reduction": "none"}, {"reduction": "sum", "label_smoothing": 0.1}),
    ids=("stored", "recomputed", "none", "smoothed"),
)


def random(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def labels(logits, seed=1):
    """Random classes, a tenth of them ignored."""
    shape, C = logits.shape[:1] + logits.shape[2:], logits.shape[1]
    generator = torch.Generator(DEVICE).manual_seed(seed)
    y = torch.randint(C, shape, generator=generator)
    return y.where(torch.rand(shape, generator=generator) > 0.1, -100)


def check(backend, logits, **options):
    """Loss and gradient against float64 of a contiguous copy; the inputs stay as they are."""
    target = labels(logits)
    weight, sample_weight = torch.rand(logits.shape[1]) + 0.5, torch.rand(target.shape) + 0.5
    before = logits.clone()
    options = {"sample_weight": sample_weight, "gamma": 0.5, **options}
    loss, grad = loss_and_grad(backend, logits, target, weight, **options)
    options.pop("recompute", None)
    want = oracle(logits.contiguous(), target, weight, **options)
    assert_loss(loss, want[0], logits.dtype)
    assert_grad(grad, want[1], logits.dtype)
    assert same_bits(logits, before)


SHAPES = (
    *((1, 3), (7, 5), (40, 130), (3, 5, 4), (2, 70, 3)),
    *((2, 5, 4, 6), (2, 3, 4, 2, 5), (2, 4, 1, 1, 1, 3)),
)


@MODES
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@DTYPE
@FAMILY
def test_shapes(backend, family, dtype, shape, options):
    check(backend, random(*shape, dtype=dtype), activation=family, **options)


@MODES
@DTYPE
@FAMILY
def test_one_sample(backend, family, dtype, options):
    for C in (3, 131):
        logits, target = random(C, dtype=dtype), torch.tensor(C - 1)
        options = {"activation": family, **options}
        loss, grad = loss_and_grad(
            backend, logits, target, sample_weight=torch.tensor(0.5), **options
        )
        batch = loss_and_grad(
            backend, logits[None], target[None], sample_weight=torch.tensor([0.5]), **options
        )
        assert torch.equal(loss, batch[0].squeeze())
        assert torch.equal(grad, batch[1][0])


def strided(dtype=torch.float32):
    """A tensor of every layout."""
    big = random(30, 200, dtype=dtype)
    image = random(3, 6, 4, 5, dtype=dtype)
    return {
        "transposed": big.t(),
        "sliced": big[:, 5:95],
        "every-second-class": big[:, ::2],
        "every-third-row": big[::3],
        "expanded-rows": big[:1].expand(9, 200),
        "expanded-classes": big[:, :1].expand(30, 80),
        "expanded-both": big[:1, :1].expand(9, 5),
        "few-of-many": big[:, 7:10],
        "channels-last": image.contiguous(memory_format=torch.channels_last),
        "channels-last-many": random(2, 70, 3, 3, dtype=dtype).contiguous(
            memory_format=torch.channels_last
        ),
        "permuted": image.permute(3, 1, 0, 2),
        "cropped": image[:, 1:5, 1:3, ::2],
        "expanded-image": image[:, :, :1].expand(3, 6, 7, 5),
        "sequence": random(4, 6, 80, dtype=dtype).transpose(1, 2),
        "many-rows": random(5000, 3, dtype=dtype),
        "many-pixels": random(2, 3, 50, 60, dtype=dtype),
        "odd-pixels": random(2, 3, 7, 21, dtype=dtype),
        "pixels-of-many": random(1, 150, 5, 15, dtype=dtype),
    }


LAYOUTS = tuple(strided())


@MODES
@pytest.mark.parametrize("layout", LAYOUTS)
@DTYPE
@FAMILY
def test_strides(backend, family, dtype, layout, options):
    check(backend, strided(dtype)[layout], activation=family, **options)


@pytest.mark.parametrize("layout", ("channels-last", "odd-pixels", "pixels-of-many"))
@FAMILY
def test_strides_of_adjusted_logits(backend, family, layout):
    logits = strided()[layout]
    vectors = {name: torch.rand(logits.shape[1]) for name in ("logit_bias", "margin")}
    check(backend, logits, activation=family, logit_scale=2.0, **vectors)


@FAMILY
def test_strides_of_targets_and_sample_weights(backend, family):
    logits = random(4, 5, 6)
    target, sample_weight = labels(logits), torch.rand(4, 6)
    options = {"activation": family, "reduction": "none"}
    want = loss_and_grad(
        backend, logits, target, torch.ones(5), sample_weight=sample_weight, **options
    )
    wide = torch.zeros(6, 8, dtype=torch.int64)
    wide[:, ::2] = target.t()
    got = loss_and_grad(
        backend,
        logits,
        wide[:, ::2].t(),
        torch.ones(10)[::2],
        sample_weight=sample_weight.t().contiguous().t(),
        **options,
    )
    assert same_bits(got[0], want[0])
    assert same_bits(got[1], want[1])
    incoming = random(6, 4).t()
    strided_incoming = loss_and_grad(backend, logits, target, grad_output=incoming, **options)
    dense = loss_and_grad(backend, logits, target, grad_output=incoming.contiguous(), **options)
    assert same_bits(strided_incoming[1], dense[1])


# Canaries -----------------------------------------------------------------------------------------

CLASSES = (1, 2, 7, 8, 9, 63, 64, 65, 99, 100, 101, 127, 128, 129, 1000)


def framed(values, offset, gap, sentinel):
    """(buffer, view): the view holds values, starts at offset, its rows lie gap elements apart."""
    n, C = values.shape
    buffer = torch.full((offset + n * (C + gap) + 70,), sentinel, dtype=values.dtype)
    view = buffer.as_strided(values.shape, (C + gap, 1), offset)
    view.copy_(values)
    return buffer, view


def outside(buffer, view):
    """What the buffer holds next to the view."""
    rest = torch.ones(buffer.shape, dtype=torch.bool)
    rest.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    return buffer[rest]


@pytest.mark.parametrize("C", CLASSES, ids="C{}".format)
@DTYPE
@FAMILY
def test_nothing_outside_is_read_or_written(backend, family, dtype, C, pytestconfig):
    nan, sentinel = float("nan"), 77.0
    logits = random(19 if C < 100 else 3, C, dtype=dtype)
    target = labels(logits)
    arguments, loss, formula = operator_arguments(logits, target, family)
    grad, again, got = torch.empty_like(logits), torch.empty_like(logits), torch.empty_like(loss)
    saved = new_saved(logits, family == "sigmoid")
    backend.record.loss(*arguments, loss, grad, None)
    backend.record.loss(*arguments, got, None, saved)
    incoming = torch.ones_like(loss)

    def recompute(x, y, saved, grad):
        inputs = Inputs(y)
        backend.record.gradient(*gradient_arguments(x, inputs, saved, incoming, formula, grad))

    recompute(logits, target, saved, again)
    few = INTERPRETED and not pytestconfig.getoption("long")
    for offset in range(0, 10, 3 if few else 1):
        buffer, x = framed(logits, offset, offset % 4, nan)
        out, g = framed(torch.full_like(logits, nan), 9 - offset, offset % 3, sentinel)
        frame, s = framed(torch.full_like(saved, nan), offset, 0, sentinel)
        y = torch.full((offset + len(target) + 9,), 10**9)[offset:][: len(target)].copy_(target)

        backend.record.loss(x, y, *arguments[2:], got, g, None)
        assert backend.same(got, loss)  # the NaN around the logits has no influence
        assert backend.same(g, grad)
        assert (outside(out, g) == sentinel).all()

        backend.record.loss(x, y, *arguments[2:], got, None, s)
        g.fill_(nan)
        recompute(x, y, s, g)
        assert backend.same(s, saved)
        assert backend.same(g, again)
        assert (outside(out, g) == sentinel).all()
        assert (outside(frame, s) == sentinel).all()
        assert same_bits(x, logits)

        backend.record.loss(x, y, *arguments[2:], got, x, None)  # in place
        assert backend.same(x, grad)
        assert outside(buffer, x).isnan().all()


@pytest.mark.parametrize(
    "layout", ("channels-last", "cropped", "permuted", "few-of-many", "transposed", "odd-pixels")
)
@DTYPE
@FAMILY
def test_nothing_outside_a_strided_gradient_is_written(backend, family, dtype, layout):
    logits = strided(dtype)[layout]
    logits = logits.reshape(logits.shape[0], logits.shape[1], -1)
    target, K = labels(logits), logits.shape[2]
    grads = []
    for strides in ((K, 1), (1, logits.shape[1])):
        buffer = torch.full((3 * logits.numel() + 99,), 77.0, dtype=dtype)
        row = 2 * logits.shape[1] * K + 1
        g = buffer.as_strided(logits.shape, (row, *strides), 5)
        arguments, loss, _ = operator_arguments(logits, target, family, 2.0, 0.1, "sum")
        backend.record.loss(*arguments, loss, g, None)
        assert (outside(buffer, g) == 77).all()
        grads.append(g)
    rtol = 0.01 if dtype.itemsize == 2 else 1e-5
    torch.testing.assert_close(grads[0], grads[1], rtol=rtol, atol=1e-5)


# In place and threads -----------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", (False, True), ids=("stored", "recomputed"))
@pytest.mark.parametrize(
    "shape", ((33, 3), (9, 200), (2, 5, 3, 4), (2, 70, 5), (2, 3, 147)), ids=str
)
@DTYPE
@FAMILY
def test_in_place_gives_the_same_bits(backend, family, dtype, shape, recompute):
    logits = random(*shape, dtype=dtype)
    target = labels(logits)
    options = {"activation": family, "gamma": 2.0, "recompute": recompute}
    want = loss_and_grad(backend, logits, target, **options)
    leaf = logits.clone().requires_grad_()
    middle = leaf * 1
    loss = class_balanced_loss(middle, target, inplace=True, backend=backend.argument, **options)
    loss.backward()
    assert same_bits(loss.detach(), want[0])
    assert same_bits(leaf.grad, want[1])
    assert same_bits(middle.detach(), want[1])


@pytest.mark.parametrize("C", (3, 128), ids="C{}".format)
@FAMILY
def test_an_ignored_row_is_one_whatever_the_others_weigh(backend, family, C):
    """Also where the sum of the weights, by which r is divided, is infinite."""
    leaf = random(4, C, dtype=torch.float32).requires_grad_()
    whole = leaf * 1
    before, logits = whole.detach().clone(), whole[1:]
    target = torch.tensor([-100, 2, 1])
    huge = torch.full((C,), 1e30), torch.full((3,), 1e30)
    class_balanced_loss(
        logits, target, huge[0], sample_weight=huge[1], reduction="weighted_mean",
        activation=family, inplace=True, backend=backend.argument,
    )  # fmt: skip
    assert same_bits(whole.detach()[0], before[0])
    assert (logits.detach()[0] == 0).all()


@pytest.mark.parametrize("reduction", ("none", "mean", "weighted_mean"))
@pytest.mark.parametrize(
    "shape",
    ((257, 1000), (20_001, 3), (300, 64), (3, 8142), (7, 10, 30, 31), (2, 100, 500)),
    ids=str,
)
@FAMILY
def test_threads_change_no_bit(backend, family, shape, reduction):
    if backend.gpu:
        pytest.skip("has none of torch's threads")
    logits = random(*shape)
    target = labels(logits)
    options = {
        "activation": family,
        "gamma": 0.5,
        "reduction": reduction,
        "sample_weight": torch.rand(target.shape),
    }
    weight = torch.rand(shape[1])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(loss_and_grad(backend, logits, target, weight, **options))
    finally:
        torch.set_num_threads(before)
    for loss, grad in results[1:]:
        assert backend.same(loss, results[0][0])
        assert backend.same(grad, results[0][1])


@pytest.mark.parametrize("rows", (100, 120), ids="N{}".format)
def test_threads_change_no_bit_of_vectors_of_rows(backend, rows):
    """Rows that share a vector may share a formula: as multi-hot ones with pos_weight."""
    if backend.gpu:
        pytest.skip("has none of torch's threads")
    logits = random(1500, rows).t()
    target = (random(rows, 1500) > 2.5).float()
    options: dict[str, Any] = {"activation": "sigmoid", "reduction": "none"}
    options["pos_weight"] = torch.rand(1500)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(loss_and_grad(backend, logits, target, **options))
    finally:
        torch.set_num_threads(before)
    for loss, grad in results[1:]:
        assert backend.same(loss, results[0][0])
        assert backend.same(grad, results[0][1])
