"""Builds cbloss_fused._C, and with nvcc cbloss_fused/_cuda.so: csrc/ on the LibTorch stable ABI.

Neither is ever needed: without a compiler, or without a torch to build against, the package is
installed all the same, and the reason is recorded for backends(). Any other failure is an error; of
the CUDA kernels only where they were asked for: CBLOSS_CUDA=1 builds them beside a torch without
CUDA too, CBLOSS_CUDA=0 leaves them out. TORCH_CUDA_ARCH_LIST chooses the GPUs as for PyTorch.
torch is found, never imported, so that an isolated build can use the environment's own.

What is current is not built again: a stamp beside a library, never in a wheel, has digests of its
sources, of what compiled them and of itself. Times of files do not count: a copy changes them.
CBLOSS_KEEP=1 keeps what was built from these sources elsewhere, whatever compiled it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_TARGET_VERSION = "0x020b000000000000"  # torch 2.11, the oldest that may load the binary
PY_LIMITED_API = "0x030a0000"  # Python 3.10

# Compiled once each, as row kernels in a namespace of that name; chosen at load time.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")]
AVX512 += [
    "-mprefer-vector-width=512",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]  # GCC's headers trip it
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


# What is current --------------------------------------------------------------------------------

KEEP = os.environ.get("CBLOSS_KEEP") == "1"
ENVIRONMENT = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "LDSHARED", "ARCHFLAGS")
CUDA_ENVIRONMENT = ("NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")


def digest(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(f"{len(part)}:".encode() + part)
    return found.hexdigest()


def digest_of_sources(leave_out: str, root: Path = ROOT) -> str:
    """Of csrc/ but for one of its folders, and of this file."""
    csrc = root / "csrc"
    paths = [
        path for path in csrc.rglob("*") if path.is_file() and csrc / leave_out not in path.parents
    ]
    named = {str(path.relative_to(root)): path.read_bytes() for path in [*paths, root / "setup.py"]}
    return digest(*(part for name in sorted(named) for part in (name.encode(), named[name])))


def version_of(tool: str | None) -> str:
    """Where a compiler is, and what it calls itself."""
    if tool is None:
        return "none"
    told = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout
    return f"{shutil.which(tool)}: {told}"


def digest_of_tools(*flags: str) -> str:
    """Of torch's version, the compiler, flags, and what the environment adds."""
    torch = find_torch()
    version = torch / "version.py" if torch is not None else None
    told = version.read_text() if version is not None and version.exists() else ""
    chosen = [f"{name}={os.environ.get(name, '')}" for name in ENVIRONMENT]
    configured = [str(sysconfig.get_config_var(name)) for name in ("CXX", "CFLAGS", "LDSHARED")]
    parts = [told, version_of(find_compiler()), *flags, *chosen, *configured]
    return digest(*(part.encode() for part in parts))


class Stamp:
    """What a library was made of."""

    def __init__(self, path: Path, library: Path, sources: str) -> None:
        self.path, self.library, self.sources = path, library, sources

    def current(self, tools: Callable[[], str], keep: bool) -> bool:
        """keep: whatever compiled it, and where nothing is known of a library."""
        if not self.library.exists():
            return False
        if not self.path.exists():
            return keep
        try:
            found = json.loads(self.path.read_text())
            same = found["sources"] == self.sources and found["library"] == self.contents()
            return same and (keep or found["tools"] == tools())
        except (ValueError, KeyError, TypeError):  # no stamp of this kind
            return False

    def contents(self) -> str:
        return digest(self.library.read_bytes())

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def write(self, tools: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        entry = {"sources": self.sources, "tools": tools, "library": self.contents()}
        self.path.write_text(json.dumps(entry) + "\n")


def cpu_tools() -> str:
    per_set = [f"{name} {shlex.join(flags)}" for name, flags in ISA_FLAGS.items()]
    return digest_of_tools(*FLAGS, *per_set)


def cuda_tools() -> str:
    nvcc = find_nvcc()
    assert nvcc is not None
    chosen = [f"{name}={os.environ.get(name, '')}" for name in CUDA_ENVIRONMENT]
    return digest_of_tools(version_of(nvcc), *CUDA_FLAGS, *architectures(nvcc), *chosen)


# CUDA ---------------------------------------------------------------------------------------------

ASKED = os.environ.get("CBLOSS_CUDA", "")  # "1", "0" or nothing: where nvcc and torch's CUDA are
ARCHITECTURES = "8.0;9.0;10.0+PTX"
CUDA_DTYPES = ["float", "double", "__nv_bfloat16", "__half"]
CUDA_FLAGS = [
    *("-std=c++17", "-O3", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden"),
]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")


def missing_cuda() -> str | None:
    """Why the CUDA kernels cannot be built here, in one line; None if they can."""
    torch = find_torch()
    if ASKED == "0":
        return "switched off by CBLOSS_CUDA=0 at build time"
    if sys.platform != "linux":
        return f"not built for {sys.platform}"
    if torch is None:
        return "no torch in this environment at build time"
    if find_nvcc() is None:
        return "no nvcc found at build time"
    if ASKED != "1" and not (torch / "lib" / "libtorch_cuda.so").exists():
        return "the PyTorch of the build has no CUDA"
    return None


def gpus_here() -> list[str]:
    """Compute capabilities of this machine's GPUs, "7.5" for one."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    if shutil.which(query[0]) is None:
        return []
    found = subprocess.run(query, capture_output=True, text=True).stdout
    return re.findall(r"^\d+\.\d+$", found, re.MULTILINE)


def covered(gpu: str, names: list[str]) -> bool:
    """Whether code for one of these runs on that GPU: one of its major version, none newer."""
    major, minor = gpu.split(".")
    listed = (name.removesuffix("+PTX").split(".") for name in names)
    return any(m == major and int(n) <= int(minor) for m, n in listed)


def architectures(nvcc: str) -> list[str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST, "8.0;9.0a;10.0+PTX"; by default ours and this GPU's,
    as far as nvcc knows them."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    names = re.split(r"[; ]+", (asked or ARCHITECTURES).strip("; "))
    if asked is None:
        names = [gpu for gpu in sorted(set(gpus_here())) if not covered(gpu, names)] + names
    flags = []
    for each in names:
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", each)
        if found is None:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST must hold numbers such as 9.0 or 10.0+PTX, got {each!r}"
            )
        major, minor, kind, ptx = found.groups()
        number = major + minor + kind
        if asked is None and f"compute_{number}" not in known.stdout.split():
            continue
        code = f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}"
        flags += ["-gencode", f"arch=compute_{number},code={code}"]
    return flags


def build_cuda(library: Path, folder: Path) -> None:
    """Compile csrc/cuda, dispatch.cu once per dtype, and link against torch or a stub of it."""
    torch, nvcc = find_torch(), find_nvcc()
    assert torch is not None
    assert nvcc is not None
    arch = architectures(nvcc)
    names = ", ".join(a.split("code=")[1].strip("[]").replace(",", " and ") for a in arch[1::2])
    include = [torch / "include", torch / "include" / "torch" / "csrc" / "api" / "include"]
    flags = [*CUDA_FLAGS, *arch, *(f"-isystem={path}" for path in include)]
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: str, define: str, name: str) -> str:
        target = folder / f"{name}.o"
        command = [nvcc, *flags, define, "-c", str(ROOT / source), "-o", str(target)]
        print(shlex.join(command), file=sys.stderr)
        subprocess.run(command, check=True)
        return str(target)

    jobs = [("csrc/cuda/dispatch.cu", f"-DCBLOSS_DTYPE={dtype}", dtype) for dtype in CUDA_DTYPES]
    jobs.append(("csrc/cuda/ops.cu", f'-DCBLOSS_ARCHITECTURES="{names}"', "ops"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: compile_one(*job), jobs))
    if not (torch / "lib" / "libtorch_cuda.so").exists():
        stub = ["-Xlinker", "-soname,libtorch_cuda.so", "-o", str(folder / "libtorch_cuda.so")]
        source = str(ROOT / "csrc/cuda/torch_cuda_stub.c")
        subprocess.run([nvcc, "-shared", "-Xcompiler", "-fPIC", source, *stub], check=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    command = [nvcc, "-shared", "-cudart", "static", *objects, "-o", str(library)]
    command += [f"-L{torch / 'lib'}", f"-L{folder}", "-Xlinker", "--no-as-needed"]
    command += ["-ltorch_cpu", "-ltorch_cuda", "-lc10", "-Xlinker", "-rpath,$ORIGIN/../torch/lib"]
    print(shlex.join(command), file=sys.stderr)
    subprocess.run(command, check=True)


# Both ---------------------------------------------------------------------------------------------


class BuildExtension(build_ext):
    """Compiles what can be compiled here, and records why the rest is left out."""

    def run(self) -> None:
        package = Path(self.get_ext_fullpath("cbloss_fused._C")).parent
        self.cpu_kernels(package)
        self.cuda_kernels(package)

    def cpu_kernels(self, package: Path) -> None:
        stamp = self.stamp(Path(self.get_ext_fullpath("cbloss_fused._C")), "cuda")
        if not self.force and stamp.current(cpu_tools, KEEP):
            return self.note(package / "_build_note.txt", None)
        reason = missing()
        self.note(package / "_build_note.txt", reason)
        if reason is None:
            stamp.remove()
            super().run()
            stamp.write(cpu_tools())

    def cuda_kernels(self, package: Path) -> None:
        library, folder = package / "_cuda.so", Path(self.build_temp) / "cuda"
        stamp, reason = self.stamp(library, "cpu"), missing_cuda()
        if ASKED != "0" and KEEP and not self.force and stamp.current(str, KEEP):
            return self.note(package / "_cuda_note.txt", None)
        if reason is None:
            try:
                if self.force or not stamp.current(cuda_tools, KEEP):
                    stamp.remove()
                    library.unlink(missing_ok=True)  # what fails leaves nothing that looks current
                    build_cuda(library, folder)
                    stamp.write(cuda_tools())
            except (subprocess.CalledProcessError, OSError, ValueError) as error:
                if ASKED == "1":
                    raise
                reason = f"the build failed ({error}); CBLOSS_CUDA=1 makes that an error"
        if reason is not None:
            stamp.remove()
            library.unlink(missing_ok=True)
        self.note(package / "_cuda_note.txt", reason)

    def stamp(self, library: Path, leave_out: str) -> Stamp:
        """Beside a library in place; else not where it would enter a wheel."""
        folder = library.parent if self.inplace else Path(self.build_temp)
        name = library.name.split(".")[0]
        return Stamp(folder / f"{name}.stamp", library, digest_of_sources(leave_out))

    def note(self, path: Path, reason: str | None) -> None:
        path.unlink(missing_ok=True)
        if reason is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(reason + "\n")
            print(f"cbloss_fused: left out: {reason}", file=sys.stderr)

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
            ("csrc/cpu/kernels.cpp", name, [f"-DCBLOSS_ISA={name}", *flags])
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

if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(
                "cbloss_fused._C",
                sources=[
                    "csrc/module.cpp",
                    *(f"csrc/cpu/{name}.cpp" for name in ("ops", "isa", "stats")),
                ],
                depends=[*HEADERS, "csrc/cpu/kernels.cpp"],
                language="c++",
                py_limited_api=True,
            )
        ],
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
