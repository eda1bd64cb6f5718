"""What a ClassBalancedLoss owns: its buffers, its options, how far it is re-weighted."""

from __future__ import annotations

import copy
import typing
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from support.state import COUNTS, assert_unchanged, snapshot
from torch import nn

from cbloss_fused import (
    ClassBalancedLoss,
    DeferredReweighting,
    class_balanced_loss,
    class_balanced_weights,
    class_counts,
    logit_adjustment,
)
from cbloss_fused.options import Options

LOGITS = torch.linspace(-3, 3, 24).reshape(6, 4).sin() * 4
TARGET = torch.tensor([0, 1, 2, 3, 0, 2])


# Dtypes and devices -------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", ("half", "bfloat16"))
def test_small_weights_survive_half_precision(cast: str) -> None:
    bias = torch.tensor([1e-9, 1.0])
    loss_fn = ClassBalancedLoss([10**9, 1], 1.0, logit_bias=bias)
    before = loss_fn.weight.clone()
    getattr(loss_fn, cast)().float()
    assert torch.equal(loss_fn.weight, before)
    assert loss_fn.logit_bias is not None and torch.equal(loss_fn.logit_bias, bias)
    assert loss_fn.double().weight.dtype == torch.float64


@pytest.mark.parametrize("within", (False, True), ids=("given", "made-there"))
def test_late_initialisation(within: bool) -> None:
    """Of vectors of the caller's own, and of ones that are made beside the module."""
    n = [80.0, 10.0, 5.0, 5.0]
    margin = torch.tensor([0.1, 0.2, 0.3, 0.4])
    with torch.device("meta") if within else nullcontext():
        bias = logit_adjustment(n)
        counts = class_counts([0] * 16 + [1, 1, 2, 3])
    with torch.device("meta"):
        loss_fn = ClassBalancedLoss(
            n, 0.9, activation="sigmoid", logit_bias=bias, margin=margin, pos_weight=[1, 2, 3, 4]
        )
        assert ClassBalancedLoss(counts, 1.0).counts.tolist() == [16, 2, 1, 1]
        assert ClassBalancedLoss.from_labels([0, 1, 1]).counts.tolist() == [1, 2]
    assert loss_fn.weight.is_meta
    loss_fn.to_empty(device="cpu")
    for buffer in loss_fn.buffers():
        buffer.fill_(float("nan"))
    loss_fn.reset_parameters()
    assert torch.equal(loss_fn.weight, class_balanced_weights(n, 0.9))
    want = {"logit_bias": (torch.tensor(n) / 100).log(), "margin": margin,
            "pos_weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}  # fmt: skip
    for name, vector in want.items():
        torch.testing.assert_close(getattr(loss_fn, name), vector)


@pytest.mark.parametrize("name", ("counts", "logit_bias", "margin", "pos_weight"))
def test_what_has_no_values_cannot_be_kept(name: str) -> None:
    given: dict[str, Any] = {"counts": COUNTS, name: torch.ones(4, device="meta")}
    with pytest.raises(TypeError, match=f"{name} .*meta tensor"):
        ClassBalancedLoss(**given, activation="sigmoid")


def test_a_module_without_values_takes_vectors_without_values() -> None:
    loss_fn = ClassBalancedLoss(COUNTS, 0.9, margin=torch.ones(4)).to("meta")
    loss_fn.margin = torch.zeros(4, device="meta")
    assert loss_fn.margin.is_meta


@pytest.mark.parametrize("counts", (COUNTS, torch.tensor(COUNTS)), ids=("list", "tensor"))
def test_a_module_without_values_takes_memory_without_values(counts: Any) -> None:
    """As transformers gives to what a checkpoint lacks, before it has it initialised."""
    with torch.device("meta"):
        loss_fn = ClassBalancedLoss(counts, 0.9, margin=[0.1] * 4)
    for name in ("weight", "margin"):
        with pytest.raises(ValueError, match=rf"{name} must .*\(4,\)"):
            setattr(loss_fn, name, torch.full((5,), float("nan")))
        setattr(loss_fn, name, torch.full((4,), float("nan")))
    loss_fn.reset_parameters()
    assert torch.equal(loss_fn.weight, class_balanced_weights(COUNTS, 0.9))
    with pytest.raises(ValueError, match=r"weight.* = nan"):
        loss_fn.weight = torch.full((4,), float("nan"))


def test_a_reset_gives_what_the_module_was_made_of() -> None:
    loss_fn = ClassBalancedLoss(COUNTS, 0.9, margin=torch.ones(4), logit_bias=torch.ones(4))
    assert loss_fn.margin is not None
    loss_fn.margin.fill_(7)
    loss_fn.logit_bias = None
    loss_fn.reset_parameters()
    assert loss_fn.margin.tolist() == [1] * 4
    assert loss_fn.logit_bias is None


# Whose memory -------------------------------------------------------------------------------------


def test_what_the_caller_gives_stays_the_callers() -> None:
    counts = torch.tensor(COUNTS, dtype=torch.float64)
    beta, bias = torch.full((4,), 0.9, dtype=torch.float64), torch.ones(4)
    loss_fn = ClassBalancedLoss(counts, beta, logit_bias=bias)
    for tensor in (counts, beta, bias):
        tensor += 0.05
    assert loss_fn.counts.tolist() == COUNTS
    assert loss_fn.beta.tolist() == [0.9] * 4
    assert loss_fn.logit_bias is not None
    assert loss_fn.logit_bias.tolist() == [1.0] * 4
    loss_fn.set_beta(beta)
    beta.zero_()
    assert torch.allclose(loss_fn.beta, torch.full((4,), 0.95, dtype=torch.float64))
    new = torch.ones(4, dtype=torch.float64)
    loss_fn.update_counts(new)
    assert new.tolist() == [1] * 4


# Attributes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", Options._fields)
def test_options_are_attributes(name: str) -> None:
    loss_fn = ClassBalancedLoss(COUNTS)
    assert getattr(loss_fn, name) == getattr(Options(), name)


def test_an_assigned_option_is_used() -> None:
    loss_fn: Any = ClassBalancedLoss(COUNTS, 0.9)
    loss_fn.reduction = "none"
    loss_fn.gamma = 2.0
    want = class_balanced_loss(LOGITS, TARGET, loss_fn.weight, reduction="none", gamma=2.0)
    assert torch.equal(loss_fn(LOGITS, TARGET), want)
    assert "gamma=2.0" in repr(loss_fn)
    assert copy.deepcopy(loss_fn).gamma == 2.0


def test_an_assigned_number_is_a_plain_one() -> None:
    loss_fn: Any = ClassBalancedLoss(COUNTS, 0.9, gamma=torch.tensor(0.5))  # type: ignore[arg-type]
    loss_fn.logit_scale = torch.tensor(2.0)
    loss_fn.label_smoothing = np.float32(0.25)
    loss_fn.z_loss = nn.Parameter(torch.tensor(0.125), requires_grad=False)
    loss_fn.ignore_index = torch.tensor(-1)
    loss_fn.inplace = np.bool_(False)
    want = Options(gamma=0.5, logit_scale=2.0, label_smoothing=0.25, z_loss=0.125, ignore_index=-1)
    assert loss_fn.options == want
    assert list(map(type, loss_fn.options)) == list(map(type, want))
    assert repr(loss_fn).endswith(
        "gamma=0.5, label_smoothing=0.25, z_loss=0.125, logit_scale=2.0, ignore_index=-1)"
    )
    assert not list(loss_fn.parameters())


@pytest.mark.parametrize("name", ("gamma", "logit_scale", "label_smoothing"))
def test_a_learnable_number_is_refused_as_the_function_refuses_it(name: str) -> None:
    loss_fn, given = ClassBalancedLoss(COUNTS, 0.9), nn.Parameter(torch.tensor(0.5))
    before, given_options = snapshot(loss_fn), {name: given}
    with pytest.raises(ValueError, match=f"{name} requires grad") as of_the_function:
        class_balanced_loss(LOGITS, TARGET, **given_options)  # type: ignore[call-overload]
    with pytest.raises(ValueError) as of_the_module:
        setattr(loss_fn, name, given)
    assert str(of_the_module.value) == str(of_the_function.value)
    assert_unchanged(loss_fn, before)


ASSIGNED: dict[str, tuple[str, Any, type[Exception]]] = {
    "gamma": ("gamma", -1.0, ValueError),
    "reduction": ("reduction", "avg", ValueError),
    "together": ("z_loss", 0.1, ValueError),
    "options": ("options", {"gamma": 1.0}, TypeError),
    "parameter": ("weight", nn.Parameter(torch.ones(4), requires_grad=False), TypeError),
    "none": ("weight", None, TypeError),
    "list": ("weight", [1.0] * 4, TypeError),
    "length": ("weight", torch.ones(5), ValueError),
    "grad": ("margin", torch.ones(4, requires_grad=True), ValueError),
}


@pytest.mark.parametrize("name, value, error", ASSIGNED.values(), ids=ASSIGNED.keys())
def test_a_wrong_assignment_changes_nothing(name: str, value: Any, error: type[Exception]) -> None:
    loss_fn = ClassBalancedLoss(COUNTS, 0.9, activation="sigmoid", margin=torch.ones(4))
    before = snapshot(loss_fn)
    with pytest.raises(error, match=name):
        setattr(loss_fn, name, value)
    assert_unchanged(loss_fn, before)
    loss_fn(LOGITS, TARGET)


def test_annotations_are_understood_without_our_names() -> None:
    """fastai's BaseLoss evaluates those of the loss that it wraps."""
    typing.get_type_hints(ClassBalancedLoss(COUNTS), globalns={}, localns={})


def test_a_weight_may_be_assigned() -> None:
    loss_fn = ClassBalancedLoss(COUNTS, 0.9)
    loss_fn.weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    want = class_balanced_loss(LOGITS, TARGET, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert torch.equal(loss_fn(LOGITS, TARGET), want)


# Deferred re-weighting ----------------------------------------------------------------------------


def test_deferred_weights_stay_deferred() -> None:
    labels = [0] * 90 + [1] * 10
    loss_fn = ClassBalancedLoss.from_labels(labels, beta=0.9999)
    schedule = DeferredReweighting(loss_fn, 2)
    for _ in range(2):
        loss_fn.update_counts([1, 0])
        loss_fn.set_beta(0.999)
        assert loss_fn.weight.tolist() == [1, 1]
        schedule.step()
    assert torch.equal(loss_fn.weight, class_balanced_weights([92, 10], 0.999))


def test_annealed_weights_stay_annealed() -> None:
    loss_fn = ClassBalancedLoss([90, 10], 0.99)
    DeferredReweighting(loss_fn, 0, anneal_epochs=1)  # N = 100 ** (1 / 2)
    torch.testing.assert_close(loss_fn.weight, class_balanced_weights([90, 10], 0.9))
    loss_fn.update_counts([10, 0])
    torch.testing.assert_close(loss_fn.weight, class_balanced_weights([100, 10], 0.9))
    before = snapshot(loss_fn)
    with pytest.raises(ValueError, match="beta < 1"):
        loss_fn.set_beta(1.0)
    assert_unchanged(loss_fn, before)


def test_deferred_weights_of_empty_classes() -> None:
    loss_fn = ClassBalancedLoss([9, 0, 1], 0.9, empty="zero")
    DeferredReweighting(loss_fn, 5)
    assert loss_fn.weight.tolist() == [1, 0, 1]


def test_a_schedule_goes_on_where_the_loaded_loss_was() -> None:
    loss_fn, resumed = (ClassBalancedLoss(COUNTS, 0.99) for _ in range(2))
    schedule = DeferredReweighting(loss_fn, 2)
    for _ in range(3):
        schedule.step()
    resumed.load_state_dict(loss_fn.state_dict())
    again = DeferredReweighting(resumed, 2)
    assert again.epoch == 3
    assert torch.equal(resumed.weight, class_balanced_weights(COUNTS, 0.99))
    again.reset()
    assert again.epoch == 0
    assert resumed.weight.tolist() == [1] * 4


def test_a_schedule_goes_to_a_given_epoch() -> None:
    loss_fn = ClassBalancedLoss(COUNTS, 0.99)
    schedule = DeferredReweighting(loss_fn, 2, anneal_epochs=2)
    weights = []
    for _ in range(6):
        weights.append(loss_fn.weight.clone())
        schedule.step()
    for epoch in (3, 0, 5, 2):
        schedule.step(epoch)
        assert schedule.epoch == epoch
        assert torch.equal(loss_fn.weight, weights[epoch])
    schedule.step()
    assert schedule.epoch == 3
    with pytest.raises(ValueError, match="epoch must be an int >= 0, got -1"):
        schedule.step(-1)
    assert schedule.epoch == 3


def test_a_schedule_takes_any_integer() -> None:
    for three in (np.int64(3), torch.tensor(3)):
        loss_fn = ClassBalancedLoss([90, 10], 0.99)
        schedule = DeferredReweighting(loss_fn, three, np.int32(1))  # type: ignore[arg-type]
        schedule.load_state_dict({"epoch": np.int64(3)})
        torch.testing.assert_close(loss_fn.weight, class_balanced_weights([90, 10], 0.9))
        assert schedule.state_dict() == {"epoch": 3}
        assert type(schedule.epoch) is int and type(schedule.start_epoch) is int
        schedule.step(np.int64(4))
        assert type(schedule.epoch) is int
        with pytest.raises(ValueError, match=r"epoch must be an int >= 0, got 1.5"):
            schedule.load_state_dict({"epoch": 1.5})  # type: ignore[dict-item]


def test_a_schedule_refuses_what_is_no_loss() -> None:
    with pytest.raises(TypeError, match=r"loss_fn must be a ClassBalancedLoss, got int"):
        DeferredReweighting(3, start_epoch=3)  # type: ignore[arg-type]
