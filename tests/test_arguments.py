"""Bad input: the right exception, a message that names it, nothing written. No input: 0."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.backends import DEVICE, loss_and_grad
from support.marks import FAMILIES, IGNORED, name_of
from support.oracle import oracle, sample
from support.tolerances import assert_grad, assert_loss, same_bits

from cbloss_fused import check_target, class_balanced_loss, class_counts
from cbloss_fused.values import typed

N, C = 4, 3
inf, nan = float("inf"), float("nan")
FAMILY = pytest.mark.parametrize("family", FAMILIES)


def given(**changes):
    """Good arguments, some replaced."""
    good = {
        "input": torch.linspace(-1, 1, N * C).reshape(N, C),
        "target": torch.tensor([0, 1, 2, 1]),
        "weight": torch.ones(C),
    }
    return good | changes


def vector(*values):
    return torch.tensor(values, dtype=torch.float32)


ones, zeros, tensor = torch.ones, torch.zeros, torch.tensor
meta: dict[str, Any] = {"device": "meta"}
SIGMOID = {"activation": "sigmoid"}
V, T, I = ValueError, TypeError, IndexError  # noqa: E741
# what is given; exception; what its message must hold
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "input-0d": ({"input": tensor(1.0)}, V, "input | (N, C) | 0-d"),
    "input-no-class": ({"input": ones(4, 0)}, V, "input | (4, 0)"),
    "input-int": ({"input": ones(N, C).long()}, T, "input | float32 | int64"),
    "input-complex": ({"input": ones(N, C) * 1j}, T, "input | complex64"),
    "input-list": ({"input": [[1.0]]}, T, "input | Tensor | list"),
    "swapped": (
        {"input": zeros(N).long(), "target": ones(N, C)}, T, "input | int64 | (input, target)",
    ),
    "swapped-soft": (
        {"input": ones(N, C), "target": ones(N, C).requires_grad_()}, V,
        "target requires grad | (input, target)",
    ),
    "target-list": ({"target": [0, 1, 2, 1]}, T, "target | Tensor | list"),
    "target-length": ({"target": zeros(5).long()}, V, "target | (4,) | (5,)"),
    "target-rank": ({"target": zeros(4, 1).long()}, V, "target | (4,) | (4, 1)"),
    "target-float": ({"target": zeros(N)}, V, "target | (4, 3) | float32 | (4,) | target.long()"),
    "target-bool": ({"target": ones(N) > 0}, V, "target | (4, 3) | bool | (4,) | target.long()"),
    "target-transposed": ({"target": zeros(1, N).long()}, V, "(1, 4) | target.reshape(4,)"),
    "target-without-ones": (
        {"input": ones(N, C, 1, 1)}, V, "target | (4, 1, 1) | target.reshape(4, 1, 1)",
    ),
    "target-1d": (
        {"input": ones(C), "target": zeros(1).long(), "weight": None}, V,
        "target | () | (1,) | target.squeeze()",
    ),
    "binary-1d": (
        {"input": ones(N), "weight": None}, V,
        "one row of 4 classes | input.unsqueeze(1) | target.unsqueeze(1).float() | sigmoid",
    ),
    "binary-column": (
        {"input": ones(N, 1), "target": zeros(N, 1).long(), "weight": None}, V,
        "target | (4,) | (4, 1) | floats of shape (N, 1) | activation='sigmoid'",
    ),
    "binary-float": (
        {"input": ones(N, 1), "target": zeros(N), "weight": None, **SIGMOID}, V,
        "target | (4, 1) | (4,) | target.unsqueeze(1)",
    ),
    "binary-index": (
        {"input": ones(N, 1), "target": tensor([0, 1, 1, 0]), "weight": None, **SIGMOID}, I,
        "target[1] = 1 | floats of shape (N, 1) | activation='sigmoid' | two logits",
    ),
    "language-model": (
        {"input": ones(2, 5, C), "target": zeros(2, 5).long()}, V,
        "target | (2, 3) | (2, 5) | input.movedim(-1, 1) | input.flatten(0, -2) | target.flatten()",
    ),
    "language-model-flat": (
        {"input": ones(2, 5, C), "target": zeros(10).long()}, V, "(10,) | input.flatten(0, -2)",
    ),
    "classes-last": (
        {"input": ones(2, C, 5, 5), "target": ones(2, 5, 5, C)}, V, "target.movedim(-1, 1)",
    ),
    "images-of-another-size": (
        {"input": ones(2, C, 5, 5), "target": zeros(2, 7, 7).long()}, V, "(2, 5, 5) | (2, 7, 7)",
    ),
    "target-complex": ({"target": ones(N) * 1j}, T, "target | int64 | float or bool | complex64"),
    "target-dense-grad": (
        {"target": ones(N, C).requires_grad_(), **SIGMOID}, V, "target | grad | detach",
    ),
    "target-dense-gamma": (
        {"target": ones(N, C), "gamma": 2.0}, V, "gamma | softmax | 2.0 | target.argmax(1)",
    ),
    "target-dense-margin": ({"target": ones(N, C), "margin": ones(C)}, V, "margin | soft"),
    "target-dense-ignored": (
        {"target": ones(N, C), "ignore_index": 1}, V, "ignore_index=1 | soft | sample_weight 0",
    ),
    "target-device": ({"target": zeros(N, **meta).long()}, V, f"target | {DEVICE} | meta"),
    "weight-length": ({"weight": ones(4)}, V, "weight | (3,), one number per class | (4,)"),
    "weight-rank": ({"weight": ones(1, C)}, V, "weight | (3,) | (1, 3)"),
    "weight-int": (
        {"weight": ones(C).int()}, T, "weight | float | int32 | class_balanced_weights(counts)",
    ),
    "weight-sparse": ({"weight": ones(C).to_sparse()}, T, "weight | strided | sparse_coo"),
    "weight-binary": (
        {"input": ones(N, 1), "weight": ones(2)}, V, "weight | (1,) | (2,) | weight[target]",
    ),
    "input-sparse": ({"input": ones(N, C).to_sparse()}, T, "input | strided | sparse_coo"),
    "target-sparse": ({"target": ones(N, C).to_sparse()}, T, "target | strided | sparse_coo"),
    "sample-sparse": ({"sample_weight": ones(N).to_sparse()}, T, "sample_weight | sparse_coo"),
    "weight-list": ({"weight": [1.0] * C}, T, "weight | Tensor | list | torch.tensor(weight)"),
    "weight-array": ({"weight": np.ones(C)}, T, "weight | Tensor | ndarray | torch.tensor(weight)"),
    "weight-gamma": ({"weight": 2.0}, T, "weight | Tensor | float | options by their names"),
    "weight-activation": ({"weight": "sigmoid"}, T, "weight | Tensor | str | by their names"),
    "weight-device": ({"weight": ones(C, **meta)}, V, f"weight | {DEVICE} | meta"),
    "weight-grad": ({"weight": ones(C).requires_grad_()}, V, "weight | grad | detach"),
    "weight-negative": ({"weight": vector(1, -2, 1)}, V, "weight[1] | -2 | >= 0"),
    "weight-nan": ({"weight": vector(1, 1, nan)}, V, "weight[2] | nan | finite"),
    "weight-inf": ({"weight": vector(inf, 1, 1)}, V, "weight[0] | inf | finite"),
    "sample-shape": (
        {"sample_weight": ones(5)}, V, "sample_weight | (4,), one factor per row | (5,)",
    ),
    "sample-int": ({"sample_weight": ones(N).long()}, T, "int64 | sample_weight.float()"),
    "sample-device": ({"sample_weight": ones(N, **meta)}, V, "sample_weight | meta"),
    "sample-grad": ({"sample_weight": ones(N).requires_grad_()}, V, "sample_weight | grad"),
    "sample-negative": ({"sample_weight": vector(1, 1, -3, 1)}, V, "[2] | -3 | >= 0"),
    "sample-nan": ({"sample_weight": vector(1, nan, 1, 1)}, V, "[1] | nan | finite"),
    "sample-inf": ({"sample_weight": vector(1, 1, 1, inf)}, V, "[3] | inf | finite"),
    "gamma-negative": ({"gamma": -0.5}, V, "gamma | >= 0 | -0.5"),
    "gamma-nan": ({"gamma": nan}, V, "gamma | nan"),
    "gamma-inf": ({"gamma": inf}, V, "gamma | finite | inf"),
    "gamma-text": ({"gamma": "2"}, T, "gamma | 2"),
    "gamma-none": ({"gamma": None}, T, "gamma | None"),
    "gamma-list": ({"gamma": [2.0]}, T, "gamma must be a number | [2.0]"),
    "gamma-array": ({"gamma": np.ones(2)}, T, "gamma must be a number | array([1., 1.])"),
    "alpha-per-class": ({"alpha": [0.25] * C, **SIGMOID}, T, "alpha | number | weight's"),
    "smoothing-1": ({"label_smoothing": 1.0}, V, "label_smoothing | [0, 1) | 1.0"),
    "smoothing-negative": ({"label_smoothing": -0.1}, V, "label_smoothing | -0.1"),
    "smoothing-nan": ({"label_smoothing": nan}, V, "label_smoothing | nan"),
    "z_loss-negative": ({"z_loss": -1.0}, V, "z_loss | -1"),
    "z_loss-infinite": ({"z_loss": inf}, V, "z_loss | inf"),
    "z_loss-sigmoid": ({"z_loss": 0.1, "activation": "sigmoid"}, V, "z_loss | softmax"),
    "gamma_neg-negative": ({"gamma_neg": -1.0, **SIGMOID}, V, "gamma_neg | >= 0 | -1"),
    "gamma_neg-softmax": ({"gamma_neg": 1.0}, V, "gamma_neg | softmax | 1.0"),
    "alpha-large": ({"alpha": 1.5, **SIGMOID}, V, "alpha | [0, 1] | 1.5"),
    "alpha-nan": ({"alpha": nan, **SIGMOID}, V, "alpha | nan"),
    "alpha-softmax": ({"alpha": 0.25}, V, "alpha=0.25 would | softmax | 'sigmoid'"),
    "clip-1": ({"clip": 1.0, **SIGMOID}, V, "clip | [0, 1) | 1.0"),
    "clip-negative": ({"clip": -0.1, **SIGMOID}, V, "clip | -0.1"),
    "clip-softmax": ({"clip": 0.1}, V, "clip | softmax | 0.1"),
    "clip-text": ({"clip": "0.1", **SIGMOID}, T, "clip | number | '0.1'"),
    "inplace-text": ({"inplace": "no"}, T, "inplace | True or False | 'no'"),
    "inplace-array": ({"inplace": np.ones(2)}, T, "inplace | True or False | array([1., 1.])"),
    "recompute-text": ({"recompute": "yes"}, T, "recompute | None | True | 'yes'"),
    "gamma-grad": ({"gamma": tensor(1.0, requires_grad=True)}, V, "gamma | grad | float"),
    "scale-grad": (
        {"logit_scale": tensor(2.0, requires_grad=True)}, V, "logit_scale | requires grad",
    ),
    "unknown": ({"gama": 1.0}, T, "class_balanced_loss() | 'gama' | did you mean 'gamma'"),
    "unknown-far": ({"xyz": 1.0}, T, "unexpected keyword argument 'xyz'"),
    "scale-0": ({"logit_scale": 0.0}, V, "logit_scale | positive | 0.0"),
    "scale-inf": ({"logit_scale": inf}, V, "logit_scale | inf"),
    "scale-tensor": ({"logit_scale": ones(3)}, T, "logit_scale | number | tensor"),
    "class-weighting": ({"class_weighting": "column"}, V, "'sample' | 'class' | 'column'"),
    "class-weighting-softmax": ({"class_weighting": "class"}, V, "class_weighting | softmax"),
    "class-weighting-mean": (
        {"class_weighting": "class", "reduction": "weighted_mean", **SIGMOID}, V,
        "class_weighting | weighted_mean",
    ),
    "bias-length": ({"logit_bias": ones(4)}, V, "logit_bias | (3,) | (4,)"),
    "bias-int": (
        {"logit_bias": ones(C).int()}, T, "logit_bias | float | int32 | logit_adjustment(counts)",
    ),
    "bias-device": ({"logit_bias": ones(C, **meta)}, V, "logit_bias | meta"),
    "bias-grad": ({"logit_bias": ones(C).requires_grad_()}, V, "logit_bias | grad | detach"),
    "bias-inf": ({"logit_bias": vector(0, -inf, 1)}, V, "logit_bias[1] | -inf | finite"),
    "margin-length": ({"margin": ones(4)}, V, "margin | (3,) | (4,)"),
    "margin-number": ({"margin": 0.5}, T, "margin | Tensor | float | one number per class"),
    "margin-int": ({"margin": ones(C).int()}, T, "margin | int32 | ldam_margin(counts)"),
    "margin-grad": ({"margin": ones(C).requires_grad_()}, V, "margin | grad | detach"),
    "margin-nan": ({"margin": vector(0, 1, nan)}, V, "margin[2] | nan | finite"),
    "pos-weight-length": ({"pos_weight": ones(4), **SIGMOID}, V, "pos_weight | (3,) | (4,)"),
    "pos-weight-int": ({"pos_weight": ones(C).int(), **SIGMOID}, T, "pos_weight | int32"),
    "pos-weight-grad": (
        {"pos_weight": ones(C).requires_grad_(), **SIGMOID}, V, "pos_weight | grad | detach",
    ),
    "pos-weight-softmax": ({"pos_weight": ones(C)}, V, "pos_weight | softmax"),
    "pos-weight-negative": (
        {"pos_weight": vector(1, 2, -1), **SIGMOID}, V, "pos_weight[2] | -1 | >= 0",
    ),
    "pos-weight-nan": ({"pos_weight": vector(nan, 2, 1), **SIGMOID}, V, "pos_weight[0] | nan"),
    "target-one-hot": (
        {"target": ones(N, C).long()}, V,
        "target | (4,) | int64 | (4, 3) | target.argmax(1) | target.float()",
    ),
    "target-column": ({"target": ones(N, 1).long()}, V, "target | (4, 1) | target.reshape(4,)"),
    "smoothing-text": ({"label_smoothing": "0.1"}, T, "label_smoothing | 0.1"),
    "ignore-index-float": ({"ignore_index": 0.5}, T, "ignore_index | int | 0.5"),
    "activation": ({"activation": "relu"}, V, "activation | softmax | sigmoid | relu"),
    "activation-none": ({"activation": None}, V, "activation | softmax | None"),
    "activation-list": ({"activation": ["sigmoid"]}, V, "activation | softmax | ['sigmoid']"),
    "activation-array": ({"activation": np.array(["a", "b"])}, V, "activation | softmax | array"),
    "activation-focal": ({"activation": "focal"}, V, "activation | 'focal' | gamma > 0"),
    "reduction": (
        {"reduction": "max"}, V,
        "reduction | 'none' | 'mean' | 'weighted_mean' | 'sum' | max",
    ),
    "backend": ({"backend": "tpu"}, V, "backend | 'cpu' | 'reference' | tpu"),
    "normalizer-sum": ({"normalizer": 2.0, "reduction": "sum"}, V, "normalizer | mean | sum"),
    "normalizer-none": ({"normalizer": 2.0, "reduction": "none"}, V, "normalizer | none"),
    "normalizer-weighted": (
        {"normalizer": 2.0, "reduction": "weighted_mean"}, V, "normalizer | weighted_mean",
    ),
    "normalizer-0": ({"normalizer": 0.0}, V, "normalizer | positive | 0"),
    "normalizer-negative": ({"normalizer": -1.0}, V, "normalizer | positive | -1"),
    "normalizer-small": ({"normalizer": 1e-46}, V, "normalizer | positive | 1e-46 | float32"),
    "normalizer-large": ({"normalizer": 1e39}, V, "normalizer | finite | 1e+39 | float32"),
    "normalizer-array": ({"normalizer": np.ones(2)}, T, "normalizer | a number | array([1., 1.])"),
    "normalizer-nan": ({"normalizer": nan}, V, "normalizer | nan"),
    "normalizer-text": ({"normalizer": "2"}, T, "normalizer | 2"),
    "normalizer-tensor-negative": ({"normalizer": tensor(-1.0)}, V, "normalizer | >= 0 | -1"),
    "normalizer-tensor-nan": ({"normalizer": tensor(nan)}, V, "normalizer | nan"),
    "normalizer-tensor-1d": ({"normalizer": ones(1)}, V, "normalizer | () | (1,)"),
    "normalizer-bool-tensor": ({"normalizer": tensor(True)}, T, "normalizer | bool"),
    "normalizer-device": ({"normalizer": ones((), **meta)}, V, "normalizer | meta"),
    "normalizer-grad": (
        {"normalizer": ones((), requires_grad=True)}, V, "normalizer | grad",
    ),
    "target-negative": (
        {"target": tensor([0, 1, -1, 2])}, I, "target[2] | -1 | < 3 | ignore_index=-1",
    ),
    "target-mask": (
        {"target": tensor([0, 255, 255, 2], dtype=torch.uint8)}, I, "= 255 | ignore_index=255",
    ),
    "target-from-1": ({"target": tensor([1, 3, 2, 3])}, I, "target[1] = 3 | pass target - 1"),
    "target-large": (
        {"target": tensor([0, 3, 1, 7])}, I,
        "target[1] | = 3  | 0 <= target < 3 | ignore_index=-100 | 2 of 4",
    ),
    "target-huge": ({"target": tensor([0, 1, 2, 2**40])}, I, "[3] | 1099511627776"),
    "target-lowest": ({"target": tensor([-(2**63), 0, 0, 0])}, I, "[0] | -9223372036854775808"),
    "target-minus-100": (
        {"target": tensor([0, -100, 1, 2]), "ignore_index": None}, I, "target[1] | -100",
    ),
}  # fmt: skip


IN_THE_VALUES = [
    name for name, (changes, error, _) in BAD.items()
    if error is IndexError or (error is ValueError and re.search("-(negative|nan|inf|0)$", name)
                               and any(isinstance(v, torch.Tensor) for v in changes.values()))
]  # fmt: skip


@pytest.fixture
def looks(backend):
    """Skips what no GPU kernel may do, interpreted or not: look at values and raise."""
    if backend.gpu:
        pytest.skip("GPU kernels take values as given; see test_kernels.py for what comes of it")


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(backend, name):
    changes, error, texts = BAD[name]
    routes = [backend.argument, "reference"]
    if name in IN_THE_VALUES:  # at which no GPU kernel may look, interpreted or not
        routes = [
            r for r in routes if not (r == backend.argument and backend.gpu) and DEVICE == "cpu"
        ]
    for route in routes:
        arguments = {"backend": route} | given(**changes)
        with pytest.raises(error) as raised:
            class_balanced_loss(**arguments)
        for text in texts.split(" | "):
            assert text in str(raised.value)
        assert "csrc" not in str(raised.value)


@pytest.mark.parametrize("name", IN_THE_VALUES)
@pytest.mark.parametrize("recompute", (False, True), ids=("stored", "recomputed"))
def test_bad_value_in_a_tensor_writes_nothing(backend, looks, name, recompute):
    changes, error, _ = BAD[name]
    arguments = given(**changes)
    leaf = arguments.pop("input").requires_grad_()
    logits = leaf * 1
    before, version = logits.detach().clone(), logits._version
    with pytest.raises(error):
        class_balanced_loss(
            logits, **arguments, inplace=True, recompute=recompute, backend=backend.argument
        )
    assert same_bits(logits.detach(), before)
    assert logits._version == version


def test_in_place_writes_to_no_negated_view(backend):
    numbers = torch.randn(4, 3, dtype=torch.complex64, requires_grad=True)
    logits = (2 * numbers).conj().imag
    assert logits.is_neg()
    with pytest.raises(ValueError, match="resolve_neg"):
        class_balanced_loss(
            logits, torch.zeros(4, dtype=torch.int64), inplace=True, backend=backend.argument
        )


def test_target_out_of_range_names_every_coordinate(backend, looks):
    target = torch.zeros(2, 3, 4, dtype=torch.int64)
    target[1, 2, 3], target[1, 0, 2] = 9, 5
    for route in (backend.argument, "reference"):
        with pytest.raises(IndexError, match=re.escape("target[1, 0, 2] = 5")):
            class_balanced_loss(torch.zeros(2, 5, 3, 4), target, backend=route)
    with pytest.raises(IndexError, match=re.escape("target[1, 0, 2] = 5")):
        check_target(target, 5)
    sample_weight = torch.ones(2, 3, 4)
    sample_weight[1, 1, 3] = -1
    with pytest.raises(ValueError, match=re.escape("sample_weight[1, 1, 3] = -1")):
        class_balanced_loss(
            torch.zeros(2, 10, 3, 4), target, sample_weight=sample_weight, backend=backend.argument
        )


def test_target_out_of_range_in_many_rows(backend, looks):
    target = torch.zeros(20_000, dtype=torch.int64)
    target[[9_999, 12_345]] = 4
    with pytest.raises(IndexError, match=r"target\[9999\] = 4 .*2 of 20000"):
        class_balanced_loss(torch.zeros(20_000, 4), target, backend=backend.argument)


INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)


@pytest.mark.parametrize("dtype", INTEGERS, ids=name_of)
@pytest.mark.parametrize("classes", (100, 300), ids="C{}".format)
def test_integer_types_of_targets(backend, dtype, classes):
    target = torch.tensor([0, 99, 5, 127 % classes], dtype=dtype)
    logits = torch.linspace(-3, 3, 4 * classes).reshape(4, classes)
    want = oracle(logits, target.long())
    for route in (backend.argument, "reference"):
        leaf = logits.clone().requires_grad_()
        loss = class_balanced_loss(leaf, target, backend=route)
        loss.backward()
        assert leaf.grad is not None
        assert_loss(loss, want[0], logits.dtype, route=route)
        assert_grad(leaf.grad, want[1], logits.dtype, route=route)
    check_target(target, classes)


def test_uint8_class_156_is_not_minus_100(backend):
    """-100 is 156 in uint8 arithmetic; a class all the same."""
    logits, target = torch.zeros(2, 200), torch.tensor([156, 3], dtype=torch.uint8)
    logits[0, 156] = 5
    want = F.cross_entropy(logits, target.long())
    for route in (backend.argument, "reference"):
        torch.testing.assert_close(class_balanced_loss(logits, target, backend=route), want)


@pytest.mark.parametrize("ignore_index", (-100, -1, 255, 1000), ids=str)
def test_ignore_index_beyond_the_targets_type(backend, ignore_index):
    target = torch.tensor([1, 255 if ignore_index == 255 else 2], dtype=torch.uint8)
    logits = torch.tensor([[0.0, 1, 2], [2, 0, 1]])
    want = F.cross_entropy(logits, target.long(), ignore_index=ignore_index)
    for route in (backend.argument, "reference"):
        loss = class_balanced_loss(logits, target, ignore_index=ignore_index, backend=route)
        torch.testing.assert_close(loss, want)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=name_of)
@pytest.mark.parametrize("logits_dtype", (torch.float64, torch.float32, torch.float16), ids=name_of)
def test_floating_types_of_weights(backend, logits_dtype, dtype):
    logits, target, weight, sample_weight = sample(10, logits_dtype)
    weight, sample_weight = weight.to(dtype), sample_weight.to(dtype)
    loss, grad = loss_and_grad(backend, logits, target, weight, sample_weight=sample_weight)
    want = oracle(logits, target, weight, sample_weight=sample_weight)
    assert_loss(loss, want[0], logits_dtype)
    assert_grad(grad, want[1], logits_dtype)


NOTHING = {
    "no-rows": (torch.zeros(0, C), torch.zeros(0, dtype=torch.int64), None),
    "no-pixels": (torch.zeros(2, C, 0, 5), torch.zeros(2, 0, 5, dtype=torch.int64), None),
    "all-ignored": (torch.full((N, C), nan), torch.full((N,), IGNORED), None),
    "no-weight": (torch.ones(N, C), torch.tensor([0, 1, 0, 1]), torch.tensor([0.0, 0.0, 1.0])),
}


@pytest.mark.parametrize("recompute", (False, True), ids=("stored", "recomputed"))
@pytest.mark.parametrize("reduction", ("none", "sum", "mean", "weighted_mean"))
@pytest.mark.parametrize("logits, target, weight", NOTHING.values(), ids=NOTHING.keys())
@FAMILY
def test_nothing_to_average_is_0(backend, family, logits, target, weight, reduction, recompute):
    for route in (backend.argument, "reference"):
        leaf = logits.clone().requires_grad_()
        loss = class_balanced_loss(
            leaf, target, weight, activation=family, gamma=0.5,
            reduction=reduction, recompute=recompute, backend=route,
        )  # fmt: skip
        loss.sum().backward()
        assert loss.shape == (target.shape if reduction == "none" else ())
        assert (loss == 0).all()
        assert leaf.grad.shape == logits.shape
        assert (leaf.grad == 0).all()


@pytest.mark.parametrize("zero", ("weight", "normalizer"))
@FAMILY
def test_a_nan_of_no_weight_is_seen(backend, family, zero):
    """Nothing is taken for 0 that would hide it, in the reference either."""
    logits, target = torch.ones(N, C), torch.tensor([0, 1, 0, 1])
    logits[1, 2] = nan
    given: dict[str, Any] = {"activation": family, zero: torch.zeros(C if zero == "weight" else ())}
    for route in (backend.argument, "reference"):
        leaf = logits.clone().requires_grad_()
        loss = class_balanced_loss(leaf, target, **given, backend=route)
        (grad,) = torch.autograd.grad(loss, leaf)
        assert loss.isnan()
        assert grad[1, 2].isnan()
        assert (grad[0] == 0).all()


@FAMILY
def test_one_class(backend, family):
    logits, target = torch.tensor([[3.0], [-80.0], [0.0]]), torch.zeros(3, dtype=torch.int64)
    options = {"activation": family, "gamma": 0.5, "reduction": "none"}
    loss, grad = loss_and_grad(backend, logits, target, **options)
    want = oracle(logits, target, **options)
    assert_loss(loss, want[0], logits.dtype)
    assert_grad(grad, want[1], logits.dtype)
    if family == "softmax":
        assert (loss == 0).all()
        assert (grad == 0).all()


@pytest.mark.parametrize("gamma", (True, 2, torch.tensor(2.0)), ids=("bool", "int", "tensor"))
def test_numbers_of_other_types(backend, gamma):
    logits, target, _, _ = sample(10, torch.float32)
    got = class_balanced_loss(logits, target, gamma=gamma, backend=backend.argument)
    want = class_balanced_loss(logits, target, gamma=float(gamma), backend=backend.argument)
    assert torch.equal(got, want)


def test_a_number_that_changes_is_looked_at_again():
    logits, target, _, _ = sample(10, torch.float32)
    gamma: Any = torch.tensor(2.0)  # no float for a type checker
    before = class_balanced_loss(logits, target, gamma=gamma)
    gamma.fill_(0)
    assert class_balanced_loss(logits, target, gamma=gamma) > before
    class_balanced_loss(logits, target, ignore_index=-100)
    equal: Any = -100.0  # to what was right
    with pytest.raises(TypeError, match="ignore_index must be None or an int"):
        class_balanced_loss(logits, target, ignore_index=equal)
    for wrong in (2**63, -(2**63) - 1):
        for call in (
            lambda **index: class_balanced_loss(logits, target, **index),
            lambda **index: check_target(target, 10, **index),
            lambda **index: class_counts(target, **index),
        ):
            with pytest.raises(ValueError, match="ignore_index must be an int of 64 bits or None"):
                call(ignore_index=wrong)


def test_another_device_gets_the_reference_or_says_why(backend):
    logits, target = torch.empty(N, C, device="meta"), torch.empty(N, device="meta").long()
    loss = class_balanced_loss(logits, target, reduction="none")
    assert (loss.device.type, loss.shape, loss.dtype) == ("meta", (N,), torch.float32)
    with pytest.raises(ValueError, match="backend='cpu' needs CPU tensors, got meta"):
        class_balanced_loss(logits, target, backend="cpu")


def test_integers_of_any_type(backend):
    """As a normalizer, what Hugging Face's num_items_in_batch is; as ignore_index, NumPy's."""
    logits, target, _, _ = sample(10, torch.float32)
    count = (target != IGNORED).sum()
    options = {"backend": backend.argument}
    want = class_balanced_loss(logits, target, normalizer=float(count), **options)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        got = class_balanced_loss(logits, target, normalizer=count.to(dtype), **options)
        assert torch.equal(got, want)
    target = target.clamp(min=0)
    want = class_balanced_loss(logits, target, ignore_index=3, **options)
    threes: tuple[Any, ...] = np.int64(3), np.uint8(3), torch.tensor(3)
    for three in threes:
        assert torch.equal(class_balanced_loss(logits, target, ignore_index=three, **options), want)


@pytest.mark.skipif(DEVICE != "cpu", reason="values are looked at on the CPU")
def test_a_row_has_no_index():
    logits, target = torch.zeros(C), torch.tensor(C)
    for backend in (None, "reference"):
        with pytest.raises(IndexError, match=rf"^target\[\] = {C} is out of range"):
            class_balanced_loss(logits, target, backend=backend)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_a_nested_tensor_is_refused(backend):
    nested, target = torch.nested.nested_tensor([torch.ones(3), torch.ones(3)]), torch.zeros(2)
    with pytest.raises(TypeError, match="input must be a strided tensor, got a nested one"):
        class_balanced_loss(nested, target.long(), backend=backend.argument)


@pytest.mark.parametrize("text", (
    "sample_weight[2] = -3: must be finite and >= 0",
    "target[0, 0, 1] = -0.5: must be in [0, 1] or ignore_index=-100",
    "normalizer must be finite and >= 0, got -1",
))  # fmt: skip
def test_kernels_errors_are_value_errors(text):
    """PyTorch 2.15 makes them RuntimeErrors; others stay what they are."""
    found = typed(RuntimeError(text))
    assert type(found) is ValueError
    assert str(found) == text
    for other in (RuntimeError("out of memory"), NotImplementedError(text), MemoryError()):
        assert typed(other) is other
