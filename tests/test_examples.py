"""The examples of examples/: as many processes as one likes, the same losses."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.backends import DEVICE, INTERPRETED

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="processes of the CPU"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
]


@pytest.mark.filterwarnings("ignore:cbloss_fused runs in eager PyTorch")  # a build without kernels
@pytest.mark.long
@pytest.mark.parametrize("name", ["train_ddp.py", "train_fsdp2.py", "train_tensor_parallel.py"])
def test_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Two ranks print and have the losses of one process."""
    for extra in ("matplotlib", "sklearn", "tabulate", "tqdm"):
        pytest.importorskip(extra)
    one, two = tmp_path / "1.json", tmp_path / "2.json"
    given = [str(EXAMPLES / name), "--epochs", "3", "--out"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [sys.executable, *torchrun, *given, str(two)]
    start = partial(
        subprocess.Popen, command, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process = start()
    with monkeypatch.context() as patch, torch.random.fork_rng():
        patch.setattr(sys, "argv", [*given, str(one)])
        runpy.run_path(given[0], run_name="__main__")
    printed, told = process.communicate(timeout=120)
    if "terminate called without an active exception" in told:
        # Threads of gloo outlive DDP's groups, and one that frees a tensor while Python ends aborts
        # (github.com/pytorch/pytorch/issues/190489): rarely, on a busy machine.
        process = start()
        printed, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    assert printed == capsys.readouterr().out
    assert printed.count("\n") == 3
    losses = json.loads(one.read_text())
    assert json.loads(two.read_text()) == pytest.approx(losses, rel=1e-4)
    third = len(losses) // 3
    assert sum(losses[-third:]) < sum(losses[:third])
