"""Long-tailed CIFAR: the files and the split.

The images are random ones in files of CIFAR's format.
"""

from __future__ import annotations

import os
import pickle
import pickletools
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.backends import DEVICE, INTERPRETED

pytest.importorskip("tabulate")
pytest.importorskip("tqdm")
from support.cifar_files import (
    N_MAX,
    N_MAX_PUBLISHED,
    cifar_files,
    pickled,
    python2_pickle,
    shrink,
    write_cifar,
    written,
)

from cbloss_fused.experiments import cifar, cifar_data
from cbloss_fused.experiments.cifar_data import DATASETS, DataError, load_cifar, long_tailed_split
from cbloss_fused.experiments.long_tail import long_tailed_counts

pytestmark = pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="an experiment on the CPU")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


# The files ----------------------------------------------------------------------------------------


def test_small_files_are_as_python_2_wrote_them() -> None:
    content = cifar_files("cifar10", 20)["test_batch"]
    data = python2_pickle(content)
    opcodes = {
        (op.name, arg if op.name == "GLOBAL" else "") for op, arg, _ in pickletools.genops(data)
    }
    assert ("BINSTRING", "") in opcodes and ("BINUNICODE", "") not in opcodes
    names = {arg for name, arg in opcodes if name == "GLOBAL"}
    assert names == {"numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy no longer likes such files
        read = pickle.loads(data, encoding="bytes")
    assert (read.pop(b"data") == content.pop(b"data")).all() and read == content


@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "archive"])
@pytest.mark.parametrize("name", DATASETS)
def test_files_are_read(name: str, packed: bool, tmp_path: Path) -> None:
    files, dataset = written(name, tmp_path, packed), DATASETS[name]
    before = sorted(tmp_path.rglob("*"))
    train, test = load_cifar(name, tmp_path)
    for images, parts in ((train, dataset.train), (test, (dataset.test,))):
        pixels = np.concatenate([files[part][b"data"] for part in parts]).reshape(-1, 3, 32, 32)
        assert images.x.dtype == torch.uint8 and (images.x.numpy() == pixels).all()
        assert images.y.tolist() == [y for part in parts for y in files[part][dataset.labels]]
    assert sorted(tmp_path.rglob("*")) == before  # an archive is not unpacked


def test_published_files() -> None:
    """Names as on Krizhevsky's page; 20 classes are the superclasses of the 100."""
    names = {
        "cifar10": ("cifar-10-python.tar.gz", "cifar-10-batches-py", b"labels", 10),
        "cifar20": ("cifar-100-python.tar.gz", "cifar-100-python", b"coarse_labels", 20),
        "cifar100": ("cifar-100-python.tar.gz", "cifar-100-python", b"fine_labels", 100),
    }
    assert names == {n: (d.archive, d.folder, d.labels, d.C) for n, d in DATASETS.items()}
    assert DATASETS["cifar10"].train == tuple(f"data_batch_{i}" for i in (1, 2, 3, 4, 5))
    assert DATASETS["cifar10"].test == "test_batch"
    assert (*DATASETS["cifar100"].train, DATASETS["cifar100"].test) == ("train", "test")
    assert N_MAX_PUBLISHED == {"cifar10": 5000, "cifar20": 2500, "cifar100": 500}


def test_columns_first(tmp_path: Path) -> None:
    """NumPy also writes arrays whose first index runs first."""
    files = cifar_files("cifar10", 20)
    pixels = files["test_batch"][b"data"]
    files["test_batch"][b"data"] = np.asfortranarray(pixels)
    write_cifar("cifar10", pickled(files), tmp_path, packed=False)
    _, test = load_cifar("cifar10", tmp_path)
    assert (test.x.numpy() == pixels.reshape(-1, 3, 32, 32)).all()


class Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize(
    "function, name",
    [(os.mkdir, r"posix\.mkdir"), (eval, r"__builtin__\.eval")],
    ids=["mkdir", "eval"],
)
@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "archive"])
def test_a_pickle_that_calls_is_refused(
    function: Any, name: str, packed: bool, tmp_path: Path
) -> None:
    files, made = pickled(cifar_files("cifar10", 20)), tmp_path / "made"
    argument = str(made) if function is os.mkdir else f"__import__('os').mkdir({str(made)!r})"
    content = {b"data": Call(function, argument), b"labels": [0]}
    files["data_batch_3"] = python2_pickle(content)
    write_cifar("cifar10", files, tmp_path, packed)
    with pytest.raises(DataError, match=rf"data_batch_3 is no file of CIFAR: it asks for {name}"):
        load_cifar("cifar10", tmp_path)
    assert not made.exists()
    pickle.loads(files["data_batch_3"])
    assert made.exists()  # it would have


def test_numpy_itself_is_never_called() -> None:
    for module, name in (("numpy", "load"), ("numpy.core.multiarray", "scalar"), ("os", "system")):
        code = pickle.GLOBAL + f"{module}\n{name}\n".encode() + pickle.STOP
        with pytest.raises(DataError, match=rf"f is no file of CIFAR: it asks for {module}.{name}"):
            cifar_data._unpickle(code, "f")


PIXELS = np.zeros((2, 3072), np.uint8)
OTHERS = {
    "no dict": [1],
    "no labels": {b"data": PIXELS},
    "no images": {b"labels": [0, 1]},
    "a label less": {b"data": PIXELS, b"labels": [0]},
    "nothing": {b"data": PIXELS[:0], b"labels": []},
    "11th class": {b"data": PIXELS, b"labels": [0, 10]},
    "labels of text": {b"data": PIXELS, b"labels": [0, b"1"]},
    "float64": {b"data": PIXELS.astype(float), b"labels": [0, 1]},
    "objects": {b"data": PIXELS.astype(object), b"labels": [0, 1]},
    "one colour": {b"data": PIXELS[:, :1024], b"labels": [0, 1]},
    "one row": {b"data": PIXELS.reshape(1, 6144), b"labels": [0, 1]},
    "bytes": {b"data": b"\0" * 6144, b"labels": [0, 1]},
}
NO_PICKLES = {"empty": b"", "HTML": b"<html>"}


@pytest.mark.parametrize("kind", [*NO_PICKLES, *OTHERS])
def test_other_files_are_refused(kind: str, tmp_path: Path) -> None:
    data = NO_PICKLES[kind] if kind in NO_PICKLES else python2_pickle(OTHERS[kind])
    files = pickled(cifar_files("cifar10", 20)) | {"test_batch": data}
    write_cifar("cifar10", files, tmp_path, packed=False)
    with pytest.raises(DataError, match=r"cifar-10-batches-py/test_batch is no file of CIFAR"):
        load_cifar("cifar10", tmp_path)


def exit_message(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as exit:
        cifar.main(argv)
    assert exit.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", DATASETS)
def test_missing_data(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = exit_message(capsys, "--data", str(tmp_path), "--dataset", name)
    number = 10 if name == "cifar10" else 100
    assert f"{tmp_path}: {name} needs cifar-{number}-python.tar.gz or the unpacked" in message


@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "archive"])
def test_incomplete_data(packed: bool, tmp_path: Path) -> None:
    files = pickled(cifar_files("cifar10", 20))
    del files["data_batch_2"], files["test_batch"]
    write_cifar("cifar10", files, tmp_path, packed)
    with pytest.raises(DataError, match="is incomplete: it lacks data_batch_2, test_batch"):
        load_cifar("cifar10", tmp_path)


@pytest.mark.parametrize("keep", [0, 1000, -1000])
def test_broken_archive(keep: int, tmp_path: Path) -> None:
    written("cifar10", tmp_path, packed=True)
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz (cannot be read|is incomplete)"):
        load_cifar("cifar10", tmp_path)


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--epochs", "0", "--epochs 0: expected at least 1"),
        ("--losses", "focal", "invalid choice: 'focal'"),
        ("--imbalance", "3", "invalid choice: 3"),
        ("--device", "abacus", "--device abacus: "),
    ],
)
def test_wrong_options(
    option: str, value: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written("cifar10", tmp_path)
    assert message in exit_message(capsys, "--data", str(tmp_path), option, value)


# The split ----------------------------------------------------------------------------------------


def test_published_counts() -> None:
    """Of the paper's code for 1/50; those for 1/100, and the totals, are in many later papers."""
    published = {
        50: [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100],
        100: [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50],
    }
    for imbalance, counts in published.items():
        assert long_tailed_counts(5000, imbalance, 10) == counts
    totals = {(10, 10): 20431, (10, 100): 12406, (100, 10): 19573, (100, 100): 10847}
    for (C, imbalance), total in totals.items():
        assert sum(long_tailed_counts(50000 // C, imbalance, C)) == total


@pytest.mark.parametrize("name", DATASETS)
def test_split(name: str, tmp_path: Path) -> None:
    written(name, tmp_path)
    images, test = load_cifar(name, tmp_path)
    C, n_max = DATASETS[name].C, N_MAX[name]
    split = long_tailed_split(name, tmp_path, 10, seed=0)
    counts = long_tailed_counts(n_max, 10, C)
    assert split.counts.tolist() == counts
    assert torch.bincount(split.train.y, minlength=C).tolist() == counts
    assert split.test.x is test.x and split.test.y is test.y
    of_image = {x.numpy().tobytes(): int(y) for x, y in zip(*images, strict=True)}
    chosen = {x.numpy().tobytes(): int(y) for x, y in zip(*split.train, strict=True)}
    assert len(chosen) == sum(counts) and chosen.items() <= of_image.items()


def test_seeds_draw_the_images(tmp_path: Path) -> None:
    written("cifar10", tmp_path)
    split = partial(long_tailed_split, "cifar10", tmp_path)
    kept = {seed: {x.numpy().tobytes() for x in split(10, seed).train.x} for seed in (0, 1)}
    assert kept[0] != kept[1]
    assert {x.numpy().tobytes() for x in split(10, 0).train.x} == kept[0]
    rarer = {x.numpy().tobytes() for x in split(20, 0).train.x}
    assert rarer < kept[0]  # the first images of the same shuffle


def test_too_few_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written("cifar10", tmp_path)
    monkeypatch.setitem(DATASETS, "cifar10", DATASETS["cifar10"]._replace(n_max=5000))
    message = "cifar10: class 0 has 20 training images, expected 5000"
    with pytest.raises(DataError, match=message):
        long_tailed_split("cifar10", tmp_path, 10, seed=0)
    with pytest.raises(SystemExit, match=message):
        cifar.main(["--data", str(tmp_path), "--output", str(tmp_path / "out")])
