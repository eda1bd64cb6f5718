"""The CUDA sources compiled for the host: host/cuda_runtime.h runs them on a CPU, without a GPU."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent
DTYPES = ("float", "double", "__nv_bfloat16", "__half")
FLAGS = (
    *("-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"),
    *("-Wno-unknown-pragmas", "-ffp-contract=fast", "-U_FORTIFY_SOURCE", "-DUSE_CUDA"),
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
)
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1", "-O1")


def emulated(sources: Path = ROOT / "csrc", sanitized: bool = False) -> Path | None:
    """The library, compiled if it is not up to date; None where there is no g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    folder = sources.parent / "build" / ("emulated-sanitized" if sanitized else "emulated")
    library = folder / "_cuda_on_cpu.so"
    newest = max(
        p.stat().st_mtime for p in [*sources.rglob("*"), *Path(__file__).parent.rglob("*.h")]
    )
    if library.exists() and library.stat().st_mtime > newest:
        return library
    folder.mkdir(parents=True, exist_ok=True)
    found = Path(torch.__file__).parent
    flags = [*FLAGS, *(SANITIZERS if sanitized else ("-O2",))]
    if platform.machine() == "x86_64":
        flags += ["-mfma", "-mf16c"]
    flags += [f"-I{Path(__file__).parent / 'host'}", "-isystem", str(found / "include")]
    flags += ["-isystem", str(found / "include/torch/csrc/api/include")]

    def compile_one(name: str, *more: str) -> str:
        target = folder / f"{'-'.join((name, *more)).replace('=', '-')}.o"
        command = [compiler, *flags, *more, "-x", "c++", "-c", str(sources / "cuda" / f"{name}.cu")]
        subprocess.run([*command, "-o", str(target)], check=True)
        return str(target)

    jobs = [("rows", f"-DCBLOSS_DTYPE={dtype}") for dtype in DTYPES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: compile_one(*job), [*jobs, ("ops",)]))
    link = [compiler, "-shared", *(SANITIZERS if sanitized else ()), *objects]
    link += [f"-L{found / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{found / 'lib'}"]
    subprocess.run([*link, "-o", str(library)], check=True)
    return library
