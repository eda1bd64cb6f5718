"""Long-tailed CIFAR: the files, the split, the network, the protocol, the paper's numbers.

The images are random ones in files of CIFAR's format.
"""

from __future__ import annotations

import json
import math
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
import torch.nn.functional as F
from support.backends import DEVICE, INTERPRETED

pytest.importorskip("tabulate")
pytest.importorskip("tqdm")
from support.cifar_files import cifar_files, pickled, python2_pickle, write_cifar

from cbloss_fused.experiments import cifar, cifar_data, cifar_model
from cbloss_fused.experiments.cifar_data import DATASETS, DataError, load_cifar, long_tailed_split
from cbloss_fused.experiments.cifar_model import BLOCKS, Block, ResNet, crop_and_flip, normalized
from cbloss_fused.experiments.cifar_tables import error_table
from cbloss_fused.experiments.long_tail import long_tailed_counts
from cbloss_fused.experiments.paper import IMBALANCES, LOSSES, paper_error_rate

pytestmark = pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="an experiment on the CPU")
N_MAX_PUBLISHED = {name: dataset.n_max for name, dataset in DATASETS.items()}
N_MAX = {"cifar10": 20, "cifar20": 10, "cifar100": 10}  # of the small files


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images, one block a stage; nothing of another test's files."""
    load_cifar.cache_clear()
    for name, n in N_MAX.items():
        monkeypatch.setitem(DATASETS, name, DATASETS[name]._replace(n_max=n))
    monkeypatch.setattr(cifar_model, "BLOCKS", 1)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that is trained at once."""
    monkeypatch.setattr(cifar_model, "STAGES", ((4, 1), (8, 2), (16, 2)))


def written(name: str, folder: Path, packed: bool = False) -> dict[str, dict[bytes, Any]]:
    files = cifar_files(name, N_MAX[name])
    write_cifar(name, pickled(files), folder, packed)
    return files


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


# The network and its images -----------------------------------------------------------------------


def test_resnet_32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar_model, "BLOCKS", BLOCKS)
    model = ResNet(10, sigmoid=False)
    assert sum(p.numel() for p in model.parameters()) == 464_154  # none in the shortcuts
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == 32
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-5, 0.1)}
    x = torch.zeros(2, 3, 32, 32)
    shapes = []
    for block in model.layers:
        block.register_forward_hook(lambda _m, _x, y: shapes.append(tuple(y.shape[1:])))
    assert model(x).shape == (2, 10)
    assert shapes == [(16, 32, 32)] * 5 + [(32, 16, 16)] * 5 + [(64, 8, 8)] * 5


def test_shortcut() -> None:
    block = Block(2, 4, 2)
    torch.nn.init.zeros_(block.bn2.weight)  # what is left is the shortcut
    x = torch.rand(3, 2, 4, 4)
    y = block(x)
    torch.testing.assert_close(y[:, 1:3], x.view(3, 2, 2, 2, 2, 2).mean((3, 5)))
    assert not y[:, 0].any() and not y[:, 3].any()
    plain = Block(2, 2, 1)
    torch.nn.init.zeros_(plain.bn2.weight)
    torch.testing.assert_close(plain(x), x)


def test_initial_weights() -> None:
    """Glorot's uniform distribution; of a sigmoid p = 1 / C."""
    model = ResNet(100, sigmoid=True)
    weight = model.layers[2].conv2.weight
    bound = math.sqrt(6 / (2 * 64 * 9))
    assert 0.95 * bound < float(weight.detach().abs().max()) <= bound
    torch.testing.assert_close(model.head.bias.detach(), torch.full((100,), -math.log(99)))
    assert not ResNet(100, sigmoid=False).head.bias.any()


def test_normalized() -> None:
    x = normalized(torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1))
    assert x.flatten().tolist() == [-1.0, 0.0, 127 / 128]


def test_crop_and_flip() -> None:
    N = 200
    x = torch.randint(1, 256, (N, 3, 6, 5), dtype=torch.uint8)  # 0 is the padding alone
    before = x.clone()
    y = crop_and_flip(x, torch.Generator().manual_seed(0))
    assert y.dtype == torch.uint8 and y.shape == x.shape and torch.equal(x, before)
    padded = F.pad(x, (4, 4, 4, 4))
    seen = set()
    for image, moved in zip(padded, y, strict=True):
        found = [
            (down, right, flip)
            for down in range(9)
            for right in range(9)
            for flip in (False, True)
            for crop in [image[:, down : down + 6, right : right + 5]]
            if torch.equal(crop.flip(2) if flip else crop, moved)
        ]
        assert len(found) >= 1
        seen.add(found[0])
    for place, values in enumerate(({*range(9)}, {*range(9)}, {False, True})):
        assert {shift[place] for shift in seen} == values


def test_batches() -> None:
    got = list(cifar.batches(300, 300 * 2 // 128))
    assert {len(index) for index in got} == {128}
    stream = torch.cat(got)
    assert len(stream) == 512
    assert sorted(stream[:300].tolist()) == list(range(300)) != stream[:300].tolist()
    assert len(set(stream[300:].tolist())) == 212
    assert len(next(cifar.batches(50, 1))) == 128  # of fewer images than a batch


# The protocol -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "epoch, rate",
    [
        (0, 0),
        (1, 0.02),
        (4.5, 0.09),
        (5, 0.1),
        (159.9, 0.1),
        (160, 1e-3),
        (179.9, 1e-3),
        (180, 1e-5),
    ],
)
def test_learning_rate(epoch: float, rate: float) -> None:
    assert cifar.learning_rate(epoch) == pytest.approx(rate, rel=1e-9)
    assert cifar.learning_rate(epoch / 10, 20) == pytest.approx(rate, rel=1e-9)


@pytest.mark.parametrize("name", ["softmax-0.9", "sigmoid", "focal-0.5-0.999"])
def test_weight_decay(name: str) -> None:
    """Of everything, BatchNorm too; not of the head's bias under a sigmoid."""
    loss = LOSSES[name]
    model = ResNet(10, loss.sigmoid)
    groups = {g["weight_decay"]: g["params"] for g in cifar.parameter_groups(model, loss)}
    assert groups.keys() == {2e-4, 0.0}
    kept = [] if name == "softmax-0.9" else [model.head.bias]
    assert [id(p) for p in groups[0.0]] == [id(p) for p in kept]
    assert len(groups[2e-4]) == len(list(model.parameters())) - len(kept)


@pytest.mark.usefixtures("narrow")
def test_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learning rate of each step, SGD's options; losses of a seed have the same batches."""
    written("cifar10", tmp_path)
    split = long_tailed_split("cifar10", tmp_path, 10, seed=0)
    N, epochs = len(split.train.y), 7
    rates, batches, optimizers = [], [], []

    class Spy(torch.optim.SGD):
        def step(self, *args: Any) -> Any:
            rates.append({group["lr"] for group in self.param_groups})
            optimizers.append(self)
            return super().step(*args)

    def crop(x: torch.Tensor) -> torch.Tensor:
        batches.append(y := crop_and_flip(x))
        return y

    monkeypatch.setattr(torch.optim, "SGD", Spy)
    monkeypatch.setattr(cifar, "crop_and_flip", crop)
    first = cifar.train(LOSSES["softmax"], split, 0, epochs, torch.device("cpu"), quiet=True)
    steps = N * epochs // 128
    assert rates == [{cifar.learning_rate(i * 128 / N, epochs)} for i in range(steps)]
    assert optimizers[0].defaults | {"momentum": 0.9, "nesterov": False} == optimizers[0].defaults
    second = cifar.train(LOSSES["focal-2-0.99"], split, 0, epochs, torch.device("cpu"), quiet=True)
    assert all(map(torch.equal, batches[:steps], batches[steps:]))
    assert not torch.equal(first.head.weight, second.head.weight)
    cifar.train(LOSSES["softmax"], split, 1, epochs, torch.device("cpu"), quiet=True)
    assert not torch.equal(batches[0], batches[-steps])


def test_losses_are_the_papers() -> None:
    """Rows weighted by the class, over the number of rows; the paper's equations 8, 11 and 13."""
    counts = torch.tensor(long_tailed_counts(5000, 100, 10))
    logits, y = torch.randn(6, 10, dtype=torch.float64), torch.randint(10, (6,))
    for name, loss in LOSSES.items():
        if loss.beta:
            weight = (1 - loss.beta) / (1 - loss.beta ** counts.double())
            weight *= 10 / weight.sum()
        else:
            weight = torch.ones(10, dtype=torch.float64)
        if loss.family == "softmax":
            rows = F.cross_entropy(logits, y, reduction="none")
        else:
            z = torch.where(F.one_hot(y, 10).bool(), logits, -logits)
            p = z.sigmoid()
            rows = (-((1 - p) ** (loss.gamma or 0.0)) * p.log()).sum(1)
        got = cifar.make_loss(loss, counts)(logits, y)
        torch.testing.assert_close(got, (weight[y] * rows).mean(), rtol=1e-6, atol=0, msg=name)


# The paper's numbers ------------------------------------------------------------------------------


def test_search_space() -> None:
    assert len(LOSSES) == 25
    assert list(LOSSES)[:7] == [
        "softmax", "softmax-0.9", "softmax-0.99", "softmax-0.999", "softmax-0.9999",
        "sigmoid", "sigmoid-0.9",
    ]  # fmt: skip
    assert list(LOSSES)[-1] == "focal-2-0.9999"


@pytest.mark.parametrize(
    "dataset, loss, imbalance, rate",
    [
        ("CIFAR-10-LT", "softmax", 200, 34.32),
        ("CIFAR-10-LT", "focal-1-0.9999", 100, 25.43),
        ("CIFAR-10-LT", "sigmoid-0.9999", 10, 12.51),
        ("CIFAR-20-LT", "sigmoid-0.999", 100, 48.52),
        ("CIFAR-100-LT", "sigmoid-0.99", 50, 54.68),
        ("CIFAR-100-LT", "focal-0.5-0.999", 10, 42.01),
        ("CIFAR-100-LT", "focal-2", 20, 48.98),
    ],
)
def test_paper_error_rate(dataset: str, loss: str, imbalance: int, rate: float) -> None:
    assert paper_error_rate(dataset, LOSSES[loss], imbalance) == rate


def test_lowest_error_rates_are_those_of_table_2() -> None:
    table_2 = {
        "CIFAR-10-LT": [31.11, 25.43, 20.73, 15.64, 12.51],
        "CIFAR-100-LT": [63.77, 60.40, 54.68, 47.41, 42.01],
    }
    for dataset, rates in table_2.items():
        of_column = (
            [paper_error_rate(dataset, loss, i) for loss in LOSSES.values()] for i in IMBALANCES
        )
        assert [min(column) for column in of_column] == rates


def test_error_table() -> None:
    runs = [("softmax", 100, 30.0), ("softmax", 100, 31.0), ("softmax-0.9", 100, 29.0),
            ("softmax-0.99", 100, 28.0), ("softmax", 10, 14.0)]  # fmt: skip
    records = [dict(zip(("loss", "imbalance", "error"), r, strict=True)) for r in runs]
    records = [r | {"dataset": "cifar10"} for r in records]
    other = {"dataset": "cifar100", "loss": "sigmoid", "imbalance": 50, "error": 60.0}
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in error_table([*records, other], "cifar10").splitlines()
    ]
    assert rows[0] == ["loss", "1/100", "paper", "1/10", "paper"]
    assert rows[2:] == [
        ["softmax", "30.50 ± 0.71", "29.64", "14.00", "13.61"],
        ["softmax, β = 0.9", "29.00", "30.07", "", "14.12"],
        ["softmax, β = 0.99", "28.00", "28.53", "", "13.23"],
        ["lowest with β > 0", "28.00", "28.53", "", "13.23"],
    ]


# The command --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("narrow")
def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two datasets, one from its archive; what has been run is not run again."""
    written("cifar10", tmp_path, packed=True)
    written("cifar100", tmp_path)
    output = tmp_path / "results"
    argv = ["--data", str(tmp_path), "--dataset", "cifar10", "cifar100", "--imbalance", "10",
            "--losses", "softmax", "focal-0.5-0.999", "--epochs", "1", "--seeds", "1",
            "--output", str(output)]  # fmt: skip
    trained, train = [], cifar.train
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # threads stay as they are
    monkeypatch.setattr(cifar, "train", lambda *a: trained.append(a[0].name) or train(*a))
    cifar.main(argv)
    assert trained == ["softmax", "focal-0.5-0.999"] * 2
    printed = capsys.readouterr().out
    for title, softmax in (("CIFAR-10-LT", "13.61"), ("CIFAR-100-LT", "44.29")):
        part = printed[printed.index(title) :]
        assert "mean ± deviation of 1 seeds after 1 epochs" in part
        assert softmax in next(x for x in part.splitlines() if x.startswith("| softmax"))
    records = [json.loads(line) for line in (output / "runs.jsonl").read_text().splitlines()]
    assert [r["dataset"] for r in records] == ["cifar10"] * 2 + ["cifar100"] * 2
    for r in records:
        assert r["error"] == pytest.approx(100 - r["groups"]["all"], abs=1e-3)  # balanced test
    cifar.main(argv)
    assert len(trained) == 4
    assert capsys.readouterr().out == printed
    cifar.main([*argv, "--dataset", "cifar10", "--losses", "softmax", "--seeds", "2"])
    assert len(trained) == 5
    assert "mean ± deviation of 2 seeds" in capsys.readouterr().out


def test_a_run_can_go_to_another_process(tmp_path: Path) -> None:
    one = partial(cifar.run, data=tmp_path, device="cpu", threads=1, quiet=True)
    assert pickle.loads(pickle.dumps(one)).keywords == one.keywords
