"""Mistakes of a newcomer: every message names what was wrong, and what to do.

Those of a tensor or an option of one call are in test_arguments.py, of counts in test_weights.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.backends import DEVICE

from cbloss_fused import (
    ClassBalancedLoss,
    LinearClassBalancedLoss,
    check_target,
    class_balanced_loss,
    class_counts,
    ldam_margin,
    linear_class_balanced_loss,
    logit_adjustment,
)

N, C, D = 6, 4, 5
COUNTS = [100, 10, 2, 40]
X, Y = torch.linspace(-1, 1, N * C).reshape(N, C), torch.tensor([0, 1, 2, 3, 0, 2])
FEATURES, HEAD = torch.ones(N, D), torch.ones(C, D)
LABELS = torch.arange(50) % C
loss: Any = class_balanced_loss  # no mistake is one for a type checker
linear: Any = linear_class_balanced_loss
module: Any = ClassBalancedLoss
head: Any = LinearClassBalancedLoss
check: Any = check_target
count: Any = class_counts
adjustment: Any = logit_adjustment
margin: Any = ldam_margin
V, T, I = ValueError, TypeError, IndexError  # noqa: E741


class DataFrame:
    """What of pandas.DataFrame is looked at."""

    columns = ("count",)
    index = (0, 1)


# the call; exception; what its message must hold
MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # Counts of other classes than the logits
    "counts-short": (lambda: module(COUNTS[:3])(X, Y), V, "counts has 3 classes | (6, 4) has 4"),
    "counts-long": (lambda: module([*COUNTS, 7])(X, Y), V, "counts has 5 classes | (6, 4) has 4"),
    "counts-image": (
        lambda: module(COUNTS)(X.reshape(2, 6, 2, 1), Y.reshape(2, 3, 1)[:, :2]), V,
        "counts has 4 classes | (2, 6, 2, 1) has 6 in dimension 1",
    ),
    "counts-vector": (lambda: module(COUNTS)(X[0, :3], Y[0]), V, "4 classes | (3,) has 3"),
    "counts-binary": (
        lambda: module([9, 1], activation="sigmoid")(X[:, :1], (Y > 0).float()[:, None]), V,
        "counts has 2 classes | class_balanced_weights(counts)[target]",
    ),
    "counts-labels": (
        lambda: module(LABELS + 1, 0.9)(torch.ones(N, 7), Y), V, "50 classes | from_labels",
    ),
    "counts-labels-with-0": (
        lambda: module(LABELS), V, "have no samples | class_counts(labels) counts them",
    ),
    "counts-classes-last": (
        lambda: module(COUNTS)(torch.ones(2, 3, C), torch.zeros(2, 3).long()), V,
        "target | (2, 3) | input.movedim(-1, 1)",
    ),
    "another-error": (lambda: module(COUNTS)(X, Y[:3]), V, "target must have shape (6,) | (3,)"),
    "another-device": (
        lambda: module(COUNTS).to("meta")(X, Y), V, f"is on meta | input on {DEVICE} | .to('",
    ),
    "logits-to-the-module": (lambda: module(X, Y), V, "counts | (6, 4) | loss_fn(input, target)"),
    "counts-number": (lambda: module(10), V, "counts has shape () | samples of each class"),
    "counts-text": (lambda: module("5 3"), T, "counts must be real numbers, got '5 3'"),
    "counts-none": (lambda: module(None), T, "counts must be real numbers, got None"),
    "counts-generator": (lambda: module(n for n in COUNTS), T, "generator: pass a list"),
    "counts-frame": (lambda: module(DataFrame()), T, "counts | DataFrame | columns"),
    "beta-text": (lambda: module(COUNTS, "0.9"), T, "beta must be real numbers, got '0.9'"),
    "beta-percent": (lambda: module(COUNTS, 99.9), V, "beta = 99.9 | <= 1"),
    "weight-as-sample-weight": (
        lambda: module(COUNTS)(X, Y, torch.ones(C)), V,
        "sample_weight must have shape (6,), one factor per row, got (4,)",
    ),
    "swapped": (lambda: module(COUNTS)(Y, X), T, "input | int64 | (input, target)"),
    # What changes later
    "update-length": (
        lambda: module(COUNTS).update_counts([1, 2, 3]), V,
        "new | 4 classes of counts | (4,), got (3,)",
    ),
    "update-labels": (
        lambda: module(COUNTS).update_counts(LABELS), V, "got (50,) | class_counts(labels, 4)",
    ),
    "update-nan": (lambda: module([1, 1]).update_counts([1, float("nan")]), V, "new[1] = nan"),
    "assign-counts": (
        lambda: setattr(module(COUNTS), "counts", COUNTS), AttributeError, "counts | update_counts",
    ),
    "assign-beta": (
        lambda: setattr(module(COUNTS), "beta", 0.9), AttributeError, "beta | set_beta(beta)",
    ),
    # The linear head
    "head-order": (lambda: head(COUNTS, D), T, "in_features | list | (in_features, counts"),
    "head-keyword": (lambda: head(D, COUNTS, gama=2.0), T, "LinearClassBalancedLoss() | 'gamma'"),
    "linear-layer": (lambda: linear(FEATURES, torch.nn.Linear(D, C), Y), T, "its .weight | .bias"),
    "linear-order": (lambda: linear(FEATURES, Y, HEAD), T, "int64 | (input, linear_weight"),
    "linear-transposed": (lambda: linear(FEATURES, HEAD.T, Y), V, "(C, 5) | (5, 4) | weight.T"),
    "linear-bias": (lambda: linear(FEATURES, HEAD, torch.ones(C), Y), V, "(4,) | linear_bias"),
    "linear-target": (lambda: linear(FEATURES, HEAD, Y + 1), I, "= 4 | target - 1"),
    # Others
    "shards": (lambda: loss(X, Y, shards=2), T, "shards | ClassShards | int"),
    "check-target-float": (lambda: check(Y.float(), C), T, "target | integer | float32"),
    "check-target-list": (lambda: check([0], C), T, "target | Tensor | list"),
    "check-target-classes": (lambda: check(Y, "4"), T, "num_classes | int | '4'"),
    "tau": (lambda: adjustment(COUNTS, "1"), T, "tau must be real numbers, got '1'"),
    "max-margin": (lambda: margin(COUNTS, "1"), T, "max_margin | got '1'"),
    "labels-names": (lambda: count(["cat", "dog"]), T, "labels | integers | ['cat', 'dog']"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name):
    call, error, texts = MISTAKES[name]
    with pytest.raises(error) as raised:
        call()
    for text in texts.split(" | "):
        assert text in str(raised.value)
    assert raised.value.__cause__ is None  # the message is all of it
    assert raised.value.__suppress_context__ or raised.value.__context__ is None


CALLS: dict[str, Callable[..., Any]] = {
    "class_balanced_loss": lambda **options: loss(X, Y, **options),
    "linear_class_balanced_loss": lambda **options: linear(FEATURES, HEAD, Y, **options),
    "ClassBalancedLoss": lambda **options: module(COUNTS, **options),
    "LinearClassBalancedLoss": lambda **options: head(D, COUNTS, **options),
}
FUNCTIONS, MODULES = tuple(CALLS)[:2], tuple(CALLS)[2:]
# a wrong keyword; who is given it; what the message must hold
KEYWORDS = [
    ("smoothing", CALLS, "did you mean 'label_smoothing'?"),
    ("eps", CALLS, "did you mean 'label_smoothing'?"),
    ("alpha_t", CALLS, "did you mean 'alpha'?"),
    ("gamma_pos", CALLS, "did you mean 'gamma'?"),
    ("loss_type", CALLS, "did you mean 'activation'?"),
    ("pos_weights", CALLS, "did you mean 'pos_weight'?"),
    ("class_weights", FUNCTIONS, "did you mean 'weight'?"),
    ("class_weights", MODULES, "the weights follow from counts and beta"),
    ("weight", MODULES, "the weights follow from counts and beta"),
    ("beta_", FUNCTIONS, "weight=class_balanced_weights(counts, beta)"),
    ("beta_", MODULES, "did you mean 'beta'?"),
    ("samples_per_cls", FUNCTIONS, "weight=class_balanced_weights(counts, beta)"),
    ("sample_weights", FUNCTIONS, "did you mean 'sample_weight'?"),
    ("sample_weight", MODULES, "loss_fn(input, target, sample_weight=…)"),
    ("num_classes", CALLS, "as many classes as counts"),
    ("chunk_sizes", ("linear_class_balanced_loss", "LinearClassBalancedLoss"), "'chunk_size'?"),
    ("empti", MODULES, "did you mean 'empty'?"),
    ("unheard_of", CALLS, "'unheard_of'"),
]


@pytest.mark.parametrize("keyword, callers, text", KEYWORDS)
def test_unknown_keyword(keyword, callers, text):
    for caller in callers:
        with pytest.raises(TypeError) as raised:
            CALLS[caller](**{keyword: 1})
        told = str(raised.value)
        assert told.startswith(f"{caller}() got an unexpected keyword argument {keyword!r}")
        assert text in told


WRONG_TYPES: list[tuple[str, Any]] = [
    *(("gamma", wrong) for wrong in ([2.0], (2.0,), "2", None, np.ones(2), torch.ones(2))),
    *(("reduction", wrong) for wrong in (["mean"], None, np.array(["mean", "sum"]), 1)),
    *(("inplace", wrong) for wrong in ([True], None, "no", np.ones(2), torch.ones(2))),
    *(("ignore_index", wrong) for wrong in ([255], "255", np.ones(2), 2.5)),
    *(("label_smoothing", wrong) for wrong in ([0.1], None, "0.1", np.ones(2))),
]


@pytest.mark.parametrize("name, wrong", WRONG_TYPES)
def test_an_option_of_a_wrong_type_is_named(name, wrong):
    for call in CALLS.values():
        with pytest.raises((TypeError, ValueError)) as raised:
            call(**{name: wrong})
        assert str(raised.value).startswith(f"{name} must be ")
        assert str(raised.value).endswith(f"got {wrong!r}")
