"""Where a data set keeps its labels, and whether they are class indices at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
    default_convert,
)

from .arrays import tensor

T = TypeVar("T")


def label_chunks(source: Any) -> Iterator[Tensor]:
    """All labels as int64, in tensors whose first dimension is that of the samples."""
    if isinstance(source, DataLoader):
        collates = source.collate_fn in (default_collate, default_convert)
        last = collates and _is_of_tensors(source.dataset)
        yield from (_integers(_label_of(batch, last)) for batch in _progress(source))
    elif isinstance(source, Tensor | Sequence) or hasattr(source, "__array__"):
        yield _integers(source)
    elif (labels := _stored_labels(source)) is not None:
        yield labels
    elif isinstance(source, IterableDataset | Mapping) or not (
        hasattr(source, "__len__") and hasattr(source, "__getitem__")
    ):
        raise TypeError(
            f"cannot count the labels of a {type(source).__name__}: expected integer labels, "
            "a map-style dataset with a length, or a DataLoader"
        )
    else:
        items = (source[i] for i in _progress(range(len(source))))
        yield from (_integers(_label_of(item), item=True) for item in items)


def bits_by_row(labels: Tensor, no_class: Sequence[int] = ()) -> tuple[int, bool]:
    """The columns of (N, C) labels if all are 0 or 1, else 0; and whether each row has one 1."""
    if labels.dim() != 2 or labels.shape[1] < 2:
        return 0, False
    bits = (labels == 0) | (labels == 1)
    for mark in no_class:
        bits |= labels == mark
    if not bits.all():
        return 0, False
    return labels.shape[1], bool(((labels == 1).sum(1) == 1).all())


def bits_error(columns: int, one_hot: bool) -> ValueError:
    """Of labels that are a 0 or 1 for each class, not class indices."""
    if one_hot:
        return ValueError(
            "labels are one-hot, one 1 in each row: expected class indices, labels.argmax(1)"
        )
    return ValueError(
        f"labels of shape (N, {columns}) are all 0 or 1: expected class indices; the counts of "
        "multi-hot labels are labels.sum(0), or (labels == 1).sum(0) if some are ignored; of "
        "indices, as in a mask, pass labels.flatten()"
    )


def _integers(values: Any, item: bool = False) -> Tensor:
    """As int64; of an item's label a batch of one."""
    t = tensor(values, "labels must be integers, a tensor, an array or a sequence")
    if item:
        t = t.unsqueeze(0)
    if t.dtype == torch.bool and len(t.shape) == 2 and bits_by_row(t.long())[1]:
        return t.long()  # whose error names them
    if t.numel() and (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool):
        hint = "; the counts of multi-hot labels are labels.sum(0)" if t.dim() == 2 else ""
        raise TypeError(f"labels must be integers (class indices), got {t.dtype}{hint}")
    return t.long()


def _stored_labels(dataset: Any) -> Tensor | None:
    """The labels of all items, if the data set has them at hand."""
    if isinstance(dataset, Subset):
        labels = _stored_labels(dataset.dataset)
        return None if labels is None else labels[_integers(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        parts = [_stored_labels(part) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        alike = len({part.shape[1:] for part in known}) == 1
        return torch.cat(known) if alike and len(known) == len(parts) else None
    if type(dataset) is TensorDataset and len(dataset.tensors) > 1:
        return _integers(dataset.tensors[-1])
    for name in ("targets", "labels"):
        if (labels := _attribute(dataset, name)) is not None:
            return labels
    return None


def _attribute(dataset: Any, name: str) -> Tensor | None:
    """The labels in an attribute, unless that holds something else."""
    try:
        labels = _integers(getattr(dataset, name))
    except (AttributeError, TypeError):  # none, or paths, names of classes, ...
        return None
    length = len(dataset) if hasattr(dataset, "__len__") else None
    if labels.dim() == 0 or length not in (None, len(labels)):
        return None  # the items have been filtered since, or were never these
    columns, one_hot = bits_by_row(labels)
    if columns and not one_hot:
        raise bits_error(columns, one_hot)
    transform = getattr(dataset, "target_transform", None)
    if transform is None:
        return labels
    return _integers(list(map(transform, labels.tolist()))) if labels.dim() == 1 else None


def _is_of_tensors(dataset: Any) -> bool:
    """Whether the last entry of an item is its label; a subclass may append an index."""
    if type(dataset) is Subset:
        return _is_of_tensors(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return all(map(_is_of_tensors, dataset.datasets))
    return type(dataset) is TensorDataset


def _label_of(item: Any, last: bool = False) -> Any:
    """The label in an item or a batch; last: of several entries it is the last."""
    if isinstance(item, tuple | list) and (len(item) == 2 or (last and len(item) > 1)):
        return item[-1]
    for key in ("label", "labels", "target"):
        if isinstance(item, Mapping) and key in item:
            return item[key]
    if isinstance(item, tuple | list) and len(item) > 2:
        raise TypeError(
            f"an item has {len(item)} entries, any of which may be the label: pass the labels "
            "themselves, [item[i] for item in dataset], or add up class_counts(batch[i], C)"
        )
    raise TypeError(
        f"no label in a {type(item).__name__}: expected (input, label), or a mapping with "
        '"label", "labels" or "target"'
    )


def _progress(items: Iterable[T]) -> Iterable[T]:
    try:
        from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]
    except ImportError:  # an extra: without it the labels are counted silently
        return items
    bar: Iterable[T] = tqdm(items, desc="counting labels", leave=False)
    return bar
