"""What the Triton kernels compile to, read without a GPU: accesses, passes, instructions."""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import version
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from support.backends import INTERPRETED
from support.marks import name_of

from bench.machine_code import sass, tricks
from bench.machine_code.codegen import (
    CLASSES,
    DTYPES,
    FAMILIES,
    TARGETS,
    Launch,
    compiled,
    launches,
    line,
    row_kernel,
)

pytestmark = [
    pytest.mark.sampled,
    pytest.mark.skipif(
        INTERPRETED or not (sass.TOOLS / "cuobjdump").exists(), reason="needs Triton's compiler"
    ),
]
FAMILY = pytest.mark.parametrize("activation, gamma", FAMILIES, ids=lambda v: f"{v}")
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


@cache
def code(launch: Launch, target: str) -> sass.Code:
    return sass.read(compiled(launch, TARGETS[target]))


def assert_sound(launch: Launch, target: str) -> sass.Code:
    """No spill, no stack, no 64-bit division."""
    read = code(launch, target)
    assert (read.stack, read.local) == (0, 0), launch.name
    assert not re.search(r"\b(div|rem)\.[su]64", compiled(launch, TARGETS[target]).asm["ptx"])
    return read


def vectors(launch: Launch) -> float:
    """16-byte accesses of a thread for one tile."""
    return launch.elements() / launch.constant("VEC")


def assert_accesses(launch: Launch, target: str) -> None:
    """Every vector of the row once or, where softmax loops, read twice; the edges beside."""
    read = assert_sound(launch, target)
    n = vectors(launch)
    loops = [(loop.loads, loop.stores) for loop in read.loops if loop.loads or loop.stores]
    straight = read.straight.loads, read.straight.stores
    if launch.name == "softmax_rows" or (
        launch.name == "sigmoid_rows" and launch.constant("SINGLE")
    ):
        assert (straight, loops) == ((n, n), [])
    elif launch.name == "sigmoid_rows":
        assert (straight, loops) == ((0, 0), [(n, n)])
    elif launch.name == "softmax_long":
        assert (straight, loops) == ((0, 0), [(n, 0), (n, n)])
    else:
        pytest.fail(f"no rule for {launch.name}")
    assert all(loop.loads_small == loop.stores_small == 0 for loop in read.loops if loop.loads)
    assert read.straight.stores_small <= 2  # the edges' tile, the row's loss


@pytest.mark.parametrize("C", CLASSES, ids="C{}".format)
@DTYPE
@FAMILY
def test_accesses(activation, gamma, dtype, C):
    (launch,) = row_kernel(launches((4096, C), dtype, activation, gamma))
    assert_accesses(launch, "sm_90")


@pytest.mark.parametrize("target", ("sm_80", "sm_100"))
@pytest.mark.parametrize("C", (8142, 32768), ids="C{}".format)
@pytest.mark.parametrize("activation, gamma", FAMILIES[:3], ids=lambda v: f"{v}")
def test_accesses_on_other_gpus(activation, gamma, C, target):
    (launch,) = row_kernel(launches((4096, C), torch.bfloat16, activation, gamma))
    assert_accesses(launch, target)


@pytest.mark.parametrize("C", (8142, 32768), ids="C{}".format)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name_of)
@pytest.mark.parametrize("activation, gamma", FAMILIES[:3], ids=lambda v: f"{v}")
def test_accesses_on_amd(activation, gamma, dtype, C):
    (launch,) = row_kernel(launches((4096, C), dtype, activation, gamma))
    kernel = compiled(launch, TARGETS["gfx942"])
    text = kernel.asm["amdgcn"]
    n = max(1, launch.elements() / launch.constant("VEC"))
    reads = 2 if launch.name == "softmax_long" else 1
    assert len(re.findall(r"^\s+(?:global|buffer)_load_dwordx4 ", text, re.MULTILINE)) == reads * n
    assert len(re.findall(r"^\s+(?:global|buffer)_store_dwordx4 ", text, re.MULTILINE)) == n
    assert re.search(r"\.private_segment_fixed_size: 0\b", text)
    assert "scratch_" not in text


BOUNDS = {  # instructions and special functions per element: bfloat16, C = 8142, sm_90
    ("softmax", 0.0): (17.5, 1.15),
    ("sigmoid", 0.0): (22, 2.15),
    ("sigmoid", 0.5): (28.6, 2.15),
    ("sigmoid", 1.0): (28.6, 2.15),
    ("sigmoid", 2.0): (30, 2.15),
    ("sigmoid", 1.5): (38, 3.15),
}


@FAMILY
def test_instructions_an_element(activation, gamma):
    (launch,) = row_kernel(launches((4096, 8142), torch.bfloat16, activation, gamma))
    counted = line(launch, 8142, torch.bfloat16, "sm_90", "")
    most, special = BOUNDS[activation, gamma]
    assert counted.instructions <= most
    assert counted.special <= special


@pytest.mark.parametrize("C", (8136, 8142, 8144, 8191, 8192), ids="C{}".format)
@FAMILY
def test_every_class_count_runs_the_same_code(activation, gamma, C):
    found, like = (launches((4096, c), torch.bfloat16, activation, gamma) for c in (C, 8192))
    assert found == like


def test_bfloat16_is_rounded_to_nearest():
    """The interpreter cuts off: tests/support/interpreter.py makes it round as this does."""
    (launch,) = row_kernel(launches((4096, 8142), torch.bfloat16, "softmax", 0.0))
    ptx = compiled(launch, TARGETS["sm_90"]).asm["ptx"]
    assert ptx.count("cvt.rn.bf16x2.f32") >= launch.elements() / 2


TILES = {
    "few-classes": (1_000_000, 10),
    "some-classes": (4096, 100),
    "image": (8, 19, 512 * 512),
    "many-classes-image": (8, 1000, 49),
}


@pytest.mark.parametrize("shape", TILES.values(), ids=TILES.keys())
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name_of)
@pytest.mark.parametrize("activation, gamma", FAMILIES[:3], ids=lambda v: f"{v}")
def test_tiles(activation, gamma, dtype, shape):
    """Whole rows per thread: a warp's shuffles would cost more than the formula; no spill."""
    for launch in row_kernel(launches(shape, dtype, activation, gamma)):
        assert launch.name.endswith("_tiles")
        assert_sound(launch, "sm_90")
        ptx = compiled(launch, TARGETS["sm_90"]).asm["ptx"]
        # The denominator's and the program's loss: none for the reductions over a row.
        assert ptx.count("shfl.sync") <= 20
        # tiles.load_tile's hint lays threads out; it must not make an access wide.
        assert not re.search(r"ld\.global\S*\.v[24]", ptx)


SPLIT = {"softmax": ["softmax_parts", "softmax_join"], "sigmoid": ["sigmoid_rows"]}


@pytest.mark.parametrize("shape", ((8, 131072), (64, 2**20)), ids=str)
@pytest.mark.parametrize("activation", SPLIT)
def test_few_rows_fill_the_gpu(activation, shape):
    found = row_kernel(launches(shape, torch.bfloat16, activation, 0.0))
    assert [launch.name for launch in found] == SPLIT[activation]
    for launch in found:
        programs = launch.grid[0] * launch.grid[1]
        assert 132 <= programs <= 8 * 132
        read = assert_sound(launch, "sm_90")
        assert all(loop.loads_small == 0 for loop in read.loops if loop.loads)


@pytest.mark.parametrize("C", (1000, 8142, 131072), ids="C{}".format)
@DTYPE
def test_the_recomputing_backward_is_one_read_and_one_write(dtype, C):
    (launch,) = launches((4096, C), dtype, "softmax", 0.5, recompute=True)
    assert launch.name == "softmax_gradient"
    read = assert_sound(launch, "sm_90")
    n = vectors(launch)
    assert [(x.loads, x.stores) for x in read.loops if x.loads] == [(n, n)]


@pytest.mark.long
@pytest.mark.parametrize("smoothing", (0.0, 0.1), ids="s{}".format)
@FAMILY
def test_label_smoothing_and_loss_alone_do_not_spill(activation, gamma, smoothing):
    for grad in (False, True):
        for launch in launches(
            (4096, 8142), torch.float32, activation, gamma, label_smoothing=smoothing, grad=grad
        ):
            read = assert_sound(launch, "sm_90")
            assert grad or read.straight.stores == 0


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "adjusted": {"bias": True, "logit_scale": 2.0},
    "asymmetric": {"gamma_neg": 4.0, "clip": 0.05},
    "alpha": {"alpha": 0.25},
    "background": {"alpha": 0.25, "background_index": -1},
    "pos-weight": {"positive": True},
    "pos-weight-smoothing": {"positive": True, "label_smoothing": 0.1},
    "soft-pos-weight": {"soft": True, "positive": True},
    "soft": {"soft": True},
    "soft-asymmetric": {"soft": True, "gamma_neg": 4.0, "clip": 0.05, "alpha": 0.25},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("activation", ("softmax", "sigmoid"))
def test_options_compile_without_spills(activation, name):
    """What the interpreter runs, the compiler may refuse."""
    if activation == "softmax" and name not in ("plain", "adjusted", "soft"):
        pytest.skip("an option of the sigmoid family")
    if (activation, name) == ("softmax", "soft") and version("triton").startswith("3.9."):
        pytest.skip("Triton 3.9 spills 8 bytes there")
    for launch in row_kernel(
        launches((4096, 8142), torch.bfloat16, activation, 0.0, **OPTIONS[name])
    ):
        assert_sound(launch, "sm_90")


@pytest.mark.parametrize("shape", ((4096, 10), (4096, 8142), (8, 131072), (8, 19, 4096)), ids=str)
@pytest.mark.parametrize("activation", ("softmax", "sigmoid"))
def test_soft_targets_compile(activation, shape):
    """In float32, where Triton's passes take other ways than for half types."""
    recomputed: dict[str, Any] = {"label_smoothing": 0.1, "bias": True, "recompute": True}
    for options in ({}, recomputed):
        found = launches(shape, torch.float32, activation, 0.0, soft=True, **options)
        for launch in row_kernel(found):
            assert compiled(launch, TARGETS["sm_90"]).asm["cubin"]


@pytest.mark.parametrize("shape", ((32, 10), (4096, 8142), (8, 131072), (8, 19, 64, 64)), ids=str)
@pytest.mark.parametrize("activation", ("softmax", "sigmoid"))
def test_at_most_three_launches_and_one_backward(activation, shape):
    shape = (*shape[:2], *([shape[2] * shape[3]] if len(shape) > 2 else []))
    assert len(launches(shape, torch.float32, activation, 0.5)) <= 3
    assert len(launches(shape, torch.float32, activation, 0.5, recompute=True)) == 1


@pytest.mark.long
@pytest.mark.parametrize(
    "shape", ((32, 10), (64, 8142), (4096, 40_000), (3, 70_000), (4, 19, 100)), ids=str
)
@pytest.mark.parametrize("activation, gamma", FAMILIES[:3], ids=lambda v: f"{v}")
def test_float64_compiles(activation, gamma, shape):
    """What the interpreter runs, the compiler may refuse."""
    for recompute in (False, True):
        for launch in launches(
            shape, torch.float64, activation, gamma, label_smoothing=0.1, recompute=recompute
        ):
            assert code(launch, "sm_90").straight.all


@pytest.mark.parametrize("side", tricks.FOLDERS)
def test_what_the_tricks_undo_is_there(side):
    """bench.machine_code.tricks takes minutes: nobody runs it after every change of a source."""
    for trick in {"CUDA": tricks.CUDA, "Triton": tricks.TRITON}[side]:
        text = (tricks.ROOT / tricks.FOLDERS[side] / trick.file).read_text()
        assert trick.line in text, trick.name
