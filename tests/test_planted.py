"""Faults planted in the kernels for CPUs and in Triton's, each of which a check must find."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from native import build, faults, triton_faults
from support.backends import INTERPRETED

from cbloss_fused.backends import REGISTRY, set_isa

pytestmark = pytest.mark.slow
DRAWS = "4"  # so that no fault is found by luck: a run ends at the first finding
COMPILED = pytest.mark.skipif(
    INTERPRETED or REGISTRY["cpu"].missing is not None or shutil.which("g++") is None,
    reason="needs the kernels for CPUs, and g++",
)


def said(find, planted, folder):
    """What find(fault, place) says of each fault."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        places = [folder / str(i) for i in range(len(planted))]
        return dict(zip(planted, pool.map(find, planted, places), strict=True))


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    isa = "avx2" if "avx2" in set_isa() else "baseline"
    good = build.objects_of(build.ROOT / "csrc", folder / "good", [isa], faults.FLAGS)

    def find(fault, place):
        made = faults.plant(fault, place, isa, good)
        found = faults.finding(made, "--dtypes", fault.dtype, "--draws", DRAWS)
        shutil.rmtree(place)
        return found

    return said(find, faults.NONE + faults.FAULTS, folder)


@pytest.fixture(scope="module")
def triton_findings(tmp_path_factory):
    pytest.importorskip("triton")

    def find(fault, place):
        made, arguments = triton_faults.plant(fault, place), triton_faults.arguments(fault)
        return faults.finding(made, *arguments, "--draws", DRAWS, TRITON_INTERPRET="1")

    planted = triton_faults.NONE + triton_faults.FAULTS
    return said(find, planted, tmp_path_factory.mktemp("triton"))


@COMPILED
@pytest.mark.parametrize("none", faults.NONE, ids=lambda fault: fault.dtype)
def test_nothing_is_found_without_a_fault(findings, none):
    """Else whatever fails for another reason would count as a fault that is found."""
    assert findings[none] is None


@COMPILED
@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_found(findings, fault):
    assert findings[fault] is not None


@pytest.mark.parametrize("none", triton_faults.NONE, ids=("short", "long"))
def test_nothing_is_found_in_triton_without_a_fault(triton_findings, none):
    assert triton_findings[none] is None


@pytest.mark.parametrize("fault", triton_faults.FAULTS, ids=lambda fault: fault.name)
def test_a_fault_planted_in_triton_is_found(triton_findings, fault):
    assert triton_findings[fault] is not None
