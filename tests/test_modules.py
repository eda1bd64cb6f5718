"""ClassBalancedLoss: the function with the weights of class counts, as a module."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from support.backends import DEVICE
from support.marks import FAMILIES, REDUCTIONS

from cbloss_fused import (
    ClassBalancedLoss,
    DeferredReweighting,
    class_balanced_loss,
    class_balanced_weights,
)

COUNTS = [100, 10, 1, 40]
LOGITS = torch.linspace(-3, 3, 24).reshape(6, 4).sin() * 4
TARGET = torch.tensor([0, 1, 2, 3, 0, 2])
OPTIONS = {
    "default": {},
    "focal": {"activation": "sigmoid", "gamma": 0.5},
    "smoothed": {"label_smoothing": 0.1, "reduction": "sum"},
    "none": {"reduction": "none", "gamma": 2.0},
    "weighted": {"reduction": "weighted_mean", "ignore_index": 2},
    "reference": {"backend": "reference", "gamma": 1.0},
    "recompute": {"recompute": True, "ignore_index": None},
    "inplace": {"inplace": True},
}
GIVEN = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def run(loss_fn, *args, **kwargs):
    leaf = LOGITS.clone().requires_grad_()
    loss = loss_fn(leaf * 1, *args, **kwargs)
    loss.sum().backward()
    return loss.detach(), leaf.grad


@GIVEN
def test_is_the_function_with_these_weights(options):
    weight = class_balanced_weights(COUNTS, 0.9)
    loss, grad = run(ClassBalancedLoss(COUNTS, 0.9, **options), TARGET)
    want = run(lambda x: class_balanced_loss(x, TARGET, weight, **options))
    assert torch.equal(loss, want[0])
    assert torch.equal(grad, want[1])


@pytest.mark.parametrize("activation", FAMILIES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_options_change_the_result(activation, reduction):
    loss_fn = ClassBalancedLoss(COUNTS, 0.9, activation=activation, reduction=reduction)
    other = ClassBalancedLoss(COUNTS, 0.9, activation=activation, reduction=reduction, gamma=1.0)
    assert not torch.equal(run(loss_fn, TARGET)[0], run(other, TARGET)[0])


def test_sample_weight_and_normalizer_come_with_the_batch():
    s, weight = torch.rand(6), class_balanced_weights(COUNTS, 0.9)
    loss, grad = run(ClassBalancedLoss(COUNTS, 0.9), TARGET, s, 5.0)
    want = run(lambda x: class_balanced_loss(x, TARGET, weight, sample_weight=s, normalizer=5.0))
    assert torch.equal(loss, want[0])
    assert torch.equal(grad, want[1])


@pytest.mark.parametrize("form", (list, torch.tensor, np.array), ids=("list", "tensor", "array"))
def test_weights(form):
    counts = form(COUNTS)
    loss_fn = ClassBalancedLoss(counts, 0.99)
    assert torch.equal(loss_fn.weight, class_balanced_weights(COUNTS, 0.99))
    assert loss_fn.weight.dtype == torch.float32
    assert loss_fn.weight.sum().item() == pytest.approx(4)
    assert not list(loss_fn.parameters())
    per_class = torch.tensor([0.9, 0.99, 0.5, 0.0])
    assert torch.equal(
        ClassBalancedLoss(counts, per_class).weight, class_balanced_weights(COUNTS, per_class)
    )
    zero = ClassBalancedLoss([5, 0, 1], empty="zero")
    assert torch.equal(zero.weight, class_balanced_weights([5, 0, 1], empty="zero"))


def by_class(values):
    return dict(enumerate(values))


@pytest.mark.parametrize("form", (list, tuple, np.array, torch.tensor, by_class))
def test_vectors_of_any_form(form):
    given = {"logit_bias": [0.5, -1.0, 0.0, 2.0], "margin": [0.25, 0.5, 1.0, 0.0],
             "pos_weight": [1.0, 2.0, 3.0, 4.0]}  # fmt: skip
    tensors = {name: torch.tensor(values) for name, values in given.items()}
    formed: Any = {name: form(values) for name, values in given.items()}
    loss_fn = ClassBalancedLoss(COUNTS, 0.9, activation="sigmoid", **formed)
    for name, tensor in tensors.items():
        buffer = loss_fn.state_dict()[name]
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, tensor)
    z = LOGITS + tensors["logit_bias"]
    hot = torch.nn.functional.one_hot(TARGET, 4).float()
    z = z - tensors["margin"] * hot
    rows = torch.nn.functional.binary_cross_entropy_with_logits(
        z, hot, pos_weight=tensors["pos_weight"], reduction="none"
    ).sum(1)
    want = (loss_fn.weight[TARGET] * rows).mean()
    torch.testing.assert_close(loss_fn(LOGITS, TARGET), want)
    with pytest.raises(TypeError, match="logit_bias must be a Tensor, got "):
        class_balanced_loss(LOGITS, TARGET, logit_bias=given["logit_bias"])  # type: ignore[call-overload]


@GIVEN
def test_state_dict_round_trip(options):
    loss_fn = ClassBalancedLoss(COUNTS, 0.9, **options)
    assert list(loss_fn.state_dict()) == ["weight", "_extra_state"]
    buffer = io.BytesIO()
    torch.save(loss_fn.state_dict(), buffer)
    buffer.seek(0)
    other = ClassBalancedLoss([1, 1, 1, 1], 0.0, **options)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(run(other, TARGET)[0], run(loss_fn, TARGET)[0])
    with pytest.raises(RuntimeError, match="size mismatch"):
        ClassBalancedLoss([1, 2, 3], 0.9).load_state_dict(loss_fn.state_dict())


@pytest.mark.parametrize(
    "clone", (copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))),
    ids=("deepcopy", "copy", "pickle"),
)  # fmt: skip
@GIVEN
def test_copies(options, clone):
    loss_fn = ClassBalancedLoss(COUNTS, 0.9, **options)
    other = clone(loss_fn)
    assert other.extra_repr() == loss_fn.extra_repr()
    assert torch.equal(run(other, TARGET)[0], run(loss_fn, TARGET)[0])
    assert torch.equal(run(other, TARGET)[1], run(loss_fn, TARGET)[1])


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16), ids=str)
def test_to_dtype(dtype):
    """A model cast with its loss still trains; weights and loss stay float32 or float64."""
    loss_fn = ClassBalancedLoss(COUNTS, 0.9).to(dtype)
    assert loss_fn.weight.dtype == (dtype if dtype == torch.float64 else torch.float32)
    loss = loss_fn(LOGITS.to(dtype).requires_grad_(), TARGET)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want = class_balanced_loss(LOGITS.to(dtype).double(), TARGET, loss_fn.weight.double())
    assert loss.item() == pytest.approx(want.item(), rel=2e-5)


def test_to_another_device():
    loss_fn = ClassBalancedLoss(COUNTS, 0.9).to("meta")
    assert loss_fn.weight.device.type == "meta"
    assert loss_fn(LOGITS.to("meta"), TARGET.to("meta")).device.type == "meta"
    with pytest.raises(ValueError, match=f"is on meta, but input on {DEVICE}.*: call loss_fn.to"):
        loss_fn(LOGITS, TARGET)


def test_extra_repr():
    assert repr(ClassBalancedLoss(COUNTS)) == "ClassBalancedLoss(num_classes=4, beta=0.999)"
    loss_fn = ClassBalancedLoss(COUNTS, 0.9, activation="sigmoid", gamma=0.5, ignore_index=None)
    assert loss_fn.extra_repr() == (
        "num_classes=4, beta=0.9, activation='sigmoid', gamma=0.5, ignore_index=None"
    )
    assert "beta per class" in repr(ClassBalancedLoss(COUNTS, torch.full((4,), 0.9)))


def test_a_subclass_may_be_what_fastai_calls():
    """As docs/migration.md has it: `activation` and `decodes` are methods there."""

    class FastaiLoss(ClassBalancedLoss):
        def activation(self, x):
            return x.softmax(1)

        def decodes(self, x):
            return x.argmax(1)

    loss_fn = FastaiLoss(COUNTS, 0.9, gamma=2.0)
    assert torch.equal(loss_fn.activation(LOGITS), LOGITS.softmax(1))
    assert torch.equal(
        loss_fn(LOGITS, TARGET), ClassBalancedLoss(COUNTS, 0.9, gamma=2.0)(LOGITS, TARGET)
    )
    loss_fn.reduction = "none"  # as get_preds(with_loss=True) does
    assert loss_fn(LOGITS, TARGET).shape == (6,)
    assert "reduction='none'" in repr(loss_fn)
    assert copy.deepcopy(loss_fn).options == loss_fn.options


def test_takes_every_option_of_the_function():
    ours = inspect.signature(ClassBalancedLoss.__init__).parameters
    batch = inspect.signature(ClassBalancedLoss.forward).parameters
    for name, parameter in inspect.signature(class_balanced_loss).parameters.items():
        if name == "weight":
            continue
        assert name in ours or name in batch
        if name in ours:
            assert ours[name].default == parameter.default


BAD = {
    "empty-class": ({"counts": [5, 0, 3]}, ValueError, "1"),
    "negative-count": ({"counts": [5, -1, 3]}, ValueError, "-1"),
    "beta": ({"beta": 1.5}, ValueError, "beta"),
    "activation": ({"activation": "relu"}, ValueError, "activation"),
    "gamma": ({"gamma": -1.0}, ValueError, "gamma"),
    "smoothing": ({"label_smoothing": 1.0}, ValueError, "label_smoothing"),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction"),
    "backend": ({"backend": "tpu"}, ValueError, "backend"),
    "ignore_index": ({"ignore_index": "none"}, TypeError, "ignore_index"),
    "inplace": ({"inplace": True, "backend": "reference"}, ValueError, "inplace"),
    "bias": ({"logit_bias": [1.0, 2.0]}, ValueError, r"logit_bias .*\(4,\), .* got \(2,\)"),
    "margin": ({"margin": ["a"] * 4}, TypeError, r"margin must be real numbers, got \['a'"),
    "infinite": ({"margin": [0, 1, float("inf"), 0]}, ValueError, r"margin\[2\] = inf"),
    "pos_weight": ({"pos_weight": [1, 2, -1, 1], "activation": "sigmoid"}, ValueError, "= -1.0"),
    "unknown": ({"gama": 2.0}, TypeError, "gama"),
}


@pytest.mark.parametrize("changes, error, text", BAD.values(), ids=BAD.keys())
def test_bad_options_raise_when_it_is_made(changes, error, text):
    with pytest.raises(error, match=text):
        ClassBalancedLoss(**{"counts": COUNTS} | changes)


# Weights that change ------------------------------------------------------------------------------


def test_set_beta_and_update_counts_change_the_buffer_in_place():
    loss_fn = ClassBalancedLoss(COUNTS, 0.9)
    weight = loss_fn.weight
    loss_fn.set_beta(0.99)
    assert torch.equal(weight, class_balanced_weights(COUNTS, 0.99))
    loss_fn.update_counts([0, 5, 5, 0])
    loss_fn.update_counts(torch.tensor([1, 0, 0, 0]))
    assert torch.equal(weight, class_balanced_weights([101, 15, 6, 40], 0.99))
    loss_fn.set_beta(torch.tensor([0.9, 0.99, 0.5, 0.0]))
    assert torch.equal(weight, class_balanced_weights([101, 15, 6, 40], loss_fn.beta))
    assert loss_fn.weight is weight


def test_counts_of_a_batch_without_the_last_classes():
    loss_fn = ClassBalancedLoss(COUNTS, 0.9)
    loss_fn.update_counts(Counter([0, 1, 1]))
    loss_fn.update_counts({})
    assert loss_fn.counts.tolist() == [101, 12, 1, 40]
    with pytest.raises(ValueError, match=r"new .* 4 classes .*\(4,\), got \(5,\)"):
        loss_fn.update_counts({4: 1})


def test_weights_may_change_before_a_recomputing_backward():
    """They are in what the forward left: the gradient is of the weights that made the loss."""
    loss_fn = ClassBalancedLoss(COUNTS, 0.9, recompute=True)
    _, want = run(loss_fn, TARGET)
    leaf = LOGITS.clone().requires_grad_()
    loss = loss_fn(leaf * 1, TARGET)
    loss_fn.set_beta(0.99)
    loss.backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, want)


@pytest.mark.parametrize("change", ("set_beta(1.5)", "update_counts([1, 2])",
                                    "update_counts([1, -1, 0, 0])"))  # fmt: skip
def test_a_change_that_is_wrong_changes_nothing(change):
    loss_fn = ClassBalancedLoss(COUNTS, 0.9)
    before = copy.deepcopy(loss_fn.state_dict())
    with pytest.raises(ValueError):
        eval(f"loss_fn.{change}")
    after = loss_fn.state_dict()
    assert torch.equal(after["weight"], before["weight"])
    assert torch.equal(after["_extra_state"], before["_extra_state"])


def test_what_changed_is_saved_and_goes_on():
    loss_fn, other = ClassBalancedLoss(COUNTS, 0.9), ClassBalancedLoss([1, 1, 1, 1], 0.5)
    loss_fn.set_beta(0.99)
    loss_fn.update_counts([0, 5, 5, 0])
    other.load_state_dict(loss_fn.state_dict())
    for each in (loss_fn, other):
        each.update_counts([7, 0, 0, 1])
    assert torch.equal(loss_fn.weight, other.weight)


def test_from_labels_and_from_dataset():
    labels = torch.tensor([0, 0, 1, 2, 2, 2])
    want = class_balanced_weights([2, 1, 3], 0.9)
    dataset = torch.utils.data.TensorDataset(torch.zeros(6, 2), labels)
    loader = torch.utils.data.DataLoader(dataset, batch_size=4)
    assert torch.equal(ClassBalancedLoss.from_labels(labels, beta=0.9).weight, want)
    for source in (dataset, loader):
        loss_fn = ClassBalancedLoss.from_dataset(source, 3, 0.9, gamma=2.0)
        assert torch.equal(loss_fn.weight, want)
        assert loss_fn.options.gamma == 2
    with pytest.raises(ValueError, match="no samples"):
        ClassBalancedLoss.from_labels(labels, num_classes=4)


@pytest.mark.parametrize("anneal", (0, 3))
def test_deferred_reweighting(anneal):
    """Ones, then as many steps as asked for towards the loss's own weights, then these."""
    loss_fn = ClassBalancedLoss(COUNTS, 0.99)
    own, weight = loss_fn.weight.clone(), loss_fn.weight
    schedule = DeferredReweighting(loss_fn, start_epoch=2, anneal_epochs=anneal)
    seen = []
    for _ in range(3 + anneal):
        seen.append(weight.clone())
        schedule.step()
    assert all((w == 1).all() for w in seen[:2])
    assert torch.equal(seen[2 + anneal], own)
    assert torch.equal(weight, own)
    between = torch.stack(seen[1 : 3 + anneal])
    assert (between[1:, 2] > between[:-1, 2]).all()  # the rarest class gains at every step
    for step, got in enumerate(seen[2 : 2 + anneal], 1):
        beta = 1 - 1 / 100.0 ** (step / (anneal + 1))
        torch.testing.assert_close(got, class_balanced_weights(COUNTS, beta))


def test_deferred_reweighting_resumes_where_it_was():
    def made():
        loss_fn = ClassBalancedLoss(COUNTS, 0.99)
        return loss_fn, DeferredReweighting(loss_fn, 1, anneal_epochs=2)

    (loss_fn, schedule), (other, resumed) = made(), made()
    for epoch in range(5):
        resumed.load_state_dict(schedule.state_dict())
        assert torch.equal(other.weight, loss_fn.weight), epoch
        schedule.step()
        resumed.step()
        assert torch.equal(other.weight, loss_fn.weight), epoch


@pytest.mark.parametrize("options", ({"start_epoch": -1}, {"start_epoch": 1.5},
                                     {"start_epoch": 1, "anneal_epochs": -2}))  # fmt: skip
def test_deferred_reweighting_refuses(options):
    with pytest.raises(ValueError, match="must be an int >= 0"):
        DeferredReweighting(ClassBalancedLoss(COUNTS), **options)
    with pytest.raises(ValueError, match="beta < 1"):
        DeferredReweighting(ClassBalancedLoss(COUNTS, 1.0), 0, anneal_epochs=2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_changing_weights_recompiles_nothing():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    loss_fn = ClassBalancedLoss(COUNTS, 0.99)
    schedule = DeferredReweighting(loss_fn, start_epoch=1, anneal_epochs=1)
    compiled = torch.compile(loss_fn, fullgraph=True, backend=counter)
    for _ in range(4):
        leaf = LOGITS.clone().requires_grad_()
        loss = compiled(leaf, TARGET)
        torch.testing.assert_close(loss, class_balanced_loss(LOGITS, TARGET, loss_fn.weight))
        schedule.step()
    loss_fn.set_beta(0.5)
    compiled(LOGITS.clone().requires_grad_(), TARGET)
    assert counter.frame_count == 1
