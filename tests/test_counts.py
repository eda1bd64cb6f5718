"""Class counts of labels, data sets and loaders against counts by hand; what has no labels."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
)

from cbloss_fused import ClassBalancedLoss, class_counts


@dataclass
class Items(Dataset[Any]):
    items: list[Any]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


Stored: Any = SimpleNamespace  # a dataset's labels without its items
Stream = type("Stream", (IterableDataset,), {"__iter__": None})
LABELS = [2, 0, 2, 1, 2, 0]
PAIRS = TensorDataset(torch.zeros(6, 3), torch.tensor(LABELS))
SOURCES = [
    torch.tensor(LABELS).view(2, 3),
    torch.tensor(LABELS, dtype=torch.uint16),
    np.array(LABELS, dtype=np.int8),
    Stored(targets=LABELS),
    Stored(targets=None, labels=np.array(LABELS)),
    Stored(targets=[2 - y for y in LABELS], target_transform=lambda y: 2 - y),
    Subset(Subset(Stored(targets=[9, *LABELS, 9]), range(7)), np.arange(1, 7)),  # type: ignore[arg-type]
    Subset(Items([(0.0, y) for y in [9, *LABELS]]), range(1, 7)),
    PAIRS,
    Items([("x", np.int64(y)) for y in LABELS]),
    Items([{"image": 0, "labels": y} for y in LABELS]),
    DataLoader(PAIRS, batch_size=4),
    DataLoader(Items([{"target": y} for y in LABELS])),
]


@pytest.mark.parametrize("source", SOURCES)
def test_class_counts_of_any_kind(source):
    assert class_counts(source).tolist() == [2, 1, 3]
    assert class_counts(source, 5).tolist() == [2, 1, 3, 0, 0]


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1), st.integers(1, 7))
def test_class_counts_property(labels, batch_size):
    want = [labels.count(c) for c in range(max(labels) + 1)]
    assert class_counts(labels).tolist() == want
    assert class_counts(DataLoader(Items([(0, y) for y in labels]), batch_size)).tolist() == want


@pytest.mark.parametrize("source", [[], np.array([]), Items([]), Subset(Stored(labels=[1]), [])])
def test_class_counts_without_labels(source):
    assert torch.equal(class_counts(source, 2), torch.zeros(2, dtype=torch.int64))


def test_progress_bar_only_with_tqdm(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    class_counts(DataLoader(PAIRS))
    assert "counting labels" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)  # its import fails
    assert class_counts(DataLoader(PAIRS)).tolist() == [2, 1, 3]
    assert capsys.readouterr().err == ""


def test_ignored_labels_are_not_counted():
    mask = torch.tensor([[0, 255, 1], [1, 1, 255]], dtype=torch.uint8)
    assert class_counts(mask, 2, ignore_index=255).tolist() == [1, 3]
    assert class_counts([0, -100, 2], ignore_index=np.int64(-100)).tolist() == [1, 0, 1]
    masks = Items([(0, mask), (0, mask)])
    assert class_counts(DataLoader(masks, batch_size=2), ignore_index=255).tolist() == [2, 6]
    loss_fn = ClassBalancedLoss.from_dataset(masks, 2, ignore_index=255)
    assert loss_fn.counts.tolist() == [2, 6]
    assert ClassBalancedLoss.from_labels([0, 1, -100]).counts.tolist() == [1, 1]


# Which entry is the label ------------------------------------------------------------------------


MASKED = TensorDataset(torch.zeros(6, 3), torch.ones(6, 3).long(), torch.tensor(LABELS))


@pytest.mark.parametrize(
    "source",
    [
        MASKED,
        Subset(MASKED, range(6)),
        DataLoader(MASKED, batch_size=4),
        DataLoader(MASKED, batch_size=None),
        DataLoader(ConcatDataset([Subset(MASKED, [0, 1]), Subset(MASKED, range(2, 6))]), 3),
    ],
)
def test_the_labels_of_tensors_are_the_last(source):
    assert class_counts(source).tolist() == [2, 1, 3]


def test_a_tensor_dataset_is_not_loaded(monkeypatch):
    monkeypatch.setattr(TensorDataset, "__getitem__", None)
    assert class_counts(MASKED).tolist() == [2, 1, 3]


class Numbered(TensorDataset):
    """With each item's index after its label, as many write it."""

    def __getitem__(self, i):
        return (*super().__getitem__(i), i)


@pytest.mark.parametrize(
    "source",
    [
        Numbered(torch.zeros(3), torch.tensor([0, 1, 1])),
        DataLoader(Numbered(torch.zeros(3), torch.tensor([0, 1, 1]))),
        Items([(0.0, 1, 2)]),
        DataLoader(MASKED, collate_fn=lambda items: (1, 2, 3)),
    ],
)
def test_no_label_is_guessed(source):
    with pytest.raises(TypeError, match=r"3 entries, any of which.*item\[i\] for item in dataset"):
        class_counts(source)


# Stored labels ------------------------------------------------------------------------------------


class Filtered(Items):
    """Whose items are no longer those of its stored labels, as of a filtered ImageFolder."""

    targets = (0, 0, 0, 0, 1, 1)


FILTERED = Filtered([("x", 0), ("x", 1), ("x", 1)])


@pytest.mark.parametrize(
    "source, want",
    [
        (FILTERED, [1, 2]),
        (Subset(FILTERED, [0, 2]), [1, 1]),
        (ConcatDataset([FILTERED, Items([("x", 1)])]), [1, 3]),
        (ConcatDataset([FILTERED, PAIRS]), [3, 3, 3]),
    ],
)
def test_stored_labels_of_other_items_are_not_used(source, want):
    assert class_counts(source).tolist() == want


@pytest.mark.parametrize(
    "stored",
    [
        {"targets": ["a.png", "b.png", "c.png"]},
        {"labels": ["cat", "dog"]},
        {"labels": {"cat": 0, "dog": 1}},
        {"targets": ["a.png", "b.png", "c.png"], "labels": [0, 1, 1]},
        {"targets": 2},
        {"targets": lambda: None},
    ],
)
def test_stored_values_that_are_no_labels_are_not_used(stored):
    source = Items([("x", 0), ("x", 1), ("x", 1)])
    vars(source).update(stored)
    assert class_counts(source).tolist() == [1, 2]


def test_stored_masks():
    masks = Items([])
    masks.items = [None, None]
    vars(masks).update(targets=np.array([[[0, 1], [1, 1]], [[0, 0], [1, 0]]], np.uint8))
    assert class_counts(masks, 2).tolist() == [4, 4]
    assert class_counts(Subset(masks, [1]), 2).tolist() == [3, 1]
    both: Any = ConcatDataset([masks, masks])
    assert class_counts(Subset(both, [1, 2]), 2).tolist() == [4, 4]


# One-hot and multi-hot labels ---------------------------------------------------------------------


ONE_HOT = torch.nn.functional.one_hot((torch.arange(100) >= 90).long(), 2)
MULTI_HOT = torch.tensor(
    [[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 1]], dtype=torch.uint8
)


def forms(labels: torch.Tensor) -> dict[str, Any]:
    items = Items([(0, row) for row in labels])
    return {
        "tensor": labels,
        "array": labels.numpy(),
        "bool": labels.bool(),
        "items": items,
        "bool-items": Items([(0, row.bool()) for row in labels]),
        "loader": DataLoader(items, batch_size=2),
        "tensors": TensorDataset(torch.zeros(len(labels)), labels),
        "stored": Stored(labels=labels.numpy()),
        "part": Subset(Stored(labels=labels), [0, 2]),
    }


@pytest.mark.parametrize("num_classes", (None, 2))
@pytest.mark.parametrize("form", forms(ONE_HOT))
def test_one_hot_labels_are_named(form, num_classes):
    with pytest.raises(ValueError, match=r"labels are one-hot.*labels.argmax\(1\)"):
        class_counts(forms(ONE_HOT)[form], num_classes)


@pytest.mark.parametrize("num_classes", (None, 4))
@pytest.mark.parametrize("form", forms(MULTI_HOT))
def test_multi_hot_labels_are_named(form, num_classes):
    error = TypeError if "bool" in form else ValueError
    with pytest.raises(error, match=r"labels\.sum\(0\)"):
        class_counts(forms(MULTI_HOT)[form], num_classes)


def test_multi_hot_labels_of_two_classes_are_named_where_they_are_stored():
    with pytest.raises(ValueError, match=r"labels\.sum\(0\)"):
        class_counts(Stored(labels=torch.tensor([[1, 1], [0, 1]])), 2)


def test_multi_hot_labels_that_nobody_knows():
    labels = MULTI_HOT.long()
    labels[0, 0] = -1
    with pytest.raises(ValueError, match=r"\(labels == 1\)\.sum\(0\)"):
        class_counts(labels, 4, ignore_index=-1)


def test_masks_of_two_classes_are_counted():
    mask = MULTI_HOT  # 6 of 20 are 1
    assert class_counts(mask, 2).tolist() == [14, 6]
    assert class_counts(mask.flatten()).tolist() == [14, 6]
    masks = Items([(0, mask), (0, mask)])
    for source in (masks, DataLoader(masks, batch_size=2), Stored(targets=[mask.tolist()] * 2)):
        assert class_counts(source, 2).tolist() == [28, 12]
        assert class_counts(source).tolist() == [28, 12]
    rows = Items([(0, row) for row in mask])
    assert class_counts(rows, 2).tolist() == [14, 6]
    assert class_counts(TensorDataset(torch.zeros(5), mask), 2).tolist() == [14, 6]


def test_masked_labels():
    labels = np.ma.array([0, 1, 1, 7], mask=[False, False, False, True])
    assert class_counts(labels.compressed()).tolist() == [1, 2]
    assert class_counts(np.ma.array([0, 1, 1])).tolist() == [1, 2]


def test_labels_that_only_begin_like_one_hot_ones():
    assert class_counts(torch.tensor([[1, 0], [0, 1], [1, 1]])).tolist() == [2, 4]
    assert class_counts(torch.tensor([[1], [1]])).tolist() == [0, 2]


def test_parts_of_a_concatenation_are_not_loaded():
    class Labelled(Items):
        targets = (0, 2, 2)

        def __getitem__(self, i):
            raise AssertionError("loaded")

    parts: Any = ConcatDataset([Labelled([0, 0, 0]), Subset(Labelled([0, 0, 0]), [0, 1])])
    assert class_counts(parts).tolist() == [2, 0, 3]
    assert class_counts(Subset(parts, [0, 4])).tolist() == [1, 0, 1]


ERRORS: list[Any] = [
    (class_counts, ([0, 5, 7], 5), ValueError, r"labels\[1\] = 5: .* label < 5 \(2 of 3 "),
    (class_counts, ([1, -1],), ValueError, r"labels\[1\] = -1: expected a label >= 0"),
    (class_counts, (DataLoader(Items([(0, 0), (0, 3)])), 3), ValueError, r"labels\[1\] = 3"),
    (class_counts, ([[0, 1], [2, -1]], 3), ValueError, r"labels\[1, 1\] = -1: .* \(1 of 4 "),
    (class_counts, (torch.tensor([[0, 1], [3, 1]]), 3), ValueError, r"labels\[1, 0\] = 3"),
    (class_counts, ([],), ValueError, r"there are no labels"),
    (class_counts, ([0], 0), ValueError, r"num_classes = 0: expected at least 1"),
    (class_counts, ([0], 2.5), TypeError, r"num_classes must be an int or None, got 2.5"),
    (class_counts, ([0], "3"), TypeError, r"num_classes must be an int or None, got '3'"),
    (partial(class_counts, ignore_index=0.5), ([0],), TypeError, r"ignore_index must be an int"),  # type: ignore[arg-type]
    (class_counts, ([0, 10**13],), ValueError, r"without num_classes, below 100,000,000"),
    (class_counts, (torch.eye(3).long(),), ValueError, r"labels are one-hot.*argmax\(1\)"),
    (class_counts, (torch.eye(3).bool(),), ValueError, r"labels are one-hot.*argmax\(1\)"),
    (class_counts, ([1.0],), TypeError, r"labels must be integers .*got torch.float32"),
    (class_counts, (torch.tensor([True]),), TypeError, r"got torch.bool"),
    (class_counts, ({0: 1},), TypeError, r"cannot count the labels of a dict"),
    (
        class_counts,
        (np.ma.array([1], mask=True),),
        TypeError,
        r"masked array: .*compressed",
    ),
    (class_counts, (torch.ones(2, device="meta").long(),), TypeError, r"labels .*a meta tensor"),
    (class_counts, ({0, 1},), TypeError, r"cannot count the labels of a set: expected integer"),
    (class_counts, (torch.eye(3),), TypeError, r"float32; .*multi-hot labels are labels.sum\(0\)"),
    (class_counts, (Stream(),), TypeError, r"of a Stream: expected"),
    (class_counts, (Items([{"x": 1}]),), TypeError, r"no label in a dict: expected \(input, label"),
]


@pytest.mark.parametrize("function, args, error, match", ERRORS)
def test_errors(function, args, error, match):
    with pytest.raises(error, match=match):
        function(*args)
