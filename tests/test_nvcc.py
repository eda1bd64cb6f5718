"""The CUDA kernels as nvcc compiles them, read and loaded without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")  # for its cuobjdump

from support.backends import DEVICE, INTERPRETED

import setup
from bench.machine_code import nvcc, sass

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        setup.find_nvcc() is None or INTERPRETED or DEVICE == "cuda" or not sass.TOOLS.exists(),
        reason="needs nvcc, and no GPU",
    ),
]


@pytest.fixture(scope="module")
def library():
    """What setup.py builds for sm_90."""
    return nvcc.library("9.0")


@pytest.fixture(scope="module")
def kernels(library):
    return sass.read_library(library)


def named(kernels, *words):
    """The one kernel whose name and template arguments have all of the words."""
    (found,) = [code for name, code in kernels.items() if all(word in name for word in words)]
    return found


LOADING = """
import ctypes, pathlib, sys, torch
from cbloss_fused.backends import REGISTRY, load_cuda, too_old_driver
library = pathlib.Path(sys.argv[1])
load_cuda(library, "cuda")
REGISTRY["cuda"].register_default("cuda")
for name in ("loss.cuda", "gradient.cuda", "_scale", "loss", "gradient"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cbloss_fused::{name}", "CUDA"), name
print(REGISTRY["cuda"].about(), "|", too_old_driver(ctypes.CDLL(str(library))))
"""


def loaded(library, folder):
    """What LOADING prints beside a stand-in for libtorch_cuda, and the libraries of the folder."""
    shutil.copy(library.parent / "libtorch_cuda.so", folder)  # not libtorch_cpu's, which is real
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADING, str(library)],
        capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"LD_LIBRARY_PATH": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_library_registers_its_operators(library, tmp_path):
    """Without a driver it says that it cannot run."""
    about = loaded(library, tmp_path)
    assert re.match(r".*built for sm_90 \| built with CUDA \d+, .*driver", about)


DRIVER = """
#include <stdlib.h>
int cuInit(unsigned flags) { abort(); }
int cuDriverGetVersion(int* version) { *version = 99000; return 0; }
"""


def test_the_library_leaves_the_driver_alone(library, tmp_path):
    """After cuInit a forked process cannot use the GPU, and CUDA_VISIBLE_DEVICES comes too late."""
    command = ["gcc", "-shared", "-x", "c", "-", "-o", str(tmp_path / "libcuda.so.1")]
    subprocess.run(command, input=DRIVER, text=True, check=True)
    assert loaded(library, tmp_path).endswith("built for sm_90 | None\n")


HALF_AND_FLOAT = ("__nv_bfloat16", "__half", "float")


def test_no_kernel_spills(kernels):
    """float64 may: it is there to be right."""
    for name, code in kernels.items():
        if "double" not in name:
            assert (code.stack, code.local) == (0, 0), name
    assert len(kernels) > 100


@pytest.mark.parametrize("dtype", HALF_AND_FLOAT)
def test_one_access_of_16_bytes_a_vector(kernels, dtype):
    """In and out, once; the edges and the target's column beside."""
    size = 4 if dtype == "float" else 2
    for name, code in kernels.items():
        found = re.search(r"(softmax|sigmoid)_rows<(\w+), .*?(\d+), (\d+)(, true)?>", name)
        if found is None or found[2] != dtype:
            continue
        items = int(found[4])
        assert (code.interior.loads, code.interior.stores) == (items, items), name
        if "Gamma)5" not in name and f"<{dtype}, true" not in name:  # these read a bias a column
            assert code.interior.loads_small <= 6, name  # target, weight, z_y, its edge, ...
        assert code.interior.stores_small <= 3, name
        assert items * 16 / size in (8, 16, 32, 64)


# bfloat16, C = 8142: instructions and special functions per element. Sigmoid's kernels hold half a
# row at a time: the set-up, counted whole here, is that of twice as many elements.
BOUNDS = {
    "softmax_rows<__nv_bfloat16, false, 128, 8>": (12.5, 1.3),
    "sigmoid_rows<__nv_bfloat16, (Gamma)0, false, 128, 4, true>": (19, 2.2),
    "sigmoid_rows<__nv_bfloat16, (Gamma)1, false, 128, 4, true>": (30, 2.1),
    "sigmoid_rows<__nv_bfloat16, (Gamma)2, false, 128, 4, true>": (31, 2.1),
    "sigmoid_rows<__nv_bfloat16, (Gamma)3, false, 128, 4, true>": (32, 2.1),
    "sigmoid_rows<__nv_bfloat16, (Gamma)4, false, 128, 4, true>": (36, 3.1),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_instructions_an_element(kernels, name):
    counts, (instructions, special) = named(kernels, name).interior, BOUNDS[name]
    threads = re.search(r"(\d+)(, true)?>$", name)
    assert threads
    elements = 8 * int(threads[1])
    assert counts.all <= elements * instructions
    assert counts.special <= elements * special


def test_long_rows_are_read_twice_and_written_once(kernels):
    code = named(kernels, "softmax_long<__nv_bfloat16, false, 512, false>")
    assert (code.interior.loads, code.interior.stores) == (8, 4)
    code = named(
        kernels, "softmax_long<__nv_bfloat16, false, 384, true>"
    )  # then from shared memory
    assert (code.interior.loads, code.interior.stores) == (4, 4)
    code = named(kernels, "softmax_apply<__nv_bfloat16, false, true, 256>")
    assert (code.interior.loads, code.interior.stores) == (4, 4)
