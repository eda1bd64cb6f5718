"""Errors of the CPU kernels' functions: `python -m bench.bounds`, minutes; `make bounds`.

bounds.cpp includes the kernels' headers unchanged and is compiled as they are, once for each
instruction set of this machine. Functions of one variable are swept over every float32 number of
the domain that the kernels use, or over one of `step`, and compared with double; those that are
nearly linear around 0 over one of SPARSE numbers below LINEAR, where most float32 numbers lie.
Functions of more variables are compared with mpmath in bounds_samples.py.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import struct
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

from . import bounds_samples

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
SOURCES = (FOLDER / "bounds.cpp", ROOT / "csrc" / "row_math.h", ROOT / "csrc" / "cpu" / "vec.h")
SAMPLES = 4000  # of each formula
LARGEST, SMALLEST = 3.4028235e38, 1.1754944e-38  # of the normal numbers
LOWEST, HIGHEST = -87.3, 88.0  # beyond these exp is 0, or not used
LINEAR, SPARSE = 2.0**-12, 61  # below LINEAR in magnitude one of SPARSE numbers


class Function(NamedTuple):
    """A function of one variable: where it is used, and the error that is promised there."""

    name: str
    short: bool  # for half types
    low: float
    high: float
    bound: float
    linear: bool = False  # around 0

    @property
    def label(self) -> str:
        return self.name + (", half types" if self.short else "")


OF_GAMMA = {  # float32, half types
    "0": (6e-7, 1e-5), "0.5": (1.5e-6, 2e-5), "1": (1e-6, 2e-5), "2": (1.5e-6, 2e-5),
    "5": (6e-6, 3e-5),
}  # fmt: skip


def _functions() -> tuple[Function, ...]:
    found = []
    for short in (False, True):
        e, u = (4e-6, 7e-6) if short else (4.1e-7, 2.5e-7)
        found += [
            Function("exp", short, LOWEST, HIGHEST, e),
            Function("root_sigma", short, -87.0, 174.6, e),
            Function("log1m_over", short, 0.0, 0.5, u),
            Function("sigma", short, -128.0, 128.0, e, True),
            Function("softplus", short, -128.0, 128.0, 4e-6 if short else 6e-7, True),
        ]
        for gamma, bounds in OF_GAMMA.items():
            for part in "Lg":
                name = f"{part}, gamma {gamma}"
                found.append(Function(name, short, -128.0, 128.0, bounds[short], True))
    return (
        *found,
        Function("log", False, SMALLEST, 0.5, 1.3e-7),
        Function("log", False, 2.0, LARGEST, 1.3e-7),
        Function("log, absolute", False, 0.5, 2.0, 1e-7),
        Function("rcp", False, 1.0, 2.0, 1.2e-7),
    )


FUNCTIONS = _functions()


@cache
def library(isa: str) -> ctypes.CDLL:
    """bounds.cpp for an instruction set, compiled if it is not up to date."""
    from setup import FLAGS, ISA_FLAGS, compiler

    built = ROOT / "build" / "bounds" / f"{isa}.so"
    newest = max(path.stat().st_mtime for path in SOURCES)
    if not built.exists() or built.stat().st_mtime <= newest:
        built.parent.mkdir(parents=True, exist_ok=True)
        fresh = built.with_suffix(f".{os.getpid()}")
        command = [*shlex.split(compiler()), *FLAGS, "-Wno-unused-function", "-shared"]
        command += [*ISA_FLAGS[isa], str(SOURCES[0]), "-o", str(fresh)]
        subprocess.run(command, check=True)
        fresh.replace(built)
    loaded = ctypes.CDLL(str(built))
    loaded.worst_of.restype = ctypes.c_double
    return loaded


def instruction_sets() -> list[str]:
    """Of this machine; avx512_bf16 has the functions of avx512."""
    from cbloss_fused.backends import set_isa

    return [isa for isa in set_isa() if isa != "avx512_bf16"]


def bits(x: float) -> int:
    (found,) = struct.unpack("I", struct.pack("f", x))
    return int(found)


def ranges(function: Function, step: int) -> Iterator[tuple[int, int, int]]:
    """Bits of the first and the last number, of one sign, and of how many between one is taken."""
    of_signs = (1 << 31, 0.0, -function.low), (0, max(function.low, 0.0), function.high)
    for sign, low, high in of_signs:
        if low >= high:
            continue
        middle = LINEAR if function.linear else low
        if low < middle:
            yield sign | bits(low), sign | bits(middle) - 1, step * SPARSE
        yield sign | bits(middle), sign | bits(high), step


def worst(isa: str, function: Function, step: int) -> tuple[float, float]:
    """The largest error, and where."""
    loaded = library(isa)

    def of(first: int, last: int, step: int) -> tuple[float, float]:
        at = ctypes.c_float()
        name = function.name.encode()
        error = loaded.worst_of(name, function.short, first, last, step, ctypes.byref(at))
        return error, at.value

    size = 1 << 24
    parts = [
        (first, min(last, first + size - 1), every)
        for low, last, every in ranges(function, step)
        for first in range(low + (-low % every), last + 1, size - size % every)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return max(pool.map(lambda part: of(*part), parts))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def promised() -> str:
    """The table of docs/numerics.md."""
    rows: dict[tuple[str, str], list[str]] = {}
    for f in FUNCTIONS:
        key = f"`{f.name}`", f"{f.low:.4g} to {f.high:.4g}"
        rows.setdefault(key, ["", ""])[f.short] = f"{f.bound:.2g}"
    for s in bounds_samples.SAMPLED:
        results = ", ".join(s.results)
        rows[f"`{s.name}`: {results}", "samples"] = [f"{s.bound:.2g}", ""]
    lines = [[*key, *found] for key, found in rows.items()]
    return table(("function", "of", "error at most", "half types"), lines)


def facts() -> dict[str, object]:
    from setup import compiler, version_of

    from .cpu import environment

    found = environment("make bounds")
    kept = {name: found[name] for name in ("date", "command", "cpu", "system", "cbloss_fused")}
    return kept | {"compiler": version_of(compiler()).splitlines()[0].split(": ", 1)[1]}


def main() -> None:
    """Measure everything, print the table, and fail where a bound is exceeded."""
    sets, beyond, rows = instruction_sets(), [], []
    begin = time.monotonic()
    for f in FUNCTIONS:
        found = {isa: worst(isa, f, 1) for isa in sets}
        share = f"all from ±{LINEAR:.3g} on" if f.linear else "all"
        cells = [f"{error:.3g} at {at:.9g}" for error, at in found.values()]
        rows.append([f.label, f"{f.low:.4g} to {f.high:.4g}", share, f"{f.bound:.2g}", *cells])
        beyond += [f"{f.label} ({isa})" for isa in sets if not found[isa][0] <= f.bound]
    for s in bounds_samples.SAMPLED:
        of = {isa: bounds_samples.worst(library(isa), s, SAMPLES) for isa in sets}
        for i, result in enumerate(s.results):
            cells = [f"{of[isa][i][0]:.3g}" for isa in sets]
            n = str(SAMPLES * len(s.formulas))
            rows.append([f"{s.name}: {result}", "samples", n, f"{s.bound:.2g}", *cells])
            beyond += [f"{s.name} ({isa})" for isa in sets if not of[isa][i][0] <= s.bound]
    print("# Errors of the CPU kernels' functions\n")
    for name, value in facts().items():
        print(f"- {name}: {value}")
    print(f"- seconds: {time.monotonic() - begin:.0f}\n")
    print(table(("function", "from, to", "numbers", "promised", *sets), rows))
    print(
        f"\nBelow ±{LINEAR:.3g}, where these functions are nearly linear, one of {SPARSE} numbers."
    )
    if beyond:
        raise SystemExit(f"beyond what is promised: {', '.join(beyond)}")


if __name__ == "__main__":
    main()
