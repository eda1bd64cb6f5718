"""Long-tailed CIFAR: the network, the protocol, the paper's numbers.

The images are random ones in files of CIFAR's format.
"""

from __future__ import annotations

import json
import math
import os
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.backends import DEVICE, INTERPRETED

pytest.importorskip("tabulate")
pytest.importorskip("tqdm")
from support.cifar_files import shrink, written

from cbloss_fused.experiments import cifar, cifar_model
from cbloss_fused.experiments.cifar_data import long_tailed_split
from cbloss_fused.experiments.cifar_model import BLOCKS, Block, ResNet, crop_and_flip, normalized
from cbloss_fused.experiments.cifar_tables import error_table
from cbloss_fused.experiments.long_tail import long_tailed_counts
from cbloss_fused.experiments.paper import IMBALANCES, LOSSES, paper_error_rate

pytestmark = pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="an experiment on the CPU")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that is trained at once."""
    monkeypatch.setattr(cifar_model, "STAGES", ((4, 1), (8, 2), (16, 2)))


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
    weight = model.get_parameter("layers.2.conv2.weight")
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
    trained, train = list[str](), cifar.train
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # threads stay as they are

    def watched(loss: Any, *rest: Any) -> Any:
        trained.append(loss.name)
        return train(loss, *rest)

    monkeypatch.setattr(cifar, "train", watched)
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
