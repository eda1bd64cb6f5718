"""What a ClassBalancedLoss owns: its state, its buffers, its options, how far it is re-weighted."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from cbloss_fused import (
    ClassBalancedLoss,
    DeferredReweighting,
    class_balanced_loss,
    class_balanced_weights,
)
from cbloss_fused.options import Options

COUNTS = [100, 10, 1, 40]
LOGITS = torch.linspace(-3, 3, 24).reshape(6, 4).sin() * 4
TARGET = torch.tensor([0, 1, 2, 3, 0, 2])


def snapshot(loss_fn: ClassBalancedLoss) -> dict[str, Any]:
    state = {name: value.clone() for name, value in loss_fn.state_dict().items()}
    return state | {"options": loss_fn.options, "version": loss_fn.weight._version}


def assert_unchanged(loss_fn: ClassBalancedLoss, before: dict[str, Any]) -> None:
    after = snapshot(loss_fn)
    assert after.keys() == before.keys()
    for name, value in before.items():
        same = torch.equal(after[name], value) if isinstance(value, torch.Tensor) else None
        assert after[name] == value if same is None else same, name


# state_dict ---------------------------------------------------------------------------------------


def test_a_state_is_tensors_that_can_be_averaged_and_saved() -> None:
    loss_fn = ClassBalancedLoss(COUNTS, 0.9, margin=torch.ones(4))
    state = loss_fn.state_dict()
    assert sorted(state) == ["beta", "counts", "margin", "schedule", "weight"]
    assert all(type(value) is torch.Tensor for value in state.values())
    average = {name: (value + value) / 2 for name, value in state.items()}
    loss_fn.load_state_dict(average)
    file = io.BytesIO()
    torch.save(nn.Sequential(nn.Linear(2, 4), loss_fn).state_dict(), file)
    file.seek(0)
    other = nn.Sequential(nn.Linear(2, 4), ClassBalancedLoss([1] * 4, 0.0, margin=torch.zeros(4)))
    other.load_state_dict(torch.load(file, weights_only=True))
    for name, value in state.items():
        assert torch.equal(other[1].state_dict()[name], value), name


def test_a_state_is_not_the_modules_own_memory() -> None:
    loss_fn = ClassBalancedLoss(COUNTS, 0.9)
    loss_fn.state_dict()["counts"].fill_(7)
    assert loss_fn.counts.tolist() == COUNTS


def test_weights_of_cross_entropy_load() -> None:
    saved = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0, 4.0])).state_dict()
    loss_fn = ClassBalancedLoss(COUNTS, 0.9)
    loss_fn.load_state_dict(saved)
    assert loss_fn.weight.tolist() == [1, 2, 3, 4]
    assert loss_fn.counts.tolist() == COUNTS
    assert loss_fn.beta == 0.9


def test_a_state_of_version_0_1_loads() -> None:
    extra = {"counts": torch.tensor([4.0, 3, 2, 1]).double(), "beta": torch.tensor(0.5).double()}
    loss_fn = ClassBalancedLoss(COUNTS, 0.9)
    weight = class_balanced_weights([4, 3, 2, 1], 0.5)
    loss_fn.load_state_dict({"weight": weight, "_extra_state": extra})
    assert torch.equal(loss_fn.weight, weight)
    assert loss_fn.counts.tolist() == [4, 3, 2, 1]
    assert loss_fn.beta == 0.5


def test_weights_of_half_precision_load_as_float32() -> None:
    for assign in (False, True):
        loss_fn = ClassBalancedLoss(COUNTS, 0.9)
        loss_fn.load_state_dict({"weight": torch.ones(4).half()}, assign=assign)
        assert loss_fn.weight.dtype == torch.float32


MISFITS: dict[str, dict[str, Any]] = {
    "weight": {"weight": torch.ones(5)},
    "counts": {"counts": torch.ones(5, dtype=torch.float64)},
    "beta": {"beta": torch.ones(3)},
    "schedule": {"schedule": torch.ones(3)},
    "counts alone": {"beta": None},
    "missing weight": {"weight": None},
    "unexpected margin": {"margin": torch.ones(4)},
    "no tensor": {"counts": [1, 2, 3, 4]},
    "negative": {"counts": torch.tensor([1.0, 2, -1, 3])},
    "nan": {"counts": torch.tensor([1.0, 2, float("nan"), 3])},
    "large": {"beta": torch.tensor(1.5)},
    "epoch": {"schedule": torch.tensor([float("nan"), 1.0])},
    "unknown": {"scales": torch.ones(4)},
}


@pytest.mark.parametrize("changes", MISFITS.values(), ids=MISFITS.keys())
def test_a_state_that_does_not_fit_changes_nothing(changes: dict[str, Any]) -> None:
    state = ClassBalancedLoss([4, 3, 2, 1], 0.5).state_dict() | changes
    loss_fn = ClassBalancedLoss(COUNTS, 0.9)
    before = snapshot(loss_fn)
    with pytest.raises(RuntimeError, match=r"weight|counts|beta|schedule|margin|scales"):
        loss_fn.load_state_dict({name: v for name, v in state.items() if v is not None})
    assert_unchanged(loss_fn, before)


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


def test_late_initialisation() -> None:
    margin = torch.tensor([0.1, 0.2, 0.3, 0.4])
    with torch.device("meta"):
        loss_fn = ClassBalancedLoss(COUNTS, 0.9, margin=margin)
    assert loss_fn.weight.is_meta
    loss_fn.to_empty(device="cpu")
    for buffer in loss_fn.buffers():
        buffer.fill_(float("nan"))
    loss_fn.reset_parameters()
    assert torch.equal(loss_fn.weight, class_balanced_weights(COUNTS, 0.9))
    assert loss_fn.margin is not None and torch.equal(loss_fn.margin, margin)


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


def test_a_schedule_refuses_what_is_no_loss() -> None:
    with pytest.raises(TypeError, match=r"loss_fn must be a ClassBalancedLoss, got int"):
        DeferredReweighting(3, start_epoch=3)  # type: ignore[arg-type]
