"""What a ClassBalancedLoss saves, and what it loads: all of a state, or nothing."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from support.state import COUNTS, assert_unchanged, snapshot
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

from cbloss_fused import (
    ClassBalancedLoss,
    ClassStats,
    DeferredReweighting,
    class_balanced_weights,
)
from cbloss_fused.options import Options


def test_a_state_is_tensors_that_can_be_averaged_and_saved() -> None:
    loss_fn = ClassBalancedLoss(COUNTS, 0.9, margin=torch.ones(4))
    state = loss_fn.state_dict()
    assert sorted(state) == ["_extra_state", "margin", "weight"]
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


def test_every_entry_of_a_state_is_a_buffer_or_the_extra_state() -> None:
    """torch.distributed.checkpoint, transformers and accelerate know no others."""
    loss_fn = ClassBalancedLoss(COUNTS, 0.9, activation="sigmoid", pos_weight=torch.ones(4),
                                margin=torch.ones(4), logit_bias=torch.ones(4))  # fmt: skip
    buffers = {name for name, _ in loss_fn.named_buffers()}
    assert loss_fn.state_dict().keys() == buffers | {"_extra_state"}
    assert not list(loss_fn.parameters())


@pytest.mark.parametrize("beta", (0.9, [0.9, 0.99, 0.5, 0.9]), ids=("one", "per-class"))
def test_entries_set_one_by_one(beta: float | list[float]) -> None:
    """As transformers does: to a model without values, tensors assigned, the extra state handed."""
    loss_fn = ClassBalancedLoss(COUNTS, beta, margin=torch.ones(4))
    DeferredReweighting(loss_fn, 2).step()
    loss_fn.update_counts([1, 1, 1, 1])
    state = loss_fn.half().state_dict()
    with torch.device("meta"):
        other = ClassBalancedLoss([1] * 4, beta, margin=[0.0] * 4)
    for name, value in state.items():
        if name == "_extra_state":
            assert value.dtype == torch.float64 and not other.get_extra_state().is_meta
            other.set_extra_state(value)
        else:
            setattr(other, name, value)
    for name, value in state.items():
        assert torch.equal(other.state_dict()[name], value), name
    assert other.schedule.tolist() == [1, 0]
    assert torch.equal(other.beta, loss_fn.beta)
    other.reset_parameters()  # transformers asks for it if other entries were missing
    assert other.weight.tolist() == [1] * 4


def test_the_schedule_is_read_only() -> None:
    loss_fn = ClassBalancedLoss(COUNTS, 0.9)
    DeferredReweighting(loss_fn, 2).step()
    assert loss_fn.schedule.tolist() == [1, 0]
    loss_fn.schedule.fill_(7)
    assert loss_fn.schedule.tolist() == [1, 0]
    with pytest.raises(AttributeError):
        loss_fn.schedule = torch.zeros(2)  # type: ignore[misc]


def test_one_class_keeps_the_shape_of_its_beta() -> None:
    for beta in (0.5, [0.5]):
        loss_fn, other = ClassBalancedLoss([7], beta), ClassBalancedLoss([1], beta)
        other.load_state_dict(loss_fn.state_dict())
        assert torch.equal(other.beta, loss_fn.beta)
        assert other.counts.tolist() == [7]


def test_distributed_checkpoints() -> None:
    def made(counts: list[float]) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), ClassBalancedLoss(counts, 0.9, margin=torch.ones(4)))

    model, other = made([100, 10, 1, 40]), made([1, 1, 1, 1])
    DeferredReweighting(model[1], 2).step()  # type: ignore[index]
    state = get_model_state_dict(model)
    assert state.keys() == model.state_dict().keys()
    set_model_state_dict(other, state)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert other[1].schedule.tolist() == [1, 0]  # type: ignore[index]


@pytest.mark.parametrize("distributed", (False, True), ids=("torch", "distributed"))
def test_a_checkpoint_in_parts(distributed: bool) -> None:
    """As Accelerate and transformers load large models; no part has all entries of the loss."""

    def made(counts: list[float]) -> nn.ModuleList:
        return nn.ModuleList([nn.Linear(3, 4), ClassBalancedLoss(counts, 0.9, margin=[0.5] * 4)])

    model, other = made([100, 10, 1, 40]), made([1, 1, 1, 1])
    DeferredReweighting(model[1], 2).step()  # type: ignore[arg-type]
    options = StateDictOptions(full_state_dict=True, strict=False)
    for name, value in model.state_dict().items():
        if distributed:
            set_model_state_dict(other, {name: value}, options=options)
        else:
            missing, unexpected = other.load_state_dict({name: value}, strict=False)
            assert name not in missing and not unexpected
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_a_state_that_lacks_entries_is_loaded_as_far_as_it_goes_if_asked() -> None:
    saved = ClassBalancedLoss(COUNTS, 0.9).state_dict()
    for container in (nn.Identity, nn.Sequential):
        loss_fn = ClassBalancedLoss([1] * 4, 0.5, margin=torch.ones(4))
        module, prefix = (loss_fn, "") if container is nn.Identity else (container(loss_fn), "0.")
        state = {prefix + name: value for name, value in (saved | {"scales": 1}).items()}
        missing, unexpected = module.load_state_dict(state, strict=False)
        assert (missing, unexpected) == ([prefix + "margin"], [prefix + "scales"])
        assert loss_fn.counts.tolist() == COUNTS
        assert torch.equal(loss_fn.weight, saved["weight"])


def test_what_goes_beside_a_state_loads_with_weights_only() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    loss_fn = ClassBalancedLoss(COUNTS, 0.9, gamma=np.float64(2.0), logit_scale=torch.tensor(3.0))  # type: ignore[arg-type]
    _, stats = loss_fn(x, torch.tensor([0, 0]), return_stats=True)
    file = io.BytesIO()
    torch.save({"stats": stats, "options": loss_fn.options}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded["stats"], ClassStats)
    assert loaded["stats"].rows.tolist() == [2, 0, 0, 0]
    assert loaded["options"] == Options(gamma=2.0, logit_scale=3.0)


def test_a_state_is_not_the_modules_own_memory() -> None:
    loss_fn, other = (ClassBalancedLoss(COUNTS, 0.9) for _ in range(2))
    state = loss_fn.state_dict()
    other.load_state_dict(state)
    state["_extra_state"].fill_(7)
    assert loss_fn.counts.tolist() == other.counts.tolist() == COUNTS
    assert loss_fn.beta == other.beta == 0.9


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


def test_a_state_without_an_extra_state_loads() -> None:
    loss_fn = ClassBalancedLoss(COUNTS, 0.9)
    loss_fn.load_state_dict(SEPARATE)
    assert loss_fn.weight.tolist() == [1, 2, 3, 4]
    assert loss_fn.counts.tolist() == [4, 3, 2, 1]
    assert loss_fn.beta == 0.5
    assert loss_fn.schedule.tolist() == [3, 0.25]


def test_weights_of_half_precision_load_as_float32() -> None:
    for assign in (False, True):
        loss_fn = ClassBalancedLoss(COUNTS, 0.9)
        loss_fn.load_state_dict({"weight": torch.ones(4).half()}, assign=assign)
        assert loss_fn.weight.dtype == torch.float32


SEPARATE = {
    "weight": torch.tensor([1.0, 2, 3, 4]),
    "counts": torch.tensor([4.0, 3, 2, 1]).double(),
    "beta": torch.tensor(0.5).double(),
    "schedule": torch.tensor([3, 0.25]).double(),
}
EXTRA = [3, 0.25, 0.5, 4, 3, 2, 1]  # the same in one tensor
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
WRONG_EXTRA: dict[str, Any] = {
    "length": torch.ones(6),
    "dimensions": torch.ones(7, 1),
    "no tensor": EXTRA,
    "nothing": None,
    "beta": torch.tensor([*EXTRA[:2], 1.5, *EXTRA[3:]]),
    "nan": torch.tensor([*EXTRA[:6], float("nan")]),
    "epoch": torch.tensor([-1, *EXTRA[1:]]),
}


@pytest.mark.parametrize("changes", MISFITS.values(), ids=MISFITS.keys())
def test_a_state_that_does_not_fit_changes_nothing(changes: dict[str, Any]) -> None:
    loss_fn = ClassBalancedLoss(COUNTS, 0.9)
    before = snapshot(loss_fn)
    with pytest.raises(RuntimeError, match=r"weight|counts|beta|schedule|margin|scales"):
        state = (SEPARATE | changes).items()
        loss_fn.load_state_dict({name: v for name, v in state if v is not None})
    assert_unchanged(loss_fn, before)


@pytest.mark.parametrize("extra", WRONG_EXTRA.values(), ids=WRONG_EXTRA.keys())
def test_an_extra_state_that_does_not_fit_changes_nothing(extra: Any) -> None:
    loss_fn = ClassBalancedLoss(COUNTS, 0.9)
    before = snapshot(loss_fn)
    what = r"_extra_state: the checkpoint has .*, expected \(7,\) or \(10,\)|values outside"
    with pytest.raises(RuntimeError, match=what):
        loss_fn.load_state_dict({"weight": torch.ones(4), "_extra_state": extra})
    other_classes = isinstance(extra, torch.Tensor) and extra.shape == (6,)
    with pytest.warns(match=what) if other_classes else pytest.raises(ValueError, match=what):
        loss_fn.set_extra_state(extra)
    assert_unchanged(loss_fn, before)
    loss_fn.set_extra_state(torch.tensor(EXTRA))
    assert loss_fn.counts.tolist() == EXTRA[3:]


class Learned(ClassBalancedLoss):
    """A loss with a parameter, a buffer and a module of its own."""

    def __init__(self, value: float) -> None:
        super().__init__(COUNTS, 0.9)
        self.scale = nn.Parameter(torch.tensor(value))
        self.register_buffer("seen", torch.tensor(value))
        self.register_buffer("scratch", torch.tensor(value), persistent=False)
        self.head = nn.Linear(1, 1)


@pytest.mark.parametrize("strict", (True, False))
@pytest.mark.parametrize("inside", (True, False), ids=("part", "whole"))
def test_what_a_subclass_has_is_loaded(strict: bool, inside: bool) -> None:
    def model(value: float) -> nn.Module:
        return nn.Sequential(Learned(value)) if inside else Learned(value)

    saved, other = model(2.0), model(3.0)
    state = saved.state_dict()
    assert len(state) == 6
    result = other.load_state_dict(state, strict=strict)
    assert not result.missing_keys
    assert not result.unexpected_keys
    for name, value in other.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_entries_of_a_subclass_that_are_missing_or_unknown() -> None:
    loss_fn = Learned(3.0)
    state = Learned(2.0).state_dict()
    del state["scale"]
    state |= {"head.other": torch.ones(1), "other.weight": torch.ones(1), "scratch": torch.ones(1)}
    with pytest.raises(RuntimeError, match=r"Missing key.*scale"):
        loss_fn.load_state_dict(state)
    assert loss_fn.seen == 3
    result = loss_fn.load_state_dict(state, strict=False)
    assert result.missing_keys == ["scale"]
    assert sorted(result.unexpected_keys) == ["head.other", "other.weight", "scratch"]
    assert loss_fn.seen == 2


def test_hooks_before_loading_see_the_whole_state_once() -> None:
    """As one that renames an entry of an older version."""
    calls = []

    def rename(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        calls.append(prefix)
        state[prefix + "weight"] = state.pop(prefix + "old_weight")

    loss_fn = ClassBalancedLoss(COUNTS, 0.9)
    loss_fn.register_load_state_dict_pre_hook(rename)
    state = loss_fn.state_dict()
    state["old_weight"] = 2 * state.pop("weight")
    loss_fn.load_state_dict(state)
    assert torch.equal(loss_fn.weight, state["old_weight"])
    assert calls == [""]


def test_a_state_without_values_changes_nothing() -> None:
    loss_fn = ClassBalancedLoss(COUNTS, 0.9)
    before = snapshot(loss_fn)
    state = {name: value.to("meta") for name, value in loss_fn.state_dict().items()}
    with pytest.raises(RuntimeError, match="on the meta device"):
        loss_fn.load_state_dict(state)
    assert_unchanged(loss_fn, before)


def test_a_subclass_entry_that_does_not_fit_changes_nothing_of_the_loss() -> None:
    loss_fn = Learned(3.0)
    before = snapshot(loss_fn)
    state = Learned(3.0).state_dict() | {"weight": torch.ones(4), "scale": torch.ones(2)}
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="scale"):
            loss_fn.load_state_dict(state, strict=strict)
        assert torch.equal(loss_fn.weight, before["weight"])


def test_modules_without_values_load_each_other() -> None:
    with torch.device("meta"):
        one, other = (nn.Sequential(nn.Linear(2, 4), ClassBalancedLoss(COUNTS)) for _ in "ab")
    for assign in (False, True):
        one.load_state_dict(other.state_dict(), assign=assign)
    loss_fn = ClassBalancedLoss(COUNTS).to("meta")
    loss_fn.load_state_dict(ClassBalancedLoss([1, 2, 3, 4]).to("meta").state_dict())
    assert loss_fn.counts.tolist() == [1, 2, 3, 4]
