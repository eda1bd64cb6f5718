"""Faults to plant in the kernels for CPUs, each of which native/check.py must find."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from .build import NAME, ROOT, compile_one, link, package, sources_of

TESTS = Path(__file__).parent.parent


class Fault(NamedTuple):
    """A text that a source has once, and what it becomes."""

    name: str
    file: str
    text: str
    becomes: str
    dtype: str = "float32"


FAULTS = (
    # Bounds
    Fault("the rest of a row is loaded as a whole vector", "cpu/row_kernels.h",
          "return n < Lanes<S>::N ? load_some(p, n) : load(p);", "return (void)n, load(p);"),
    Fault("a part of a vector is loaded with what is beyond it", "cpu/vec.h",
          "std::memcpy(part, p, n * sizeof(S));", "std::memcpy(part, p, sizeof part);"),
    Fault("a part of a vector is stored with what is beyond it", "cpu/vec.h",
          "std::memcpy(p, part, n * sizeof(S));", "std::memcpy(p, part, sizeof part);"),
    Fault("the search for the maximum reads past the row", "cpu/row_kernels.h",
          "for (; j + SUMS * N <= C; j += SUMS * N) {",
          "for (; j + (SUMS - 1) * N <= C; j += SUMS * N) {"),
    Fault("the maximum is not sought in the rest of a row", "cpu/row_kernels.h",
          "for (; j < C; j += N) top[0]", "for (; j + N <= C; j += N) top[0]"),
    Fault("lanes past the last row read further rows", "cpu/tile_kernels.h",
          "i + std::min(l, n - 1)", "i + l"),
    Fault("the last block of classes does not overlap", "cpu/blocks.h",
          "const int64_t c = std::min(next, C - SIDE);\n    Vec v[SIDE];\n"
          "    for (int64_t k = 0; k < SIDE; ++k) v[k] = z[c + k];",
          "const int64_t c = next;\n    Vec v[SIDE];\n"
          "    for (int64_t k = 0; k < SIDE; ++k) v[k] = z[c + k];"),
    Fault("targets of rows that are not there are read", "cpu/tile_kernels.h",
          "if (n == N && !a.has_background)", "if (!a.has_background)"),
    Fault("losses of rows that are not there are stored", "cpu/tile_kernels.h",
          "else store_n(p, v, n);", "else store(p, v);"),
    Fault("a chunk of rows goes beyond the last", "cpu/ops.cpp",
          "std::min(rows, (i + 1) * chunk));", "(i + 1) * chunk);"),
    Fault("prefetching reads", "cpu/memory.h",
          "{ __builtin_prefetch(p); }", "{ (void)*static_cast<const volatile char*>(p); }"),
    # Vectors of rows
    Fault("a vector of rows of two samples is taken for one of one", "cpu/tile_kernels.h",
          "return n == N && (a.K == 1 || i / a.K == (i + N - 1) / a.K);", "return n == N;"),
    Fault("a group of tiles goes on into the next sample", "cpu/tile_kernels.h",
          "a.K == 1 ? end - i : std::min(end - i, a.K - i % a.K);", "end - i;"),
    Fault("a group has a tile too many", "cpu/tile_kernels.h",
          "std::clamp(left / N,", "std::clamp(left / N + 1,"),
    Fault("classes of a group's tiles are mixed up", "cpu/tile_kernels.h",
          "store(g + t * N, z[t * a.C + c]);", "store(g + t * N, z[c * tiles + t]);"),
    # Targets
    Fault("the target's vector counts twice", "cpu/row_kernels.h",
          "{at_y + N, whole}", "{at_y, whole}"),
    Fault("the target is sought from the row's first column", "cpu/row_kernels.h",
          "outside(z, n, y - j);", "outside(z, n, y);"),
    Fault("a background row has the last class", "cpu/common.h",
          "y == a.background ? a.C : y", "y == a.background ? a.C - 1 : y"),
    Fault("a background row stores a target's gradient", "cpu/row_kernels.h",
          "if (MODE != Mode::LOSS && y < C) store_one", "if (MODE != Mode::LOSS) store_one"),
    Fault("a background row has a target's loss", "cpu/tile_kernels.h",
          "if (a.has_background) at_y.L = tile.is_y(C) ? V{} : at_y.L;", ""),
    Fault("a background row has a margin", "cpu/row_kernels.h",
          "if (y < C) z[y] -= ", "z[y] -= "),
    Fault("negative targets are taken for classes", "cpu/ops.cpp",
          "uint64_t(y) >= uint64_t(a.C)", "y >= a.C"),
    Fault("the target before stays in a row of class weights", "cpu/soft_rows.h",
          "copy[last] = 0, copy[y] = 1", "copy[y] = 1"),
    Fault("a soft target at the largest logit is not checked", "cpu/soft_rows.h",
          "  check.see(V{} + t_y);\n", ""),
    Fault("the wrong place of a bad target", "cpu/soft_rows.h",
          "(i / a.K * a.C + c) * a.K + i % a.K", "i * a.C + c"),
    Fault("unknown labels in place are seen too late", "cpu/soft_rows.h",
          " || (a.partial && overwrites)", " || (false && overwrites)"),
    Fault("lanes past a row count as labels of 0", "cpu/soft_rows.h",
          "padded(load_up_to(x + j, n), n, -INF<T>);", "load_up_to(x + j, n);"),
    # Ignored rows, row weights
    Fault("an ignored row's gradient is not written", "cpu/row_kernels.h",
          "      if (a.grad) zero_row(g, a.C);\n", ""),
    Fault("an ignored row of a tile has a gradient", "cpu/tile_kernels.h",
          "row.k * z[c] - row.uniform;\n      z[c] = tile.ignored ? V{} : g;",
          "row.k * z[c] - row.uniform;\n      z[c] = g;"),
    Fault("the first row's incoming gradient for every row", "cpu/common.h",
          "grad_loss[per_row ? i : 0]", "grad_loss[per_row ? 0 : 0]"),
    Fault("the mean weight of labels is not kept for the backward", "cpu/soft_rows.h",
          "static_cast<T*>(a.scale)[row.i] = row.r;", ";"),
    # Sums
    Fault("sums of the other classes are never flushed", "cpu/row_kernels.h",
          "if (j < stop) body(j, load(x + j), N, none);\n      flush();",
          "if (j < stop) body(j, load(x + j), N, none);"),
    Fault("the odd vector of a chunk is left out", "cpu/row_kernels.h",
          "if (j < stop) body(j, load(x + j), N, none);", ""),
    Fault("the odd class of a tile is left out", "cpu/tile_kernels.h",
          "if (c < stop) body(c);", ""),
    Fault("sums over classes are flushed at the end alone", "cpu/tile_kernels.h",
          "if (c < stop) body(c);\n    flush();\n  }",
          "if (c < stop) body(c);\n  }\n  flush();"),
    Fault("the last row of a block is in no sum", "cpu/ops.cpp",
          "std::min(n, (b + 1) * BLOCK));", "std::min(n, (b + 1) * BLOCK - 1));"),
    Fault("statistics of a block go beyond the rows", "cpu/stats.cpp",
          "int64_t end = std::min(rows, begin + BLOCK);", "int64_t end = begin + BLOCK;"),
    # Numbers
    Fault("the wrong digit in exp", "cpu/vec.h", "4.999914276e-1f", "4.998914276e-1f"),
    Fault("the wrong digit in log", "cpu/vec.h", "0.3333333f", "0.3323333f"),
    Fault("bfloat16 is cut off, not rounded", "cpu/vec.h",
          "return (u + 0x7fff + ((u >> 16) & 1)) >> 16;", "return u >> 16;",
          "bfloat16"),
)  # fmt: skip


NONE = tuple(Fault("none", "cpu/vec.h", "", "", dtype) for dtype in ("float32", "bfloat16"))
FLAGS = ["-O1", "-w"]
TYPES = {"bfloat16": "BFloat16", "float16": "Float16", "float32": "float", "float64": "double"}


def plant(fault: Fault, folder: Path, instruction_set: str, good: dict[str, Path]) -> Path:
    """A folder with the package, whose kernels have the fault; good: the objects without one.

    Row kernels are compiled for one dtype, which takes a third of the time.
    """
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    path, kernels = csrc / fault.file, csrc / "cpu" / "kernels.h"
    text = path.read_text()
    if fault.text:
        assert text.count(fault.text) == 1, f"{fault.name}: {fault.file} must have the text once"
        path.write_text(text.replace(fault.text, fault.becomes))
    name = path.stem if path.suffix == ".cpp" else instruction_set
    for dtype, type_name in TYPES.items():
        call = f"return find_mode<{type_name}>(mode, a);"
        assert kernels.read_text().count(call) == 1, f"kernels.h must have {call!r} once"
        if dtype != fault.dtype:
            kernels.write_text(kernels.read_text().replace(call, "return nullptr;"))
    source, flags = sources_of([instruction_set], folder)[name]
    fresh = compile_one(csrc, source, folder / f"{name}.o", [*flags, *FLAGS])
    link(package(folder) / NAME, list({**good, name: fresh}.values()), [])
    return folder


def finding(folder: Path, *arguments: str, **environment: str) -> str | None:
    """What native/check.py says of the package in a folder; None: it found nothing."""
    command = [sys.executable, "-m", "native.check", *arguments]
    environment = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=TESTS, env=os.environ | environment
    )
    if done.returncode == 0:
        return None
    if done.returncode > 0:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    where = (done.stdout.strip().splitlines() or ["the first case"])[-1]
    return f"{signal.Signals(-done.returncode).name} within {where}"
