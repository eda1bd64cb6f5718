"""The examples of examples/ that train with other packages: they run, learn and are short."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.backends import DEVICE, INTERPRETED

EXAMPLES = Path(__file__).parents[1] / "examples"
FEWER_EPOCHS = {"train_segmentation.py": ("--epochs", "2")}

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="examples of the CPU"),
    pytest.mark.filterwarnings("ignore:cbloss_fused runs in eager PyTorch"),
]
others_warn = pytest.mark.filterwarnings("ignore", "error:::cbloss_fused")


@pytest.mark.parametrize("name", ["train_amp.py", "train_segmentation.py"])
def test_example(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """Its last line is an accuracy far from chance."""
    monkeypatch.setattr(sys, "argv", [name, *FEWER_EPOCHS.get(name, ())])
    monkeypatch.chdir(tmp_path)
    path = EXAMPLES / name
    assert path.read_text("utf-8").count("\n") <= 40
    with torch.random.fork_rng():
        runpy.run_path(str(path), run_name="__main__")
    last = capsys.readouterr().out.strip().splitlines()[-1]
    accuracy = re.fullmatch(r"mean per-class accuracy ([01]\.\d{3})", last)
    assert accuracy, last
    assert 0.5 < float(accuracy[1]) <= 1


@others_warn
@pytest.mark.parametrize(
    "package, name",
    [
        ("lightning", "train_lightning.py"),
        ("transformers", "train_trainer.py"),
        ("accelerate", "train_accelerate.py"),
        ("timm", "train_timm.py"),
        ("skorch", "train_skorch.py"),
        ("fastai", "train_fastai.py"),
        ("torchvision", "train_detection.py"),
    ],
)
def test_example_of(
    package: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    pytest.importorskip(package)
    test_example(name, monkeypatch, tmp_path, capsys)
