"""CIFAR from the archives that Krizhevsky published, and its long-tailed version."""

from __future__ import annotations

import pickle
import tarfile
from collections.abc import Iterable, Iterator
from functools import lru_cache
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .long_tail import long_tailed_counts

IMAGE = (3, 32, 32)


class Dataset(NamedTuple):
    """Where a dataset's files lie, and what they hold."""

    title: str  # as the paper's table has it
    archive: str
    folder: str  # of the archive
    train: tuple[str, ...]
    test: str
    labels: bytes
    C: int
    n_max: int  # training images of each class


CIFAR100_FILES = "cifar-100-python.tar.gz", "cifar-100-python", ("train",), "test"
DATASETS = {
    "cifar10": Dataset(
        "CIFAR-10-LT",
        "cifar-10-python.tar.gz",
        "cifar-10-batches-py",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test_batch",
        b"labels",
        C=10,
        n_max=5000,
    ),
    "cifar20": Dataset("CIFAR-20-LT", *CIFAR100_FILES, b"coarse_labels", C=20, n_max=2500),
    "cifar100": Dataset("CIFAR-100-LT", *CIFAR100_FILES, b"fine_labels", C=100, n_max=500),
}


class Images(NamedTuple):
    """Images (N, 3, 32, 32) uint8 and labels (N,)."""

    x: Tensor
    y: Tensor


class Split(NamedTuple):
    """A long-tailed training set, its counts (C,), and the whole test set."""

    train: Images
    test: Images
    counts: Tensor


class DataError(ValueError):
    """Files that are missing, or are not what they should be."""


def long_tailed_split(name: str, folder: Path, imbalance: float, seed: int) -> Split:
    """Of each class the first images of a shuffle, which the seed draws; classes as they are.

    Raises: DataError: see load_cifar, and too few images of a class.
    """
    train, test = load_cifar(name, folder)
    dataset, generator = DATASETS[name], torch.Generator().manual_seed(seed)
    counts = long_tailed_counts(dataset.n_max, imbalance, dataset.C)
    order = torch.randperm(len(train.y), generator=generator)
    kept = [order[train.y[order] == c][:n] for c, n in enumerate(counts)]
    for c, (i, n) in enumerate(zip(kept, counts, strict=True)):
        if len(i) < n:
            raise DataError(f"{name}: class {c} has {len(i)} training images, expected {n}")
    index = torch.cat(kept)
    return Split(Images(train.x[index], train.y[index]), test, torch.tensor(counts))


@lru_cache(1)
def load_cifar(name: str, folder: Path) -> tuple[Images, Images]:
    """Training and test images of a dataset, from its unpacked folder or from the archive.

    Raises: DataError: neither is there, or a file is no part of CIFAR.
    """
    dataset, path = DATASETS[name], find_cifar(name, folder)
    found = {}
    for file, data in _read_files(dataset, path):
        where = f"{dataset.folder}/{file}"
        found[file] = _images(_unpickle(data, where), dataset, where)
    _check_complete(dataset, found, path)
    parts = [found[file] for file in dataset.train]
    train = Images(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))
    return train, found[dataset.test]


def find_cifar(name: str, folder: Path) -> Path:
    """The unpacked folder of a dataset, or its archive.

    Raises: DataError: neither is there, or the folder lacks a file.
    """
    dataset = DATASETS[name]
    unpacked, archive = folder / dataset.folder, folder / dataset.archive
    if unpacked.is_dir():
        _check_complete(dataset, [f.name for f in unpacked.iterdir()], unpacked)
        return unpacked
    if archive.is_file():
        return archive
    raise DataError(
        f"{folder}: {name} needs {dataset.archive} or the unpacked folder {dataset.folder}, "
        "from https://www.cs.toronto.edu/~kriz/cifar.html"
    )


def _check_complete(dataset: Dataset, found: Iterable[str], path: Path) -> None:
    if missing := sorted({*dataset.train, dataset.test} - {*found}):
        raise DataError(f"{path} is incomplete: it lacks {', '.join(missing)}")


def _read_files(dataset: Dataset, path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file of the dataset, none of which is written anywhere."""
    if path.is_dir():
        for file in (*dataset.train, dataset.test):
            yield file, (path / file).read_bytes()
        return
    wanted = {f"{dataset.folder}/{file}": file for file in (*dataset.train, dataset.test)}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                file = wanted.get(member.name.removeprefix("./"), "")
                content = archive.extractfile(member) if file and member.isfile() else None
                if content is not None:
                    yield file, content.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


class _Array:
    """What stands in a pickle for a NumPy array: here its bytes."""

    def __init__(self, *_: Any) -> None:
        self.data: Any = None
        self.shape: Any = None
        self.fortran: Any = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, self.shape, _dtype, self.fortran, self.data = state


class _Dtype:
    """What stands in a pickle for NumPy's dtype, in these files always uint8."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """A pickle may name any function, to be called: here these three, none of them NumPy's own."""

    names: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.names[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def _unpickle(data: bytes, where: str) -> dict[bytes, Any]:
    try:
        content = _Unpickler(BytesIO(data), encoding="bytes").load()
    except Exception as error:  # whatever the bytes of another file may lead to
        raise DataError(f"{where} is no file of CIFAR: {error}") from None
    return content if isinstance(content, dict) else {}


def _images(content: dict[bytes, Any], dataset: Dataset, where: str) -> Images:
    array: Any = content.get(b"data")
    labels: Any = content.get(dataset.labels)
    if not _is_as_published(array, labels, dataset.C):
        raise DataError(
            f"{where} is no file of CIFAR: expected images of {prod(IMAGE)} bytes as 'data', and "
            f"'{dataset.labels.decode()}' from 0 to {dataset.C - 1}"
        )
    pixels = torch.frombuffer(bytearray(array.data), dtype=torch.uint8)
    rows = pixels.view(-1, len(labels)).t() if array.fortran else pixels
    return Images(rows.reshape(-1, *IMAGE), torch.tensor(labels))


def _is_as_published(array: Any, labels: Any, C: int) -> bool:
    return (
        isinstance(array, _Array)
        and isinstance(array.data, bytes)
        and isinstance(labels, list)
        and len(labels) > 0
        and array.shape == (len(labels), prod(IMAGE))
        and len(array.data) == len(labels) * prod(IMAGE)
        and all(isinstance(y, int) and 0 <= y < C for y in labels)
    )
