"""The CUDA sources compiled for the host: host/cuda_runtime.h runs them on a CPU, without a GPU."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE, ROOT = Path(__file__).parent, Path(__file__).parent.parent.parent
TORCH = Path(torch.__file__).parent
DTYPES = ("float", "double", "__nv_bfloat16", "__half")
FLAGS = [
    *("-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"),
    *("-Wno-unknown-pragmas", "-ffp-contract=fast", "-U_FORTIFY_SOURCE"),
    "-fno-strict-aliasing",  # a word of memory is read as a pair of halves, as nvcc allows
    f"-I{HERE / 'host'}",
    *(["-mfma", "-mf16c"] if platform.machine() == "x86_64" else []),
]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def emulated(sanitized: bool = False) -> Path | None:
    """The library, compiled if it is not up to date; None without Linux (ucontext) or g++."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        return None
    folder = ROOT / "build" / ("emulated-sanitized" if sanitized else "emulated")
    library = folder / "cuda_on_cpu.so"
    sources = [*(ROOT / "csrc").rglob("*"), *HERE.rglob("*.h"), Path(__file__)]
    newest = max(path.stat().st_mtime for path in sources)
    if library.exists() and library.stat().st_mtime > newest:
        return library
    flags = [*SANITIZERS, "-g1", "-O1"] if sanitized else ["-O2"]
    jobs = [("dispatch.cu", dtype) for dtype in DTYPES] + [("ops.cu", "ops")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for each in [pool.submit(compile_one, ROOT / "csrc", folder, *job, flags) for job in jobs]:
            each.result()
    link(library, [folder / f"{name}.o" for _, name in jobs], SANITIZERS if sanitized else [])
    return library


def faulty(csrc: Path, dtype: str) -> Path:
    """The library with the row kernels of one dtype from another csrc, the rest as it is."""
    folder = csrc.parent
    compile_one(csrc, folder, "dispatch.cu", dtype, ["-O0", "-w"])
    good = ROOT / "build" / "emulated"
    objects = [good / f"{name}.o" for name in (*DTYPES, "ops") if name != dtype]
    library = folder / "cuda_on_cpu.so"
    link(library, [folder / f"{dtype}.o", *objects], [])
    return library


def compile_one(csrc: Path, folder: Path, source: str, name: str, flags: list[str]) -> None:
    """name: of the object; of dispatch.cu, the dtype."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["g++", *FLAGS, *flags, f"-DCBLOSS_DTYPE={name}", "-x", "c++"]
    target = folder / f"{name}.o"
    subprocess.run([*command, "-c", str(csrc / "cuda" / source), "-o", str(target)], check=True)


def link(library: Path, objects: list[Path], flags: list[str]) -> None:
    """Written beside and moved: a library that is in use stays as it is."""
    fresh = library.with_suffix(".new")
    command = ["g++", "-shared", *flags, *map(str, objects), f"-L{TORCH / 'lib'}"]
    command += ["-ltorch_cpu", f"-Wl,-rpath,{TORCH / 'lib'}", "-o", str(fresh)]
    subprocess.run(command, check=True)
    fresh.replace(library)
