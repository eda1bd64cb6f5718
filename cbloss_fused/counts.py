"""How many samples each class of a dataset has."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from .arrays import Array, device, require, tensor

T = TypeVar("T")


def class_counts(
    labels_or_dataset: Tensor | Array | Sequence[int] | Dataset[Any] | DataLoader[Any],
    num_classes: int | None = None,
) -> Tensor:
    """Count the samples of each class.

    A dataset with `.targets` or `.labels` is not iterated (its `target_transform` is applied), nor
    is a `Subset` of one. Of any other, and of a DataLoader, every item or batch is loaded, with a
    progress bar if tqdm is installed; its label is element 1, or "label", "labels" or "target".

    Args:
        labels_or_dataset: class indices (not one-hot) of any integer type and any shape, a
            map-style dataset, or a DataLoader (counted as it samples, a last batch dropped too).
        num_classes: C; the largest label + 1 if None.
    Returns:
        (C,) int64, on the device of the labels if they are a tensor.
    Raises:
        ValueError: a label outside [0, C) (filter ignored ones out before), or none to tell C by.
        TypeError: labels that are not integers, or no labels to be found.

    >>> class_counts([0, 2, 2, 1, 2], num_classes=4)
    tensor([1, 1, 3, 0])
    """
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes = {num_classes}: expected at least 1, or None")
    below = math.inf if num_classes is None else num_classes
    expected = "a label >= 0" if num_classes is None else f"0 <= label < {num_classes}"
    counts = torch.zeros(num_classes or 0, dtype=torch.int64, device="cpu")
    seen = 0
    for labels in _label_chunks(labels_or_dataset):
        require((labels >= 0) & (labels < below), labels, "labels", expected, start=seen)
        old, counts = counts, torch.bincount(labels, minlength=len(counts))
        counts[: len(old)] += old
        seen += len(labels)
    if len(counts) == 0:
        raise ValueError("there are no labels: expected at least one, or num_classes")
    return counts.to(device(labels_or_dataset))


def _integers(values: Any) -> Tensor:
    t = tensor(values, "labels must be integers, a tensor, an array or a sequence")
    if t.numel() and (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool):
        raise TypeError(f"labels must be integers (class indices), got {t.dtype}")
    return t.long().flatten()


def _label_chunks(source: Any) -> Iterator[Tensor]:
    if isinstance(source, DataLoader):
        yield from (_integers(_label_of(batch)) for batch in _progress(source))
    elif isinstance(source, Tensor | Sequence) or hasattr(source, "__array__"):
        yield _integers(source)
    elif (labels := _stored_labels(source)) is not None:
        yield labels
    elif not hasattr(source, "__len__") or isinstance(source, IterableDataset | Mapping):
        raise TypeError(
            f"cannot count the labels of a {type(source).__name__}: expected integer labels, "
            "a map-style dataset with a length, or a DataLoader"
        )
    else:
        yield from (_integers(_label_of(source[i])) for i in _progress(range(len(source))))


def _stored_labels(dataset: Any) -> Tensor | None:
    if isinstance(dataset, Subset):
        labels = _stored_labels(dataset.dataset)
        return None if labels is None else labels[_integers(dataset.indices)]
    for name in ("targets", "labels"):
        if (stored := getattr(dataset, name, None)) is not None:
            transform = getattr(dataset, "target_transform", None)
            labels = _integers(stored)
            return labels if transform is None else _integers(list(map(transform, labels.tolist())))
    return None


def _label_of(item: Any) -> Any:
    if isinstance(item, tuple | list) and len(item) > 1:
        return item[1]
    for key in ("label", "labels", "target"):
        if isinstance(item, Mapping) and key in item:
            return item[key]
    raise TypeError(
        f"no label in a {type(item).__name__}: expected (input, label, …), or a mapping with "
        '"label", "labels" or "target"'
    )


def _progress(items: Iterable[T]) -> Iterable[T]:
    try:
        from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]
    except ImportError:  # an extra: without it the labels are counted silently
        return items
    bar: Iterable[T] = tqdm(items, desc="counting labels", leave=False)
    return bar
