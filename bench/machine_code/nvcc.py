"""What nvcc makes of the CUDA kernels: `python -m bench.machine_code.nvcc`. Needs no GPU."""

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

from ..report import markdown_table
from . import sass

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"float": "fp32", "__nv_bfloat16": "bf16", "__half": "fp16"}
GAMMAS = ("0", "1/2", "1", "2", "any", "general")  # of enum Gamma in csrc/call.h
KERNEL = re.compile(
    r"(?P<name>softmax|sigmoid)_rows<(?P<dtype>\w+), (?:\(Gamma\)(?P<gamma>\d), )?false, "
    r"(?P<threads>\d+), (?P<vectors>\d+)(?P<single>, true)?>"
)
INTRO = """\
# Machine code of the CUDA kernels

`python -m bench.machine_code.nvcc --architecture {architecture}`, CUDA {version}. Rows that are \
held in registers or read once, without label smoothing; general: with gamma_neg, clip, alpha or \
adjusted logits. Counted, not timed, on the path of a thread without a row's edge or target.
"""


def library(architecture: str = "9.0") -> Path:
    """The kernels as setup.py builds them for one GPU, with every warning an error."""
    folder = ROOT / "build" / f"nvcc-{architecture}"
    path = folder / "_cuda.so"
    sources = [*(ROOT / "csrc").rglob("*"), ROOT / "setup.py"]
    if not path.exists() or path.stat().st_mtime < max(p.stat().st_mtime for p in sources):
        chosen = {"TORCH_CUDA_ARCH_LIST": architecture, "NVCC_APPEND_FLAGS": "-Werror all-warnings"}
        with mock.patch.dict(os.environ, chosen):
            setup.build_cuda(path, folder)
    return path


class Line(NamedTuple):
    """A row of the table: a kernel without label smoothing."""

    kernel: str
    dtype: str
    threads: int  # per row
    elements: int  # per thread
    registers: int
    instructions: float  # per element, including set-up and reductions
    special: float  # per element
    loads: int
    stores: int

    def cells(self) -> dict[str, str]:
        return {
            "kernel": self.kernel,
            "dtype": self.dtype,
            "threads per row": str(self.threads),
            "elements per thread": str(self.elements),
            "regs": str(self.registers),
            "instr/el": f"{self.instructions:.1f}",
            "MUFU/el": f"{self.special:.2f}",
            "16 B loads, stores": f"{self.loads}, {self.stores}",
        }


def lines(codes: dict[str, sass.Code]) -> Iterator[Line]:
    for name, code in codes.items():
        found = KERNEL.search(name)
        if found is None or found["dtype"] not in DTYPES:
            continue
        if found["name"] == "sigmoid" and not found["single"]:
            continue
        dtype, counts = DTYPES[found["dtype"]], code.interior
        elements = int(found["vectors"]) * (4 if dtype == "fp32" else 8)
        gamma = f", gamma {GAMMAS[int(found['gamma'])]}" if found["gamma"] else ""
        yield Line(
            found["name"] + gamma, dtype, int(found["threads"]), elements, code.registers,
            counts.all / elements, counts.special / elements, counts.loads, counts.stores,
        )  # fmt: skip


def nvcc_version() -> str:
    nvcc = setup.find_nvcc()
    assert nvcc is not None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release ([\d.]+)", text)
    return found[1] if found else "?"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench.machine_code.nvcc", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--architecture", default="9.0")
    architecture = parser.parse_args().architecture
    codes = sass.read_library(library(architecture))
    print(INTRO.format(architecture=architecture, version=nvcc_version()))
    table = sorted(lines(codes), key=lambda x: (x.kernel, x.dtype, x.threads * x.elements))
    print(markdown_table([line.cells() for line in table]))
    spills = [
        f"- `{name}`: {code.stack} bytes, {code.local} accesses"
        for name, code in codes.items()
        if code.stack and "double" not in name
    ]
    print(
        "\nKernels that use a stack, except float64:"
        + ("\n\n" + "\n".join(spills) if spills else " none")
    )


if __name__ == "__main__":
    main()
