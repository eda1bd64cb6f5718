"""What is Triton's own: layouts as a pure function, and where its kernels serve."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from support.backends import DEVICE, INTERPRETED

from cbloss_fused import class_balanced_loss
from cbloss_fused.backends import REGISTRY
from cbloss_fused.options import Formula, Options
from cbloss_fused.triton import heuristics
from cbloss_fused.triton.call import Call
from cbloss_fused.triton.plan import plan

H100 = heuristics.Device(132, 32)


@pytest.mark.parametrize("sigmoid", (False, True))
@pytest.mark.parametrize("itemsize", (2, 4, 8))
def test_configurations_cover_every_row(sigmoid, itemsize):
    """Every vector in one split, tiles within a block's means, few programs none too many."""
    VEC = 16 // itemsize
    for smooth in (False, True):
        for rows in (1, 8, 200, 4096):
            for C in (129, 1000, 8142, 8192, 8193, 16_384, 16_385, 50_000, 131_072, 2**20, 2**24):
                found = heuristics.row_layout(rows, C, itemsize, sigmoid, smooth, H100)
                assert found.splits * found.span >= C // VEC > (found.splits - 1) * found.span
                assert found.span % found.V == 0
                assert 2048 * found.warps >= found.V * VEC
                assert found.warps in (1, 2, 4, 8, 16, 32)
                assert not found.single or found.V >= C // VEC
                assert found.splits == 1 or rows * found.splits <= 8 * 132


@pytest.mark.parametrize("activation", ("softmax", "sigmoid"))
def test_columns_beyond_32_bits_are_left_to_pytorch(activation):
    """Those to the end of a row's last tile are counted, too."""
    formula = Formula.of(Options(activation))
    for C, fits in ((2**31 - 2**17, True), (2**31 - 8, False), (2**31, False)):
        call = Call((1, C), torch.bfloat16, (C, 1), (C, 1), False, formula, H100, None)
        assert (plan(call) is not None) == fits


# Where ------------------------------------------------------------------------------------------


def test_backend_triton_needs_a_gpu_or_the_interpreter(monkeypatch):
    if INTERPRETED or DEVICE == "cuda":
        pytest.skip("there is one")
    x, y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"needs CUDA tensors, got cpu.*TRITON_INTERPRET=1"):
        class_balanced_loss(x, y, backend="triton")
    absent = REGISTRY["triton"]._replace(missing="Triton is not installed")
    monkeypatch.setitem(REGISTRY, "triton", absent)
    with pytest.raises(ValueError, match="cannot be used here: Triton is not installed"):
        class_balanced_loss(x, y, backend="triton")


def test_importing_does_not_import_triton():
    code = """
import sys, torch
before = "triton" in sys.modules
import cbloss_fused
cbloss_fused.backends()
assert ("triton" in sys.modules) == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cuda_has_the_triton_kernels():
    assert "CUDA" in torch._C._dispatch_dump("cbloss_fused::loss")
    assert "CUDA" in torch._C._dispatch_dump("cbloss_fused::gradient")
