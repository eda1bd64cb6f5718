"""Soft targets that are out of range: on the CPU the first is named."""

from __future__ import annotations

import re
from math import inf, nan

import pytest
import torch
from support.backends import DEVICE, loss_and_grad
from support.marks import DTYPES, FAMILIES, name_of
from support.soft import LAYOUTS
from torch._subclasses import FakeTensorMode

from cbloss_fused import ClassBalancedLoss, class_balanced_loss

FAMILY = pytest.mark.parametrize("family", FAMILIES)
BAD = {"softmax": (-0.5, -inf, inf, nan), "sigmoid": (-0.5, -inf, inf, nan, 1.5)}


def refused(index, value, family):
    wanted = "in [0, 1]" if family == "sigmoid" else "finite and >= 0"
    return "^" + re.escape(f"target{list(index)} = {value:g}: must be {wanted}")


def calls(backend, family, logits, target):
    """A loss in every way that reads targets, each of which has to raise."""
    C = logits.shape[0 if logits.dim() == 1 else 1]
    options = {"activation": family, "backend": backend.argument}
    weight = torch.linspace(0, 1, C)  # of 0 too: a bad target has to be found all the same
    leaf = logits.clone().requires_grad_()
    yield lambda: class_balanced_loss(logits, target, **options)
    yield lambda: ClassBalancedLoss(range(1, C + 1), **options)(leaf, target)
    for how in ({"recompute": False}, {"recompute": True}, {"reduction": "weighted_mean"}):
        yield lambda how=how: class_balanced_loss(leaf, target, **options, **how)
        yield lambda how=how: class_balanced_loss(leaf, target, weight, **options, **how)
    x = leaf * 1
    for how in ({"recompute": False}, {"recompute": True}, {"reduction": "weighted_mean"}):
        yield lambda how=how: class_balanced_loss(x, target, weight, **options, **how, inplace=True)
        assert torch.equal(x, logits)


@pytest.mark.parametrize("target_dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape, order", LAYOUTS.values(), ids=LAYOUTS.keys())
@FAMILY
def test_a_bad_value_is_named(backend, family, shape, order, target_dtype):
    """The first, by its index in the target as given; and nothing else happens."""
    if backend.gpu:
        pytest.skip("uses values as given")
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.randn(shape, generator=generator)
    target = (torch.rand(shape, generator=generator) > 0.6).to(target_dtype)
    if order is not None:
        logits, target = logits.permute(order), target.permute(order)
    place = torch.arange(target.numel()).reshape(target.shape)
    for value in BAD[family]:
        for first in (0, target.numel() // 3, target.numel() - 1):
            bad = target.clone()
            bad[place >= first] = value
            index = [int(i) for i in torch.unravel_index(torch.tensor(first), target.shape)]
            for call in calls(backend, family, logits, bad):
                with pytest.raises(ValueError, match=refused(index, value, family)):
                    call()


@pytest.mark.parametrize("shape", ((1000, 131), (9000, 3), (2, 5, 60, 60)), ids=str)
@FAMILY
def test_the_first_bad_value_on_any_number_of_threads(backend, family, shape):
    if backend.gpu:
        pytest.skip("uses values as given")
    logits, target = torch.zeros(shape), torch.zeros(shape)
    target[1, 1:] = nan
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            index = (1, 1, 0, 0)[: len(shape)]
            with pytest.raises(ValueError, match=refused(index, nan, family)):
                class_balanced_loss(logits, target, activation=family, backend=backend.argument)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("C", (3, 131), ids="C{}".format)
@FAMILY
def test_values_in_range(backend, family, C):
    """Both ends of its range, -0 for 0; expanded; bool, which nothing has to look at."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits, t = torch.randn(9, C, generator=generator), torch.rand(9, C, generator=generator)
    t[0], t[1], t[2, 0] = 0, 1, 1e-45
    want = loss_and_grad(backend, logits, t, activation=family)
    minus = torch.where(t == 0, -0.0, t)
    for a, b in zip(loss_and_grad(backend, logits, minus, activation=family), want, strict=True):
        torch.testing.assert_close(a, b)
    one = torch.ones(()).expand(9, C)
    want = loss_and_grad(backend, logits, one.contiguous(), activation=family)
    for all_labels in (one, one.bool()):
        got = loss_and_grad(backend, logits, all_labels, activation=family)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
    if family == "softmax":
        loss, _ = loss_and_grad(backend, logits, 1e30 * t)
        torch.testing.assert_close(loss, 1e30 * loss_and_grad(backend, logits, t)[0])


@FAMILY
def test_bad_values_are_found_anywhere_in_a_row(backend, family):
    if backend.gpu:
        pytest.skip("uses values as given")
    logits, options = torch.zeros(3, 131), {"activation": family, "backend": backend.argument}
    with pytest.raises(ValueError, match=refused((0, 0), -0.5, family)):
        class_balanced_loss(logits, torch.tensor(-0.5).expand(3, 131), **options)
    for c in (0, 65, 130):  # alone: at the first of the largest logits, within a vector, in a rest
        target = torch.zeros(3, 131)
        target[1, c] = nan
        with pytest.raises(ValueError, match=refused((1, c), nan, family)):
            class_balanced_loss(logits, target, **options)
    target = torch.zeros(3, 131)
    if family == "sigmoid":
        target[2, 130] = 1 + 2**-23
        with pytest.raises(ValueError, match=r"target\[2, 130\] = 1\.0000001"):
            class_balanced_loss(logits, target, **options)
        target = target.double()
        target[2, 130] = 1 + 2**-52
        with pytest.raises(ValueError, match=r"target\[2, 130\] = 1\.0000000000000002: "):
            class_balanced_loss(logits.double(), target, **options)
    target[2, 130] = -1
    with pytest.raises(ValueError, match="sample_weight"):  # one per row: looked at before
        class_balanced_loss(logits, target, sample_weight=torch.full((3,), nan), **options)


def test_the_reference_names_bad_values():
    target = torch.zeros(2, 3, 2, 2, device="cpu")  # elsewhere nothing looks
    target[1, 2, 0, 1] = -0.5
    for t, index in ((target, (1, 2, 0, 1)), (target[1, :, 0, 1], (2,))):
        for family in FAMILIES:
            with pytest.raises(ValueError, match=refused(index, -0.5, family)):
                class_balanced_loss(torch.zeros_like(t), t, activation=family, backend="reference")


@pytest.mark.parametrize("argument", (None, "reference"))
def test_a_fake_tensor_has_no_values(argument):
    with FakeTensorMode():
        loss = class_balanced_loss(torch.zeros(4, 3), torch.zeros(4, 3), backend=argument)
    assert loss.shape == ()
