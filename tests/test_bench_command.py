"""bench: a table of times, after values were compared; wrong ones end it."""

from __future__ import annotations

import re

import pytest
import torch
from support.backends import DEVICE

from cbloss_fused import bench_command, class_balanced_loss, cli, plain
from cbloss_fused.backends import REGISTRY


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_command, "SECONDS", 0.0)
    monkeypatch.setattr(bench_command, "ROUNDS", (3, 3))


def table(capfd: pytest.CaptureFixture[str], *options: str) -> tuple[str, list[list[str]]]:
    """The line of what is timed, and the cells of each loss."""
    cli.main(["bench", *options])
    out, err = capfd.readouterr()
    assert err == ""
    first, _, header, *rows = out.splitlines()
    assert re.split("  +", header) == ["loss", "fused", "eager", "eager / fused"]
    return first, [re.split("  +", row) for row in rows]


def test_both_activations(capfd):
    first, rows = table(capfd)
    assert first.startswith("(256, 1000) float32 logits on cpu, threads: ")
    assert [row[0] for row in rows] == ["softmax, gamma = 0", "sigmoid, gamma = 0"]
    for _, *cells in rows:
        fused, eager, ratio = map(float, cells)
        assert fused > 0
        assert ratio == pytest.approx(eager / fused, rel=0.05)


@pytest.mark.parametrize("dtype", bench_command.DTYPES)
@pytest.mark.parametrize("activation", ("softmax", "sigmoid"))
def test_options(activation, dtype, capfd):
    before = torch.get_num_threads()
    options = "-N", "7", "-C", "33", "--gamma", "0.5", "--threads", "2", "--device", DEVICE
    given = "--dtype", dtype, "--activation", activation
    first, rows = table(capfd, *options, *given)
    assert first.startswith(f"(7, 33) {dtype} logits on {DEVICE}")
    assert [row[0] for row in rows] == [f"{activation}, gamma = 0.5"]
    assert torch.get_num_threads() == before
    if DEVICE == "cpu":
        assert "threads: 2; " in first


def test_medians_of_calls_in_turns(monkeypatch):
    monkeypatch.setattr(bench_command, "ROUNDS", (2, 9))
    called = []
    device = torch.device("cpu")
    found = bench_command.medians([lambda: called.append(0), lambda: called.append(1)], device)
    assert called == [0, 1] * 3  # once before they are timed
    assert len(found) == 2


def test_a_wrong_value_ends_it(monkeypatch, capfd):
    def wrong(input, *args, **options):
        return class_balanced_loss(input, *args, **options) * 1.001

    monkeypatch.setattr(bench_command, "class_balanced_loss", wrong)
    with pytest.raises(SystemExit, match=r"fused softmax, .*: loss = .*; nothing was timed"):
        cli.main(["bench"])
    assert capfd.readouterr().out == ""


def test_a_wrong_formula_ends_it(monkeypatch, capfd):
    right = plain.plain_formulas("softmax", 0.0)[0]
    monkeypatch.setattr(
        bench_command, "plain_formulas", lambda *_: (right, lambda *a, **k: right(*a, **k) * 1.1)
    )
    with pytest.raises(SystemExit, match=r"eager softmax, .*: loss = .*; nothing was timed"):
        cli.main(["bench"])
    assert capfd.readouterr().out == ""


@pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU's kernels")
def test_without_kernels_it_says_so(monkeypatch, capfd):
    for name, backend in REGISTRY.items():
        if name != "reference":
            monkeypatch.setitem(REGISTRY, name, backend._replace(missing="not built"))
    assert table(capfd)[0].endswith("; no fused kernels: see doctor")
