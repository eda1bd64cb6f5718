"""What each trick of the GPU kernels saves: `python -m bench.machine_code.tricks`. Needs no GPU.

Each trick is undone in a copy of the sources, which is then compiled for sm_90 and counted, for
bfloat16 and 8142 classes unless the trick says otherwise. docs/kernels.md shows the table.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import setup

from . import sass

ROOT = Path(__file__).resolve().parents[2]
SOFTMAX = "softmax_rows<__nv_bfloat16, false, 128, 8>"
SIGMOID = "sigmoid_rows<__nv_bfloat16, (Gamma){}, false, 128, 4, true>"
WARP_PER_ROW = "softmax_rows<__nv_bfloat16, false, 32, 4>"
ZERO, HALF, ANY = (SIGMOID.format(kind) for kind in (0, 1, 4))


class Trick(NamedTuple):
    """A trick, how to undo it in a source file, and the kernel whose instructions it saves."""

    name: str
    file: str
    line: str  # text of the file
    without: str  # what replaces the text to undo the trick
    kernel: str
    without_kernel: str = ""  # the kernel without the trick, if it is another one


CUDA = (
    Trick("-inf is written to registers only where vectors are missing", "row.cuh",
          "if ((ITEMS - 1) * THREADS < left) {", "if (false) {", SOFTMAX),
    Trick("the target is blanked once, not left out of every sum", "softmax.cuh",
          "for (int j = 0; j < N; ++j) sum += e[k][j];",
          "for (int j = 0; j < N; ++j) sum += at.is_y(k, j) ? 0 : e[k][j];", SOFTMAX),
    Trick("the maximum of packed pairs", "row.cuh",
          "if constexpr (IS_HALF<S>) {\n    using", "if constexpr (false) {\n    using", SOFTMAX),
    Trick("z - M and the factor log2 e in one multiply-add", "softmax.cuh",
          "return ex2(fmaf(z, LOG2E, -c));", "return ex2((z - c * LN2) * LOG2E);", SOFTMAX),
    Trick("one special function per division", "math.cuh",
          "CB_FN float divide(float a, float b) { return a * rcp(b); }",
          "CB_FN float divide(float a, float b) { return a / b; }", SOFTMAX),
    Trick("up to 2048 classes one warp per row (here 1000): no barrier", "dispatch.cu",
          "if (a.C <= WARP * MEDIUM) return held<GENERAL, WARP, MEDIUM>(a, device);",
          "if (a.C <= WARP * MEDIUM) return held<GENERAL, 128, SMALL / 2>(a, device);",
          WARP_PER_ROW, "softmax_rows<__nv_bfloat16, false, 128, 1>"),
    Trick("gamma 0: one logarithm of a product", "../row_math.h",
          "      if constexpr (!SMOOTH) return softplus.add(z);\n",
          "      if constexpr (!SMOOTH) { const auto e = sigmoid_element<G, SHORT>(z, f.gamma);"
          " softplus.linear += e.L; return e.g; }\n", ZERO),
    Trick("gamma 1/2: root and reciprocal from one rsqrt, no general power", "../row_math.h",
          "", "", HALF, ANY),
    Trick("a shorter polynomial for half types", "../row_math.h",
          "log1m_over<SHORT>(m)", "log1m_over<false>(m)", HALF),
    Trick("minimum and maximum keep NaN in one instruction", "math.cuh",
          'asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));',
          "c = a > b || a != a ? a : b;", HALF),
)  # fmt: skip
TRITON = (
    Trick("one special function per division", "numerics.py",
          "        root = tl.rsqrt(x)\n        return root * root", "        return 1.0 / x",
          "sigmoid_rows g=0"),
    Trick("gamma 0: one logarithm of a product", "sigmoid.py",
          "    if G == ZERO:  # one logarithm", "    if False:  # one logarithm",
          "sigmoid_rows g=0"),
    Trick("gamma 1/2: code of its own", "call.py",
          "0.5: sigmoid.HALF", "0.5: sigmoid.ANY", "sigmoid_rows g=0.5"),
    Trick("a shorter polynomial for half types", "sigmoid.py",
          "primitive_bitwidth == 16", "primitive_bitwidth == 0", "sigmoid_rows g=0.5"),
    Trick("e^-x with the sign in the constant", "numerics.py",
          "return tl.exp2(x * -LOG2E)", "return tl.exp2((-x) * LOG2E)", "sigmoid_rows g=0.5"),
    Trick("an aligned gradient: 16-byte stores", "rows.py",
          "    if ALIGNED:\n        start", "    if False:\n        start", "softmax_rows"),
)  # fmt: skip
FOLDERS = {"CUDA": "csrc/cuda", "Triton": "cbloss_fused/triton"}
Counts = Callable[[Path, str], tuple[float, float]]


def cuda(sources: Path, kernel: str) -> tuple[float, float]:
    """Instructions and special functions per element of a kernel of dispatch.cu in `sources`."""
    nvcc = setup.find_nvcc()
    assert nvcc is not None
    cubin = sources / "rows.cubin"
    command = [nvcc, *setup.CUDA_FLAGS, "-arch=sm_90", "-DCBLOSS_DTYPE=__nv_bfloat16", "-cubin"]
    subprocess.run([*command, str(sources / "csrc/cuda/dispatch.cu"), "-o", str(cubin)], check=True)
    found = [code for name, code in sass.read_library(cubin).items() if kernel in name]
    items = int(kernel.replace(", true>", ">").rsplit(", ", 1)[1].rstrip(">"))
    return found[0].interior.all / items / 8, found[0].interior.special / items / 8


def triton(sources: Path, kernel: str) -> tuple[float, float]:
    """Instructions and special functions per element of a Triton kernel in `sources`."""
    command = [sys.executable, "-m", "bench.machine_code.codegen", "--classes", "8142", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=sources,
        env=os.environ | {"PYTHONPATH": str(sources)},
    )  # fmt: skip
    lines = [x for x in json.loads(done.stdout) if x["kernel"] == kernel and x["dtype"] == "bf16"]
    return lines[0]["instructions"], lines[0]["special"]


def counted(trick: Trick | None, folder: str, count: Counts, kernel: str) -> tuple[float, float]:
    """The counts of a kernel in a copy of the repository, without the trick if one is given."""
    with tempfile.TemporaryDirectory() as sources:
        for part in ("csrc", "cbloss_fused", "bench"):
            shutil.copytree(ROOT / part, Path(sources) / part)
        shutil.copy(ROOT / "setup.py", sources)
        if trick is not None:
            path = Path(sources) / folder / trick.file
            text = path.read_text()
            assert trick.line in text, f"{trick.name}: {trick.file} has no such line"
            path.write_text(text.replace(trick.line, trick.without))
        return count(Path(sources), kernel)


def main() -> None:
    print("| | trick | kernel | without | with |\n| --- | --- | --- | --- | --- |")
    compare("CUDA", CUDA, cuda)
    compare("Triton", TRITON, triton)


def compare(side: str, tricks: tuple[Trick, ...], count: Counts) -> None:
    """Print rows of the table: instructions / special functions per element."""
    jobs: list[tuple[Trick | None, str]] = [(None, k) for k in {t.kernel for t in tricks}]
    jobs += [(trick, trick.without_kernel or trick.kernel) for trick in tricks]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda job: counted(job[0], FOLDERS[side], count, job[1]), jobs)
        counts = dict(zip(jobs, results, strict=True))
    for trick in tricks:
        without = counts[trick, trick.without_kernel or trick.kernel]
        with_it = counts[None, trick.kernel]
        print(
            f"| {side} | {trick.name} | {label(trick.kernel)} | "
            f"{without[0]:.1f} / {without[1]:.2f} | {with_it[0]:.1f} / {with_it[1]:.2f} |"
        )


def label(kernel: str) -> str:
    gammas = {ZERO: "sigmoid, gamma 0", HALF: "sigmoid, gamma 1/2"}
    gammas |= {"sigmoid_rows g=0": gammas[ZERO], "sigmoid_rows g=0.5": gammas[HALF]}
    return gammas.get(kernel, "softmax")


if __name__ == "__main__":
    main()
