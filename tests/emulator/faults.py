"""Faults to plant in the CUDA sources, each of which check.py must find."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from . import build

TESTS = Path(__file__).parent.parent
NAMES = {"float": "float32", "__nv_bfloat16": "bfloat16", "__half": "float16"}


class Fault(NamedTuple):
    """A line of a source and what it becomes."""

    name: str
    file: str
    line: str
    becomes: str
    dtype: str = "float"


FAULTS = (
    Fault("no barrier before the warps' parts are read", "softmax.cuh",
          "      __syncthreads();\n      *this = Part{};", "      *this = Part{};"),
    Fault("a barrier for some threads", "row.cuh",
          "  __syncthreads();\n  value = of_warp[0];",
          "  if (threadIdx.x < WARP) __syncthreads();\n  value = of_warp[0];"),
    Fault("no barrier before an in-place store", "softmax.cuh",
          "    else __syncthreads();", "    else;"),
    Fault("a warp's reduction begins too late", "row.cuh",
          "int apart = LANES / 2;", "int apart = LANES / 4;"),
    Fault("lanes of another row take part", "row.cuh",
          "int apart = LANES / 2;", "int apart = WARP / 2;"),
    Fault("logits are read from shared memory too early", "tiles.cuh",
          "    piece.load(a.logits);\n    __syncthreads();", "    piece.load(a.logits);"),
    Fault("gradients leave shared memory too early", "tiles.cuh",
          "    __syncthreads();\n    piece.store(a.grad);", "    piece.store(a.grad);"),
    Fault("a vector of two rows is taken for one of one", "tiles.cuh",
          "(next ? pitch - C + 1 : 1)", "1"),
    Fault("the last element of a block's rows is left out", "tiles.cuh",
          "if (edge < n) element(", "if (edge < n - 1) element("),
    Fault("the wrong vector of a long row is kept", "softmax.cuh",
          "kept[first + thread + k * THREADS] = z[k]", "kept[first + thread + k * THREADS] = z[0]"),
    Fault("the other warps' maxima are left out", "softmax.cuh",
          "M = larger(M, of_warp[w][0]);", ";"),
    Fault("sums are not moved to the larger maximum", "softmax.cuh",
          "    R *= exp_exact(step);", "    (void)step;"),
    Fault("the target is not left out", "row.cuh",
          "z[k].blank(y_lane);", ";"),
    Fault("the target's neighbour is left out too", "row.cuh",
          "lane == j ? (*this)[j + 1] : -INF<T>", "-INF<T>"),
    Fault("the head begins one column late", "row.cuh",
          "edge = thread < head ? thread :", "edge = thread < head ? thread + 1 :"),
    Fault("the tail ends one column early", "row.cuh",
          "if (edge >= C) edge = -1;", "if (edge >= C - 1) edge = -1;"),
    Fault("the tail is read beyond the row", "row.cuh",
          "if (edge >= C) edge = -1;", "if (edge > C) edge = -1;"),
    Fault("the last vector is not stored", "softmax.cuh",
          "if (k * THREADS < left) store<S>(p", "if (k * THREADS < left - 1) store<S>(p"),
    Fault("a vector beyond the row is loaded", "row.cuh",
          "if ((ITEMS - 1) * THREADS < left) {", "if ((ITEMS - 2) * THREADS < left) {"),
    Fault("vectors are counted from the row's first column", "row.cuh",
          "whole = (C - head) / N;", "whole = C / N;"),
    Fault("an ignored row is read", "row.cuh",
          "keep, valid, keep && valid};", "keep, valid, valid};"),
    Fault("an ignored row has a weight", "row.cuh",
          "!row.keep ? 0 : row.valid ? r", "row.valid ? r"),
    Fault("the weight of class 0 for every row", "row.cuh",
          "a.weight[row.y] : T(1)", "a.weight[0] : T(1)"),
    Fault("one part of the denominator too few", "prologue.cuh",
          "i < end; i += BLOCK", "i < end - 1; i += BLOCK"),
    Fault("losses are summed without the last", "prologue.cuh",
          "j < count; j += BLOCK", "j < count - 1; j += BLOCK"),
    Fault("the wrong digit in a polynomial", "../row_math.h",
          "m * 1.184951782f", "m * 1.194951782f"),
    Fault("a short logarithm of 2", "math.cuh",
          "LN2 = 0.693147181f", "LN2 = 0.69310f"),
    Fault("what the base lacks is forgotten", "softmax.cuh",
          "factor(ex2(-fmaf(M, LOG2E, -c)))", "factor(1)"),
    Fault("smoothing counts the target", "softmax.cuh",
          "if (GENERAL && z != -INF<T>) D +=", "if (GENERAL) D +="),
    Fault("the target's gradient is stored by no thread", "softmax.cuh",
          "if (at.has_y) g[row.y]", "if (at.edge >= 0 && at.has_y) g[row.y]"),
    Fault("the wrong half of a pair", "row.cuh",
          "j % 2 ? w[j / 2] & 0xffff0000u", "j % 2 == 0 ? w[j / 2] & 0xffff0000u",
          "__nv_bfloat16"),
    Fault("a span is split unevenly", "softmax.cuh",
          "const int end = ::min(first + a.span, at.whole);\n  Part",
          "const int end = ::min(first + a.span - 1, at.whole);\n  Part"),
    Fault("a call's own limit of shared memory", "dispatch.cu",
          "device.dynamic_limit());\n  if (error)", "bytes);\n  if (error)"),
    Fault("sigma's tail is dropped", "../row_math.h",
          "return z < T{} ? e * s : s;", "return z < T{} ? one - s : s;"),
)  # fmt: skip


NONE = tuple(Fault("none", "row.cuh", "", "", dtype) for dtype in ("float", "__nv_bfloat16"))


def plant(fault: Fault, folder: Path) -> str | None:
    """What check.py says of it; None: it found nothing."""
    csrc = folder / "csrc"
    shutil.copytree(build.ROOT / "csrc", csrc)
    path = csrc / "cuda" / fault.file
    text = path.read_text()
    assert text.count(fault.line) > 0, f"{fault.name}: {fault.file} has no such line"
    path.write_text(text.replace(fault.line, fault.becomes))
    library = build.faulty(csrc, fault.dtype)
    command = [sys.executable, "-m", "emulator.check", str(library), "--dtypes"]
    done = subprocess.run([*command, NAMES[fault.dtype]], capture_output=True, text=True, cwd=TESTS)
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}"])[-1]
