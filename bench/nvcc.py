"""What nvcc makes of the CUDA kernels, counted without a GPU: `python -m bench.nvcc`."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import setup

from . import sass

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"float": "fp32", "__nv_bfloat16": "bf16", "__half": "fp16"}
GAMMAS = ("0", "1/2", "1", "2", "any", "general")  # of enum Gamma in csrc/row_math.h


def library(architecture: str = "9.0") -> Path:
    """The kernels as setup.py builds them for one GPU, every warning an error."""
    folder = ROOT / "build" / f"nvcc-{architecture}"
    path = folder / "_cuda.so"
    sources = [*(ROOT / "csrc").rglob("*"), ROOT / "setup.py"]
    if not path.exists() or path.stat().st_mtime < max(p.stat().st_mtime for p in sources):
        chosen = {"TORCH_CUDA_ARCH_LIST": architecture, "NVCC_APPEND_FLAGS": "-Werror all-warnings"}
        with mock.patch.dict(os.environ, chosen):
            setup.build_cuda(path, folder)
    return path


class Line(NamedTuple):
    """A row of the table: a kernel that holds `elements` a thread, without label smoothing."""

    kernel: str
    dtype: str
    threads: int  # of a row
    elements: int
    registers: int
    instructions: float  # an element, set-up and reductions included
    special: float
    loads: int
    stores: int


def lines(path: Path) -> Iterator[Line]:
    for name, code in sass.read_library(path).items():
        found = re.search(
            r"(softmax|sigmoid)_rows<(\w+), (?:\(cbloss::Gamma\)(\d), )?false, (\d+), (\d+)"
            r"(, true)?>",
            name,
        )
        if found is None or found[2] not in DTYPES or (found[1] == "sigmoid" and not found[6]):
            continue
        dtype, threads, items = DTYPES[found[2]], int(found[4]), int(found[5])
        elements = items * (4 if dtype == "fp32" else 8)
        kernel = found[1] + (f", gamma {GAMMAS[int(found[3])]}" if found[3] else "")
        counts = code.interior
        yield Line(
            kernel, dtype, threads, elements, code.registers,
            counts.all / elements, counts.special / elements, counts.loads, counts.stores,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.nvcc", description=__doc__.split("\n")[0])
    parser.add_argument("--architecture", default="9.0")
    architecture = parser.parse_args().architecture
    path = library(architecture)
    nvcc = setup.find_nvcc()
    assert nvcc is not None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release ([\d.]+)", text)
    print(
        "# Machine code of the CUDA kernels\n\n"
        f"`python -m bench.nvcc --architecture {architecture}`, CUDA"
        f" {version[1] if version else '?'}. Rows held in registers or read once, no label"
        " smoothing; general: with gamma_neg, clip, alpha or adjusted logits. Counted, not timed: a"
        " thread's path without an edge or the target.\n"
    )
    heads = (
        "kernel", "dtype", "threads a row", "elements a thread", "regs", "instr/el", "MUFU/el",
        "16 B loads, stores",
    )  # fmt: skip
    print("| " + " | ".join(heads) + " |\n| " + " | ".join("---" for _ in heads) + " |")
    for x in sorted(lines(path), key=lambda x: (x.kernel, x.dtype, x.threads * x.elements)):
        print(
            f"| {x.kernel} | {x.dtype} | {x.threads} | {x.elements} | {x.registers} | "
            f"{x.instructions:.1f} | {x.special:.2f} | {x.loads}, {x.stores} |"
        )
    spills = [
        f"- `{name}`: {code.stack} bytes, {code.local} accesses"
        for name, code in sass.read_library(path).items()
        if code.stack and "double" not in name
    ]
    print(
        "\nKernels with a stack, float64 apart:"
        + ("\n\n" + "\n".join(spills) if spills else " none")
    )


if __name__ == "__main__":
    main()
