"""The kernels for CPUs compiled otherwise than setup.py does: with sanitizers, or with a fault.

A build is a folder with a package cbloss_fused of its own: the Python files are links to those of
this repository, the extension is its own.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setup

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "cbloss_fused"
NAME = "_C.abi3.so"
STAND_IN = """#include "cpu/call.h"
namespace {missing} {{
RowKernel find(DType dtype, Mode mode, const Call& a) {{ return {instead}::find(dtype, mode, a); }}
}}
"""


def package(folder: Path, *own: str) -> Path:
    """cbloss_fused in a folder, without its extensions and without what is its own."""
    made = folder / "cbloss_fused"
    made.mkdir(parents=True, exist_ok=True)
    compiled = (".so", ".stamp")
    for path in PACKAGE.iterdir():
        link = made / path.name
        if path.suffix in compiled or path.name in ("__pycache__", *own) or link.exists():
            continue
        link.symlink_to(path)
    return made


def compile_one(csrc: Path, source: str, target: Path, flags: Sequence[str]) -> Path:
    """source: within csrc."""
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [*shlex.split(setup.compiler()), *setup.FLAGS, *flags]
    command += [f"-I{sysconfig.get_path('include')}", f"-I{csrc}"]
    subprocess.run([*command, "-c", str(csrc / source), "-o", str(target)], check=True)
    return target


def sources_of(instruction_sets: Sequence[str], folder: Path) -> dict[str, tuple[str, list[str]]]:
    """Object -> source and flags. Instruction sets that are not compiled run the first that is."""
    jobs = {Path(each).stem: (each.removeprefix("csrc/"), list[str]()) for each in setup.SOURCES}
    folder.mkdir(parents=True, exist_ok=True)
    for name, flags in setup.ISA_FLAGS.items():
        if name in instruction_sets:
            jobs[name] = f"cpu/isa/{name}.cpp", flags
        else:
            stand_in = folder / f"{name}.cpp"
            stand_in.write_text(STAND_IN.format(missing=name, instead=instruction_sets[0]))
            jobs[name] = str(stand_in), []
    return jobs


def objects_of(
    csrc: Path, folder: Path, instruction_sets: Sequence[str], flags: Sequence[str]
) -> dict[str, Path]:
    """The objects by their names; flags come after those of the instruction set."""
    jobs = sources_of(instruction_sets, folder)

    def compile_job(name: str) -> Path:
        source, own = jobs[name]
        return compile_one(csrc, source, folder / f"{name}.o", [*own, *flags])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(jobs, pool.map(compile_job, jobs), strict=True))


def link(library: Path, objects: Sequence[Path], flags: Sequence[str]) -> None:
    """Written beside and moved: a library that is in use stays as it is."""
    fresh, place = library.with_suffix(".new"), library.parent.parent / "stand-ins"
    place.mkdir(exist_ok=True)
    command = [*shlex.split(setup.compiler()), "-shared", *flags, *map(str, objects)]
    subprocess.run([*command, *setup.stand_ins(place, "torch_cpu"), "-o", str(fresh)], check=True)
    fresh.replace(library)
