"""Builds cbloss_fused._C: csrc/ on the LibTorch stable ABI and Python's limited API.

The extension is never needed: without a compiler, or without a torch to build against, the package
is installed all the same, and the reason is recorded for backends(). Any other failure is an error.
torch is found, never imported, so that an isolated build can use the environment's own.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TORCH_TARGET_VERSION = "0x020b000000000000"  # torch 2.11, the oldest that may load the binary
PY_LIMITED_API = "0x030a0000"  # Python 3.10

# Compiled once each, as row kernels in a namespace of that name; chosen at load time.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")]
AVX512 += ["-mprefer-vector-width=512", "-Wno-maybe-uninitialized"]  # GCC's headers trip it
AVX512 += ["-Wno-unknown-warning-option"]  # which Clang does not know
ISA_FLAGS: dict[str, list[str]] = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
FLAGS = [
    *("-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    # Nothing reads errno or floating-point traps; products and sums may fuse where FMA exists.
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    f"-DPy_LIMITED_API={PY_LIMITED_API}",
]


def find_torch() -> Path | None:
    """The folder of the environment's torch, even from pip's isolated build environment."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    for folder in (sysconfig.get_path("platlib"), sysconfig.get_path("purelib")):
        if (Path(folder) / "torch" / "include").is_dir():
            return Path(folder) / "torch"
    return None


def configured_compiler() -> str:
    """The C++ compiler that setuptools would call."""
    return shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")[0]


def find_compiler() -> str | None:
    """That one, or another that is here: an interpreter may remember one from elsewhere."""
    return next(filter(shutil.which, (configured_compiler(), "g++", "clang++", "c++")), None)


def missing() -> str | None:
    """Why the extension cannot be built here, in one line; None if it can."""
    if sys.platform not in ("linux", "darwin"):
        return f"no CPU kernels for {sys.platform} yet"
    if find_compiler() is None:
        return "no C++ compiler found; install one and reinstall cbloss_fused"
    if find_torch() is None:
        return (
            "no torch in this environment at build time; "
            "install torch, then: pip install --no-build-isolation --force-reinstall --no-deps ."
        )
    return None


class BuildExtension(build_ext):
    """Compiles rows.cpp once per instruction set, or records why there is nothing to compile."""

    def run(self) -> None:
        reason = missing()
        note = Path(self.get_ext_fullpath("cbloss_fused._C")).parent / "_build_note.txt"
        if reason is None:
            note.unlink(missing_ok=True)
            super().run()
            return
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(reason + "\n")
        print(f"cbloss_fused: extension left out: {reason}", file=sys.stderr)

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        assert torch is not None
        compiler = find_compiler()
        if compiler != configured_compiler():
            self.compiler.set_executables(
                compiler_cxx=compiler, compiler_so_cxx=compiler, linker_so_cxx=f"{compiler} -shared"
            )
        include = [torch / "include", torch / "include" / "torch" / "csrc" / "api" / "include"]
        includes = [f"-isystem{path}" for path in include]

        def compile_one(source: str, name: str, flags: list[str]) -> list[str]:
            return self.compiler.compile(
                [source],
                output_dir=str(Path(self.build_temp) / name),
                extra_postargs=[*FLAGS, *includes, *flags],
                include_dirs=[sysconfig.get_path("include")],
                depends=ext.depends,
            )

        jobs = [
            ("csrc/cpu/rows.cpp", name, [f"-DCBLOSS_ISA={name}", *flags])
            for name, flags in ISA_FLAGS.items()
        ]
        jobs += [(source, "ops", []) for source in ext.sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [o for found in pool.map(lambda job: compile_one(*job), jobs) for o in found]
        origin = "@loader_path" if sys.platform == "darwin" else "$ORIGIN"
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=["torch_cpu", "c10"],  # named, since torch's symbols are not global
            library_dirs=[str(torch / "lib")],
            extra_postargs=[f"-Wl,-rpath,{origin}/../torch/lib"],
            target_lang="c++",
        )


HEADERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))

setup(
    ext_modules=[
        Extension(
            "cbloss_fused._C",
            sources=["csrc/module.cpp", "csrc/cpu/ops.cpp"],
            depends=[*HEADERS, "csrc/cpu/rows.cpp"],
            language="c++",
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
