"""Counts, effective numbers and weights against mpmath, the paper's formula and their limits."""

import math
from collections import Counter
from functools import partial
from itertools import product
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cbloss_fused import (
    ClassBalancedLoss,
    beta_from_prototypes,
    class_balanced_weights,
    class_counts,
    effective_number,
    init_head_bias_,
    ldam_margin,
    logit_adjustment,
)

CIFAR = [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100]  # long-tailed, factor 50
BETAS = [0.0, 5e-324, 1e-20, 1e-3, 0.1, 0.49, 0.5, 0.7, *(1 - 10.0**-k for k in range(1, 10))]
DENSE = [*range(1, 100), *np.geomspace(1, 1e9, 200).round(), *np.geomspace(1, 1e9, 200)]
no_collapse = pytest.mark.filterwarnings("ignore:beta = ")  # where the warning is not the subject


def exact_effective_number(n, beta):
    """(1 - beta^n) / (1 - beta) at the exact doubles, to 40 digits."""
    with mpmath.workdps(40):
        n, beta = mpmath.mpf(float(n)), mpmath.mpf(beta)
        if n == 0 or beta == 1:
            return n
        return -mpmath.expm1(n * mpmath.log(beta)) / (1 - beta) if beta else mpmath.mpf(1)


def assert_oracle(counts, beta):
    for got, n in zip(effective_number(counts, beta).tolist(), counts, strict=True):
        want = exact_effective_number(n, beta)
        assert abs(got - want) <= 1e-12 * want


@pytest.mark.parametrize("beta", [*BETAS, 1.0])
def test_effective_number_oracle(beta):
    assert_oracle(DENSE, beta)


@pytest.mark.filterwarnings("ignore:these look like frequencies")
@settings(deadline=None)
@given(st.lists(st.floats(1e-6, 1e9), min_size=1, max_size=5), st.floats(0, 1))
def test_effective_number_oracle_everywhere(counts, beta):
    assert_oracle(counts, beta)


def test_effective_number_limits():
    n = [0, 0.1, 1, 7.5, 1e9]  # 0.1: Python numbers go to float64 directly
    assert effective_number(n, 0).tolist() == [0, 1, 1, 1, 1]
    assert effective_number(n, 1).tolist() == n
    for beta in [*BETAS, 1]:
        assert str(effective_number([0], beta).item()) == "0.0"


@pytest.mark.parametrize("make", [list, np.array, partial(torch.tensor, dtype=torch.float64)])
def test_effective_number_per_class_beta(make):
    beta = [0, 0.5, 0.999, 1]
    got = effective_number([10] * 4, make(beta))
    assert torch.equal(got, torch.cat([effective_number([10], b) for b in beta]))


@pytest.mark.parametrize(
    "make",
    [
        lambda v: np.broadcast_to(v, 10),  # read-only
        lambda v: np.array(v[::-1])[::-1],  # a negative stride
        lambda v: np.array(v, dtype=np.uint16),
        lambda v: torch.tensor(v).half().requires_grad_(),
    ],
)
def test_counts_of_any_kind(make):
    counts = [n // 4 * 4 for n in CIFAR]  # float16 holds them
    got = effective_number(make(counts), np.float64(0.999))
    assert torch.equal(got, effective_number(counts, 0.999)) and not got.requires_grad


def test_device_follows_counts():
    with torch.device("meta"):  # where no numbers can be kept
        assert class_counts([0, 1, 1]).tolist() == [1, 2]
        assert logit_adjustment([1, 1]).tolist() == pytest.approx([-math.log(2)] * 2)
        assert class_balanced_weights([1, 3], 1.0).tolist() == [1.5, 0.5]
    if torch.cuda.is_available():
        for f in (partial(effective_number, beta=0.9), class_balanced_weights, class_counts):
            assert f(torch.tensor([3, 2], device="cuda")).is_cuda


def test_beta_from_prototypes():
    assert [beta_from_prototypes(n) for n in (1, 10, 1000)] == [0, 0.9, 0.999]
    assert type(beta_from_prototypes(np.int64(10))) is float
    for n in ([10, 100], np.array([10, 100]), torch.tensor([10, 100])):
        want = torch.tensor([0.9, 0.99], dtype=torch.float64)
        beta = beta_from_prototypes(n)
        assert isinstance(beta, torch.Tensor)
        assert torch.equal(beta, want)


@no_collapse
@pytest.mark.parametrize("beta", [*BETAS, 1.0])
@pytest.mark.parametrize("counts", [CIFAR, [1, 10**9], [0.5, 3, 1e5], list(range(1, 300))])
def test_weights_within_one_ulp(counts, beta):
    got = class_balanced_weights(counts, beta)
    inverse = [1 / exact_effective_number(n, beta) for n in counts]
    assert got.dtype == torch.float32
    for w, v in zip(got.tolist(), inverse, strict=True):
        want = len(counts) * v / mpmath.fsum(inverse)
        assert abs(w - want) <= np.spacing(np.float32(want))


@no_collapse
@settings(deadline=None)
@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=20), st.floats(0, 1))
def test_weights_properties(counts, beta):
    w = class_balanced_weights(counts, beta).double()
    assert (w > 0).all() and abs(w.sum().item() - len(counts)) <= 1e-6 * len(counts)
    by_count = w[torch.tensor(counts).argsort()]
    assert (by_count.diff() <= 1e-6 * by_count[1:]).all()  # rarer never weighs less


@no_collapse
@pytest.mark.parametrize("beta", [0.9, 0.99, 0.999, 0.9999])
def test_weights_are_those_of_the_paper(beta):
    weights = (1 - beta) / np.array(1.0 - np.power(beta, CIFAR))
    weights = weights / np.sum(weights) * len(CIFAR)
    np.testing.assert_allclose(class_balanced_weights(CIFAR, beta).numpy(), weights, rtol=1e-7)


def test_weights_limits():
    assert class_balanced_weights(CIFAR, 0).tolist() == [1] * 10
    w = class_balanced_weights(CIFAR, 1).double()
    assert torch.allclose(w * torch.tensor(CIFAR), w[0] * CIFAR[0], rtol=1e-6)


def test_weights_per_class_beta():
    E = effective_number([100, 100], [0.9, 0.99])
    w = class_balanced_weights([100, 100], [0.9, 0.99]).double()
    assert torch.allclose(w * E, w[0] * E[0], rtol=1e-6)
    got = class_balanced_weights([5, 0, 50], [0.9, 1, 0.99], empty="zero")  # beta goes along
    assert got[[0, 2]].tolist() == class_balanced_weights([5, 50], [0.9, 0.99]).tolist()


def test_empty_zero_and_one():
    zero = class_balanced_weights([0, 10, 0, 1000], empty="zero")
    assert zero[[0, 2]].tolist() == [0, 0]
    assert zero[[1, 3]].tolist() == class_balanced_weights([10, 1000]).tolist()  # their sum is 2
    one = class_balanced_weights([0, 10, 0, 1000], empty="one")
    assert torch.equal(one, class_balanced_weights([1, 10, 1, 1000]))


@pytest.mark.filterwarnings("ignore:these look like frequencies")
@pytest.mark.parametrize("counts", [[1e-300, 2e-300], [5e-324, 5e-324], [1e-30, 1.0]])
def test_tiny_counts_give_finite_weights(counts):
    for beta in (0.5, 1):
        w = class_balanced_weights(counts, beta)
        assert (w > 0).all() and w.sum().item() == pytest.approx(2)


COLLAPSES = [
    (CIFAR, 0.9, 0.9999),
    (CIFAR, [0.9] * 10, 0.9999),
    ([1000, 10**6], 0.99, 0.999999),
    ([9.5, 10], 0.1, 0.9),
    ([0.1, 0.7], 1e-30, 0.9),
    ([10**17, 10**18], 0.999, 1.0),
]
BALANCED = [
    (CIFAR, 0.999, "error"),
    (CIFAR, [0.0] * 10, "error"),  # asked for
    ([5000, 5001], 0.9, "error"),  # no beta could re-weight
    ([0, 5000, 5000], 0.9, "zero"),
    ([5000, 5000], [0.9, 0.99], "error"),
]


@pytest.mark.parametrize("counts, beta, suggestion", COLLAPSES)
def test_collapse_warns_and_its_suggestion_reweights(counts, beta, suggestion):
    with pytest.warns(UserWarning, match=r"beta\*\*n has vanished for every class") as caught:
        w = class_balanced_weights(counts, beta)
    assert (w.max() / w.min()).item() < 1.01
    assert [warning.filename for warning in caught] == [__file__]
    assert f"try beta={suggestion!r}," in str(caught[0].message)
    w = class_balanced_weights(counts, suggestion)  # warnings are errors
    assert (w.max() / w.min()).item() >= 1.01


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("counts, beta, empty", BALANCED)
def test_no_collapse_no_warning(counts, beta, empty):
    class_balanced_weights(counts, beta, empty=empty)


def test_counts_by_class():
    """A mapping, and a pandas.Series as value_counts gives it, by its index."""
    for counts in ({2: 5, 0: 100}, Counter([0] * 100 + [2] * 5), Series([100, 5], [0, 2])):
        want = class_balanced_weights([100, 0, 5], empty="zero")
        assert torch.equal(class_balanced_weights(counts, empty="zero"), want)
        assert ClassBalancedLoss(counts, empty="zero").counts.tolist() == [100, 0, 5]
    shuffled = Series([5, 100], [1, 0])
    assert torch.equal(class_balanced_weights(shuffled), class_balanced_weights([100, 5]))
    with pytest.raises(ValueError, match="indexed by"):
        class_balanced_weights(Series([1, 2], ["cat", "dog"]))


def test_tensors_are_classes_by_value():
    """They hash by identity: a Counter has each label as a key of its own."""
    labels = torch.tensor([0] * 90 + [1] * 10)
    keys: Any = Counter(labels)
    assert ClassBalancedLoss(keys, 0.9).counts.tolist() == [90, 10]
    assert effective_number(keys, 1).tolist() == [90, 10]
    keys = {np.int64(2): 3, torch.tensor(0): torch.tensor(1), 2: 3}
    assert effective_number(keys, 1).tolist() == [1, 0, 3]
    with pytest.raises(ValueError, match="indexed by"):
        effective_number({torch.tensor(0.5): 1}, 1)  # type: ignore[dict-item]


@pytest.mark.filterwarnings("error")
def test_frequencies_in_the_place_of_counts_are_warned_of():
    frequencies = [0.9, 0.09, 0.01]
    wrong: list[tuple[Any, Any]] = [
        (frequencies, 0.999),
        (torch.tensor(frequencies), 0.5),
        ([0.5, 0.5], [1, 0.9]),
        ({0: 1 / 3, 1: 2 / 3}, 0.9),
        ([0.333, 0.333, 0.333], 0.9),  # rounded
    ]
    entries = class_balanced_weights, effective_number, ClassBalancedLoss
    for (n, beta), entry in product(wrong, entries):
        with pytest.warns(UserWarning, match="look like frequencies: counts are expected") as found:
            entry(n, beta)
        assert [warning.filename for warning in found] == [__file__]
    loss_fn = ClassBalancedLoss([9, 1, 1], 0.9)
    with pytest.warns(UserWarning, match="look like frequencies: counts are expected") as found:
        loss_fn.update_counts(frequencies)
    assert [warning.filename for warning in found] == [__file__]
    with pytest.warns(UserWarning, match="look like frequencies"):
        class_balanced_weights([0.5, 0, 0.5], 0.9, empty="one")
    right: list[tuple[Any, Any]] = [
        (frequencies, 0),  # where counts do no more than frequencies
        (frequencies, 1),
        ([1], 0.9),
        ([1, 1, 1], 0.9),
        ([1.5, 0.5], 0.9),
        ([0.5, 0.25], 0.9),
    ]
    for (n, beta), entry in product(right, entries):
        entry(n, beta)
    for scale_invariant in (logit_adjustment, ldam_margin):
        torch.testing.assert_close(scale_invariant(frequencies), scale_invariant([90, 9, 1]))


class Series(list[int]):
    """What of pandas.Series is looked at."""

    def __init__(self, values, index):
        super().__init__(values)
        self.index = index  # type: ignore[method-assign]


@pytest.mark.parametrize("layer", [nn.Linear(3, 10), nn.Conv2d(3, 10, 1)])
def test_init_head_bias(layer):
    bias = layer.bias
    assert init_head_bias_(layer) is layer and layer.bias is bias
    torch.testing.assert_close(bias.detach().sigmoid(), torch.full((10,), 0.1))


weights = class_balanced_weights
ERRORS = [
    (effective_number, ([1], 1.5), ValueError, r"beta = 1.5: expected 0 <= beta <= 1$"),
    (effective_number, ([1], torch.nan), ValueError, r"beta = nan: expected 0 <= beta"),
    (effective_number, ([1, 2], [0, -1]), ValueError, r"beta\[1\] = -1.0: .*\(1 of 2 are wrong\)"),
    (effective_number, ([1, 2], [0]), ValueError, r"beta has shape \(1,\): expected .* \(2,\)"),
    (effective_number, ([3, -1, torch.nan], 0), ValueError, r"counts\[1\] = -1.0: .* \(2 of 3 "),
    (effective_number, ([torch.inf], 0), ValueError, r"counts\[0\] = inf"),
    (effective_number, ([10**400], 0), ValueError, r"counts must be real .*: int too large"),
    (effective_number, ([[1]], 0), ValueError, r"counts has shape \(1, 1\): expected \(C,\)"),
    (effective_number, ([], 0), ValueError, r"counts has shape \(0,\)"),
    (effective_number, ({1}, 0), TypeError, r"counts must be real numbers, got set"),
    (effective_number, ({"a": 1}, 0), ValueError, r"counts is indexed by \['a'\]: expected class"),
    (effective_number, ({-1: 1}, 0), ValueError, r"counts is indexed by \[-1\]: expected class"),
    (effective_number, (np.array([1j]), 0), TypeError, r"got torch.complex128"),
    (
        effective_number,
        (np.ma.array([5], mask=True), 0),
        TypeError,
        r"masked array: .*filled",
    ),
    (weights, (torch.ones(2, device="meta"),), TypeError, r"counts must be .*got a meta tensor"),
    (beta_from_prototypes, (0.5,), ValueError, r"N = 0.5: expected a finite N >= 1$"),
    (beta_from_prototypes, (10**400,), ValueError, r"N must be real numbers, got int: int too"),
    (beta_from_prototypes, ([1, torch.inf],), ValueError, r"N\[1\] = inf"),
    (weights, ([2, 0],), ValueError, r"1 of 2 classes have no samples \(1\): .*empty="),
    (weights, ([1] + [0] * 12,), ValueError, r"12 of 13 .*\(1, 2, .*, 10, …\)"),
    (partial(weights, empty="zero"), ([0],), ValueError, r"all 1 counts are 0"),
    (partial(weights, empty="two"), ([1],), ValueError, r"empty = 'two': expected \"error\""),  # type: ignore[arg-type]
    (weights, ([1e-300, 1],), ValueError, r"counts from 1e-300 to 1 are too far apart"),
    (weights, ([5e-324], 1 - 1e-9), ValueError, r"too far apart, or too small"),
    (init_head_bias_, ("x",), TypeError, r"linear must be an nn.Module, got str"),
    (init_head_bias_, (nn.Linear(2, 3, bias=False),), ValueError, r"Linear has no bias: expected"),
    (init_head_bias_, (nn.Linear(2, 1),), ValueError, r"a bias of shape \(1,\): .*C >= 2"),
]


@pytest.mark.parametrize("function, args, error, match", ERRORS)
def test_errors(function, args, error, match):
    with pytest.raises(error, match=match):
        function(*args)
