"""How many samples each class of a dataset has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .arrays import Array, device, integer_or_none, require
from .groups import ProcessGroup, add_up, agreed, check_group, device_of
from .labels import bits_by_row, bits_error, label_chunks

MOST_CLASSES = 10**8  # without num_classes


def class_counts(
    labels_or_dataset: Tensor | Array | Sequence[int] | Dataset[Any] | DataLoader[Any],
    num_classes: int | None = None,
    *,
    ignore_index: int | None = None,
    background_index: int | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Count the samples of each class.

    A dataset is not iterated if it has an integer for each item in `.targets` or `.labels` (its
    `target_transform` is applied), nor is a `TensorDataset`, whose labels are its last tensor, nor
    a `Subset` or `ConcatDataset` of such. Of any other, and of a DataLoader, every item or batch is
    loaded, with a progress bar if tqdm is installed; its label is the second of two entries, or
    "label", "labels" or "target".

    Args:
        labels_or_dataset: class indices of any integer type and any shape, a map-style dataset, or
            a DataLoader (counted as it samples, without a last batch that it drops). The counts of
            one-hot and multi-hot labels (N, C) are `labels.sum(0)`.
        num_classes: C; the largest label + 1 if None.
        ignore_index, background_index: labels with these values are not counted, as in
            segmentation masks with 255; None: there are none.
        group: a torch.distributed.ProcessGroup: each of its ranks counts its own part, maybe an
            empty one, and all get the sum. None: no communication.
    Returns:
        (C,) int64, on the device of the labels if they are a tensor.
    Raises:
        ValueError: a label outside [0, C) that is not ignored; no labels, or one beyond 1e8, when
            num_classes is None; labels (N, C) that are one-hot or, by all that shows, multi-hot.
        TypeError: labels, num_classes or an index that are not integers, or items whose label
            cannot be told, such as tuples of three.
    With a group all ranks raise what one finds wrong.

    >>> class_counts([0, 2, 2, 1, 2], num_classes=4)
    tensor([1, 1, 3, 0])
    """

    def own() -> Tensor:
        return _counted(labels_or_dataset, num_classes, ignore_index, background_index)

    check_group(group)
    counts = own() if group is None else _over_ranks(own, group)
    if len(counts) == 0:
        raise ValueError("there are no labels: expected at least one, or num_classes")
    return counts.to(device(labels_or_dataset))


def _over_ranks(own: Callable[[], Tensor], group: ProcessGroup) -> Tensor:
    """The sum of the ranks' counts, of which some have seen fewer classes than others."""
    counts = torch.empty(0, device="cpu")

    def classes() -> Tensor:
        nonlocal counts
        counts = own()
        return torch.tensor(len(counts), device="cpu")

    where = device_of(group)
    C = int(agreed(classes, 1, group, where, largest=True))
    total = torch.zeros(C, dtype=torch.int64, device=where)
    total[: len(counts)] = counts
    add_up(total, group)
    return total.cpu()


def _counted(
    labels_or_dataset: Any,
    num_classes: int | None,
    ignore_index: int | None,
    background_index: int | None,
) -> Tensor:
    """The counts on the CPU; none without labels and num_classes."""
    C = integer_or_none("num_classes", num_classes)
    marks = (
        integer_or_none("ignore_index", ignore_index),
        integer_or_none("background_index", background_index),
    )
    no_class = [mark for mark in marks if mark is not None]
    if C is not None and C < 1:
        raise ValueError(f"num_classes = {C}: expected at least 1, or None")
    below = MOST_CLASSES if C is None else C
    expected = f"0 <= label < {C}"
    if C is None:
        expected = f"a label >= 0 and, without num_classes, below {MOST_CLASSES:,}"
    counts = torch.zeros(C or 0, dtype=torch.int64, device="cpu")
    seen, bits = 0, set[tuple[int, bool]]()
    for chunk in label_chunks(labels_or_dataset):
        labels = chunk.flatten()
        if len(labels) and (0, False) not in bits:
            bits.add(bits_by_row(chunk, no_class))
        good = (labels >= 0) & (labels < below)
        found = labels
        for mark in no_class:
            good |= labels == mark
            found = found[found != mark]
        whole = chunk.shape if seen == 0 else labels.shape  # of later chunks the shape is not known
        require(good.view(whole), labels.view(whole), "labels", expected, start=seen)
        old, counts = counts, torch.bincount(found, minlength=len(counts))
        counts[: len(old)] += old
        seen += len(labels)
    _refuse_bits(bits, C)
    return counts


def _refuse_bits(found: set[tuple[int, bool]], C: int | None) -> None:
    """Raise if all labels, seen as bits_by_row, are a 0 or 1 for each class."""
    widths = {columns for columns, _ in found}
    if len(widths) != 1 or 0 in widths:
        return
    (columns,), one_hot = widths, all(one_hot for _, one_hot in found)
    if one_hot or (columns > 2 and C in (None, columns)):  # two classes have binary masks
        raise bits_error(columns, one_hot)
