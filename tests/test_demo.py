"""The demo from end to end in little time, and what its tables are made of."""

import re
import runpy
import sys

import pytest
import torch

from cbloss_fused import demo
from cbloss_fused.experiments.long_tail import long_tailed_counts

for extra in ("matplotlib", "sklearn", "tabulate", "tqdm"):
    pytest.importorskip(extra)

COUNTS = {
    20: [120, 86, 61, 44, 31, 22, 16, 11, 8, 6],
    50: [120, 77, 50, 32, 21, 13, 8, 5, 3, 2],
}


@pytest.fixture(autouse=True)
def torch_state():
    """The demo sets the seed and the number of threads; other tests must not notice."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)


def rows(printed, columns):
    """Cells of the body of every github table with so many columns."""
    lines = [re.split(r"\s*\|\s*", line)[1:-1] for line in printed.splitlines() if line[:1] == "|"]
    body = [cells for cells in lines if cells[0] != "loss" and cells[0] != "logits"]
    return [cells for cells in body if len(cells) == columns and not cells[0].startswith("-")]


@pytest.mark.filterwarnings("ignore:cbloss_fused runs in eager PyTorch")  # a build without kernels
def test_demo(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "TIMING_SECONDS", 0.01)
    monkeypatch.chdir(tmp_path)
    demo.main(["--seeds", "1", "--epochs", "1", "--output", "figure.png"])
    printed = capsys.readouterr().out

    accuracies = rows(printed, 4)
    assert [name for name, *_ in accuracies] == 2 * list(demo.LOSSES)
    assert all(0 <= float(cell) <= 100 for _, *cells in accuracies for cell in cells)
    times = rows(printed, 5)
    assert [(shape, name) for shape, name, *_ in times] == [
        (shape, name) for shape in ("(64, 10)", "(256, 8142)") for name in demo.TIMED
    ]
    for _, _, fused, eager, ratio in times:  # rounded to 0.001 and 0.1
        assert float(ratio) == pytest.approx(float(eager) / float(fused), rel=0.1, abs=0.1)
    assert all(str(counts) in printed for counts in COUNTS.values())

    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]  # and nothing else
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_runs_repeat():
    first, second = demo.run_all(seeds=1, epochs=1), demo.run_all(seeds=1, epochs=1)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("imbalance, counts", COUNTS.items())
def test_counts_follow_the_rule(imbalance, counts):
    assert long_tailed_counts(120, imbalance, 10) == counts
    assert demo.long_tailed_split(imbalance, seed=0).counts.tolist() == counts


def test_counts_of_long_tailed_cifar():
    published = [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100]
    assert long_tailed_counts(5000, 50, 10) == published


def test_split_is_balanced_disjoint_and_permuted():
    from sklearn.datasets import load_digits

    data = load_digits()
    digit_of = dict(zip((i.tobytes() for i in data.images / 16), data.target, strict=True))
    assert len(digit_of) == len(data.images)  # no image twice, so that bytes tell them apart
    orders = []
    for seed in range(3):
        split = demo.long_tailed_split(20, seed)
        train, test = ([i.double().numpy().tobytes() for i in x] for x in (split[0], split[2]))
        assert not set(train) & set(test)
        tested = torch.tensor([digit_of[i] for i in test]).view(10, demo.TEST_IMAGES)
        assert (tested == tested[:, :1]).all()
        orders.append(tested[:, 0].tolist())
        assert sorted(orders[-1]) == list(range(10))
        assert [digit_of[i] for i in train] == [orders[-1][y] for y in split.train_y]
    assert orders[0] != orders[1] != orders[2]


def test_class_accuracies():
    class Always(torch.nn.Module):
        def forward(self, x):
            return torch.eye(10)[3].expand(len(x), 10)

    accuracies = demo.class_accuracies(Always(), demo.long_tailed_split(20, seed=0))
    assert accuracies.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]


def test_accuracy_table():
    one = torch.tensor([1.0, 1, 1, 0.5, 0.5, 0.5, 0.5, 0, 0, 0])
    two = torch.tensor([0.8, 0.8, 0.8, 0.5, 0.5, 0.5, 0.5, 0.2, 0.2, 0.2])
    table = demo.accuracy_table({(20, name): torch.stack([one, two]) for name in demo.LOSSES}, 20)
    want = ["50.0 ± 0.0", "90.0 ± 14.1", "10.0 ± 14.1"]  # 14.1 = 20 / sqrt(2)
    assert rows(table, 4) == [[name, *want] for name in demo.LOSSES]


def test_sigmoid_losses_start_at_one_in_ten():
    sigmoid, softmax = (
        demo.make_model(demo.LOSSES[name])[-1].get_parameter("bias")
        for name in ("CB sigmoid", "CB softmax")
    )
    torch.testing.assert_close(sigmoid.sigmoid(), torch.full((10,), 0.1))
    assert (softmax.sigmoid() > 0.4).all()


def test_missing_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "cbloss_fused.demo")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match=r'sklearn.*: pip install "cbloss_fused\[demo\]"'):
        runpy.run_module("cbloss_fused.demo", run_name="__main__")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seeds", "0"], "at least 1"),
        (["--epochs", "-1"], "at least 1"),
        (["--output", "nowhere/demo.png"], "no such folder"),
    ],
)
def test_bad_options(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        demo.main(arguments)
    assert message in capsys.readouterr().err
