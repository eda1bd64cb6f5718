"""How many samples each class of a dataset has."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset

from .arrays import Array, device, require, tensor

T = TypeVar("T")


MOST_CLASSES = 10**8  # without num_classes


def class_counts(
    labels_or_dataset: Tensor | Array | Sequence[int] | Dataset[Any] | DataLoader[Any],
    num_classes: int | None = None,
    *,
    ignore_index: int | None = None,
    background_index: int | None = None,
) -> Tensor:
    """Count the samples of each class.

    A dataset with `.targets` or `.labels` is not iterated (its `target_transform` is applied), nor
    is a `Subset` or `ConcatDataset` of such. Of any other, and of a DataLoader, every item or batch
    is loaded, with a progress bar if tqdm is installed; its label is element 1, or "label",
    "labels" or "target".

    Args:
        labels_or_dataset: class indices (not one-hot) of any integer type and any shape, a
            map-style dataset, or a DataLoader (counted as it samples, a last batch dropped too).
        num_classes: C; the largest label + 1 if None.
        ignore_index, background_index: labels with these values are not counted, as in
            segmentation masks with 255; None: there are none.
    Returns:
        (C,) int64, on the device of the labels if they are a tensor.
    Raises:
        ValueError: a label outside [0, C) that is not ignored; no labels, or one beyond 1e8, when
            num_classes is None; labels of shape (N, C) that are one-hot.
        TypeError: labels, num_classes or an index that are not integers, or no labels found.

    >>> class_counts([0, 2, 2, 1, 2], num_classes=4)
    tensor([1, 1, 3, 0])
    """
    C = _int("num_classes", num_classes)
    marks = _int("ignore_index", ignore_index), _int("background_index", background_index)
    no_class = [mark for mark in marks if mark is not None]
    if C is not None and C < 1:
        raise ValueError(f"num_classes = {C}: expected at least 1, or None")
    below = MOST_CLASSES if C is None else C
    expected = f"0 <= label < {C}"
    if C is None:
        expected = f"a label >= 0 and, without num_classes, below {MOST_CLASSES:,}"
    counts = torch.zeros(C or 0, dtype=torch.int64, device="cpu")
    seen, shapes_of_one_hot = 0, True
    for chunk in _label_chunks(labels_or_dataset):
        labels = chunk.flatten()
        shapes_of_one_hot = shapes_of_one_hot and _is_one_hot(chunk)
        good = (labels >= 0) & (labels < below)
        found = labels
        for mark in no_class:
            good |= labels == mark
            found = found[found != mark]
        require(good, labels, "labels", expected, start=seen)
        old, counts = counts, torch.bincount(found, minlength=len(counts))
        counts[: len(old)] += old
        seen += len(labels)
    if seen and shapes_of_one_hot:
        raise ValueError(
            "labels are one-hot, one 1 in each row: expected class indices, labels.argmax(1)"
        )
    if len(counts) == 0:
        raise ValueError("there are no labels: expected at least one, or num_classes")
    return counts.to(device(labels_or_dataset))


def _int(name: str, value: Any) -> int | None:
    if value is None:
        return None
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int or None, got {value!r}") from None


def _is_one_hot(labels: Tensor) -> bool:
    """Whether an (N, C) chunk, C >= 2, has one 1 in each row and else 0."""
    if labels.dim() != 2 or labels.shape[1] < 2 or len(labels) == 0:
        return False
    return bool(((labels == 0) | (labels == 1)).all() and (labels.sum(1) == 1).all())


def _integers(values: Any) -> Tensor:
    t = tensor(values, "labels must be integers, a tensor, an array or a sequence")
    if t.dtype == torch.bool and _is_one_hot(t.long()):
        return t.long()  # whose error names them
    if t.numel() and (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool):
        raise TypeError(f"labels must be integers (class indices), got {t.dtype}")
    return t.long()


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
    if isinstance(dataset, ConcatDataset):
        parts = [_stored_labels(part) for part in dataset.datasets]
        known = [part.flatten() for part in parts if part is not None]
        return torch.cat(known) if len(known) == len(parts) else None
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
