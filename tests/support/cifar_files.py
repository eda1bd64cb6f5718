"""Small files of CIFAR's format: pickles as Python 2 wrote them, in folders and in archives."""

from __future__ import annotations

import pickle
import struct
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from cbloss_fused.experiments import cifar_model
from cbloss_fused.experiments.cifar_data import DATASETS, load_cifar

Pickler: Any = vars(pickle)["_Pickler"]  # the one in Python, whose parts can be replaced


class Python2Pickler(Pickler):
    """Bytes and text are Python 2's str."""

    dispatch: ClassVar[dict[type, Any]] = dict(Pickler.dispatch)

    def save_string(self, value: bytes | str) -> None:
        data = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)

    dispatch[bytes] = dispatch[str] = save_string


def python2_pickle(value: Any) -> bytes:
    """With NumPy's name of then."""
    file = BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def cifar_files(name: str, per_class: int, seed: int = 0) -> dict[str, dict[bytes, Any]]:
    """Random images, as many of each class in training and half of that in the test."""
    dataset, rng = DATASETS[name], np.random.default_rng(seed)

    def content(n: int) -> dict[bytes, Any]:
        labels = rng.permutation(n) % dataset.C
        pixels = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
        return {b"batch_label": b"a batch", dataset.labels: labels.tolist(), b"data": pixels}

    N, parts = per_class * dataset.C, len(dataset.train)
    assert N % parts == 0
    return {file: content(N // parts) for file in dataset.train} | {dataset.test: content(N // 2)}


def write_cifar(name: str, files: dict[str, bytes], folder: Path, packed: bool) -> None:
    """The archive, or what it unpacks to."""
    dataset = DATASETS[name]
    files = files | {"readme.html": b"<html>"}
    if not packed:
        (folder / dataset.folder).mkdir(parents=True)
        for file, data in files.items():
            (folder / dataset.folder / file).write_bytes(data)
        return
    with tarfile.open(folder / dataset.archive, "w:gz") as archive:
        directory = tarfile.TarInfo(dataset.folder)
        directory.type = tarfile.DIRTYPE
        archive.addfile(directory)
        for file, data in files.items():
            member = tarfile.TarInfo(f"{dataset.folder}/{file}")
            member.size = len(data)
            archive.addfile(member, BytesIO(data))


def pickled(files: dict[str, dict[bytes, Any]]) -> dict[str, bytes]:
    return {file: python2_pickle(content) for file, content in files.items()}


N_MAX_PUBLISHED = {name: dataset.n_max for name, dataset in DATASETS.items()}
N_MAX = {"cifar10": 20, "cifar20": 10, "cifar100": 10}  # of the small files


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images, one block a stage; nothing of another test's files."""
    load_cifar.cache_clear()
    for name, n in N_MAX.items():
        monkeypatch.setitem(DATASETS, name, DATASETS[name]._replace(n_max=n))
    monkeypatch.setattr(cifar_model, "BLOCKS", 1)


def written(name: str, folder: Path, packed: bool = False) -> dict[str, dict[bytes, Any]]:
    """Small files in a folder, and their contents."""
    files = cifar_files(name, N_MAX[name])
    write_cifar(name, pickled(files), folder, packed)
    return files
