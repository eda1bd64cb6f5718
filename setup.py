"""Builds cbloss_fused._C, the kernels for CPUs, and with nvcc cbloss_fused._cuda, those for GPUs.

Neither build needs PyTorch: csrc/torch_abi.h declares what they call of its stable C ABI, and they
are linked against stand-ins for its libraries. What cannot be built is an error of one line, unless
it is switched off: CBLOSS_CPU=0, CBLOSS_CUDA=0; without either the wheel is one for any platform.
The CUDA kernels are built where there are nvcc and a PyTorch with CUDA (or, where no PyTorch is
seen, a GPU), and with CBLOSS_CUDA=1 wherever there is nvcc; TORCH_CUDA_ARCH_LIST chooses the GPUs,
as for PyTorch.

What is current is not built again: a stamp beside a library, never in a wheel, has digests of its
sources, of what compiled them and of itself. Times of files do not count: a copy changes them.
CBLOSS_KEEP=1 keeps what was built from these sources elsewhere, whatever compiled it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, LinkError

ROOT = Path(__file__).resolve().parent
PY_LIMITED_API = "0x030a0000"  # Python 3.10
OLDEST = {"GCC": 11, "Clang": 14}
X86 = sysconfig.get_platform().endswith(("x86_64", "amd64"))

# Compiled once each, as row kernels in a namespace of that name; chosen at load time.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# Before registers are chosen, so that two vectors' instructions alternate; Clang always does it.
AVX2 += ["-fschedule-insns", "-Wno-ignored-optimization-argument"]
AVX512 = [*AVX2, *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")]
AVX512 += [
    "-mprefer-vector-width=512",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]  # GCC's headers trip it
AVX512 += ["-Wno-unknown-warning-option"]  # which Clang does not know
ISA_FLAGS: dict[str, list[str]] = {"baseline": []}
if X86:  # whose baseline serves few processors: it takes half the time to compile
    ISA_FLAGS = {"avx512_bf16": [*AVX512, "-mavx512bf16"], "avx512": AVX512, "avx2": AVX2}
    ISA_FLAGS["baseline"] = ["-O1"]
FLAGS = [
    *("-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    # Nothing reads errno or floating-point traps; products and sums may fuse where FMA exists.
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    f"-DPy_LIMITED_API={PY_LIMITED_API}",
    f"-ffile-prefix-map={ROOT}=.",  # no path of this machine enters the library
]


def tell(text: str) -> None:
    print(f"cbloss_fused: {text}", file=sys.stderr, flush=True)


class BuildError(SystemExit):
    """Ends the build with one line."""

    def __init__(self, text: str) -> None:
        super().__init__(f"cbloss_fused: {' '.join(text.split())}")


# The compiler -------------------------------------------------------------------------------------


def compiler() -> str:
    """The C++ compiler: CXX, or the interpreter's if it is here, or another."""
    asked, configured = os.environ.get("CXX"), sysconfig.get_config_var("CXX") or "c++"
    if asked:
        return asked
    found = filter(shutil.which, (shlex.split(configured)[0], "g++", "clang++", "c++"))
    return next(found, configured)


PROBE = "#include <Python.h>\n#include <optional>\nstd::optional<int> probe;\n"


def check_compiler() -> None:
    """End the build if the compiler cannot be used."""
    command = [*shlex.split(compiler()), "-std=c++17", "-x", "c++", "-"]
    include = f"-I{sysconfig.get_path('include')}"
    needed = " or ".join(f"{name} >= {version}" for name, version in OLDEST.items())
    way_out = f"install {needed} and set CXX to it, or CBLOSS_CPU=0 for eager PyTorch alone"

    def run(*flags: str, text: str = "") -> str:
        done = subprocess.run([*command, *flags], input=text, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
        if "Python.h" in said:
            raise BuildError(
                f"Python's headers are missing ({include[2:]}/Python.h): install them (Debian: "
                "python3-dev, Fedora: python3-devel), or set CBLOSS_CPU=0 for eager PyTorch alone"
            )
        raise BuildError(f"the C++ compiler {compiler()!r} fails ({said.strip()}): {way_out}")

    try:
        macros = dict(re.findall(r"#define (__\w+) (\d+)", run("-dM", "-E")))
        run(include, "-fsyntax-only", text=PROBE)
    except OSError as error:
        raise BuildError(f"no C++ compiler {compiler()!r} ({error.strerror}): {way_out}") from None
    name = "Clang" if "__clang_major__" in macros else "GCC"
    macro = {"Clang": "__clang_major__", "GCC": "__GNUC__"}[name]
    if "__apple_build_version__" not in macros and int(macros.get(macro, 0)) < OLDEST[name]:
        raise BuildError(
            f"the C++ compiler {compiler()!r} is {name} {macros.get(macro)}: {way_out}"
        )


# Stand-ins for PyTorch's libraries ----------------------------------------------------------------

IN_CUDA = "aoti_torch_get_current_cuda_stream"


def stand_ins(folder: Path, *names: str) -> list[str]:
    """Make libraries of torch_abi.h's functions, named as PyTorch's; the flags to link them."""
    declared = re.findall(r"\b(\w+)\(", (ROOT / "csrc" / "torch_abi.h").read_text())
    functions = {name for name in declared if name.startswith(("aoti_torch_", "torch_"))}
    darwin = sys.platform == "darwin"
    for name in names:
        file = f"lib{name}.{'dylib' if darwin else 'so'}"
        kept = {f for f in functions if (f == IN_CUDA) == (name == "torch_cuda")}
        source = folder / f"{name}.cpp"
        source.write_text("".join(f'extern "C" void {each}() {{}}\n' for each in sorted(kept)))
        kind = ["-dynamiclib", f"-Wl,-install_name,@rpath/{file}"]
        kind = kind if darwin else ["-shared", f"-Wl,-soname,{file}"]
        command = [*shlex.split(compiler()), "-fPIC", *kind, str(source), "-o", str(folder / file)]
        subprocess.run(command, check=True)
    origin = "@loader_path" if darwin else "$ORIGIN"
    return [f"-L{folder}", *(f"-l{name}" for name in names), f"-Wl,-rpath,{origin}/../torch/lib"]


# What is current ----------------------------------------------------------------------------------

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


def version_of(tool: str) -> str:
    """Where a compiler is, and what it calls itself."""
    words = shlex.split(tool)
    told = subprocess.run([*words, "--version"], capture_output=True, text=True).stdout
    return f"{shutil.which(words[0])}: {told}"


def digest_of_tools(*flags: str) -> str:
    """Of the compiler, flags, and what the environment adds."""
    chosen = [f"{name}={os.environ.get(name, '')}" for name in ENVIRONMENT]
    configured = [str(sysconfig.get_config_var(name)) for name in ("CXX", "CFLAGS", "LDSHARED")]
    parts = [version_of(compiler()), sysconfig.get_platform(), *flags, *chosen, *configured]
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

ASKED = os.environ.get("CBLOSS_CUDA", "")  # "1", "0" or nothing
ARCHITECTURES = "8.0;9.0;10.0+PTX"
CUDA_DTYPES = ["float", "double", "__nv_bfloat16", "__half"]
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def find_torch() -> Path | None:
    """The folder of the environment's torch, even from pip's isolated build environment."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    for folder in (sysconfig.get_path("platlib"), sysconfig.get_path("purelib")):
        if (Path(folder) / "torch" / "lib").is_dir():
            return Path(folder) / "torch"
    return None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")


def missing_cuda() -> str | None:
    """Why the CUDA kernels are not built here, in one line; None if they are."""
    if ASKED == "0":
        return "switched off by CBLOSS_CUDA=0 at build time"
    if sys.platform != "linux":
        return f"not built for {sys.platform}"
    if find_nvcc() is None:
        return "no nvcc found at build time"
    if ASKED == "1":
        return None
    torch = find_torch()
    if torch is None:
        return None if gpus_here() else "no PyTorch and no GPU found at build time"
    if not (torch / "lib" / "libtorch_cuda.so").exists():
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
            raise BuildError(
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
    """Compile csrc/cuda, dispatch.cu once per dtype, and link."""
    nvcc = find_nvcc()
    assert nvcc is not None
    arch = architectures(nvcc)
    names = ", ".join(a.split("code=")[1].strip("[]").replace(",", " and ") for a in arch[1::2])
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: str, define: str, name: str) -> str:
        target = folder / f"{name}.o"
        command = [nvcc, *CUDA_FLAGS, *arch, define, "-c", str(ROOT / source), "-o", str(target)]
        subprocess.run(command, check=True)
        return str(target)

    jobs = [("csrc/cuda/dispatch.cu", f"-DCBLOSS_DTYPE={dtype}", dtype) for dtype in CUDA_DTYPES]
    jobs.append(("csrc/cuda/ops.cu", f'-DCBLOSS_ARCHITECTURES="{names}"', "ops"))
    objects = in_parallel("CUDA", jobs, compile_one)
    library.parent.mkdir(parents=True, exist_ok=True)
    torch = [
        each.removeprefix("-Wl,").replace("-rpath,", "-Xlinker=-rpath,")
        for each in stand_ins(folder, "torch_cpu", "torch_cuda")
    ]
    command = [nvcc, "-shared", "-cudart", "static", *objects, "-o", str(library)]
    subprocess.run([*command, "-Xlinker", "--no-as-needed", *torch], check=True)


# setuptools ---------------------------------------------------------------------------------------


def in_parallel(what: str, jobs: Sequence[tuple[str, ...]], run: Callable[..., str]) -> list[str]:
    """The results of run(*job), whose last word is a name, told as they come."""
    begun, done = time.monotonic(), 0

    def tell_when_done(job: tuple[str, ...]) -> str:
        nonlocal done
        result = run(*job)
        done += 1
        tell(f"{what} {done}/{len(jobs)}: {job[-1]}, {time.monotonic() - begun:.0f} s")
        return result

    cores = min(os.cpu_count() or 1, len(jobs))
    tell(f"compiling the {what} kernels, a minute or two of {cores} cores")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(tell_when_done, jobs))


class BuildPython(build_py):
    """What an earlier build has left never enters a wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "cbloss_fused", ignore_errors=True)
        super().run()


class BuildExtension(build_ext):
    """Libraries of names of their own, and a note of why there is none for CUDA."""

    no_cuda: str | None = None
    in_sources = False

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("_cuda"):  # not a module of Python
            return str(Path(*fullname.split("."))) + ".so"
        return super().get_ext_filename(fullname)

    def run(self) -> None:
        self.no_cuda = NO_CUDA
        self.in_sources = bool(self.inplace)  # which setuptools clears while it builds
        super().run()
        package = Path(self.get_ext_fullpath("cbloss_fused._C")).parent
        note = package / "_cuda_note.txt"
        note.unlink(missing_ok=True)
        if self.no_cuda is not None:
            if not KEEP or ASKED == "0":  # what is not current is not used
                for name in ("_cuda.so", "_cuda.stamp"):
                    (package / name).unlink(missing_ok=True)
            note.write_text(self.no_cuda + "\n")
            tell(f"without CUDA kernels: {self.no_cuda}")

    def build_extension(self, ext: Extension) -> None:
        """Into the package in place, else where it is found again but does not enter a wheel."""
        target, cuda = Path(self.get_ext_fullpath(ext.name)), ext.name.endswith("_cuda")
        in_sources = ROOT / "cbloss_fused"
        folder = in_sources if self.in_sources else Path(self.build_temp).resolve()
        library, tools = folder / target.name, cuda_tools if cuda else cpu_tools
        sources = digest_of_sources("cpu" if cuda else "cuda")
        stamp = Stamp(folder / f"{ext.name.split('.')[-1]}.stamp", library, sources)
        keep = KEEP and self.in_sources
        if self.force or not stamp.current(tools, keep):
            if not cuda:
                check_compiler()
            stamp.remove()
            library.unlink(missing_ok=True)  # what fails leaves nothing that looks current
            temporary = Path(self.build_temp).resolve() / ext.name
            temporary.mkdir(parents=True, exist_ok=True)
            try:
                build = build_cuda if cuda else self.build_cpu
                build(library, temporary)
            except (subprocess.CalledProcessError, CompileError, LinkError) as error:
                failed = f"the build of the {'CUDA' if cuda else 'CPU'} kernels failed ({error})"
                if cuda and ASKED != "1":  # Triton serves in their place
                    self.no_cuda = f"{failed}; CBLOSS_CUDA=1 makes that an error"
                    return
                raise BuildError(
                    f"{failed}; CBLOSS_{'CUDA' if cuda else 'CPU'}=0 leaves them out"
                ) from None
            stamp.write(tools())
        if library != target:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(library, target)

    def copy_extensions_to_source(self) -> None:
        """They were built there: a copy would overwrite what a process may have loaded."""

    def build_cpu(self, library: Path, folder: Path) -> None:
        words = compiler()
        if words != sysconfig.get_config_var("CXX"):
            darwin = sys.platform == "darwin"
            linked = "-bundle -undefined dynamic_lookup" if darwin else "-shared"
            flags, linker_flags = (os.environ.get(name, "") for name in ("CXXFLAGS", "LDFLAGS"))
            self.compiler.set_executables(
                compiler_cxx=words,
                compiler_so_cxx=f"{words} {flags}",
                linker_so_cxx=f"{words} {linked} {linker_flags}",
            )

        def compile_one(source: str, flags: str, name: str) -> str:
            (found,) = self.compiler.compile(
                [source],
                output_dir=str(folder / name),
                extra_postargs=[*FLAGS, *flags.split()],
                include_dirs=[sysconfig.get_path("include")],
            )
            return str(found)

        jobs = [
            (f"csrc/cpu/isa/{name}.cpp", " ".join(flags), name) for name, flags in ISA_FLAGS.items()
        ]
        jobs += [(source, "", Path(source).stem) for source in SOURCES]
        self.compiler.link_shared_object(
            in_parallel("CPU", jobs, compile_one),
            str(library),
            extra_postargs=stand_ins(folder, "torch_cpu"),
            target_lang="c++",
        )


SOURCES = ["csrc/module.cpp", *(f"csrc/cpu/{name}.cpp" for name in ("ops", "choose", "stats"))]
NO_CPU = os.environ.get("CBLOSS_CPU") == "0" or sys.platform not in ("linux", "darwin")
NO_CUDA = missing_cuda()
EXTENSIONS = [] if NO_CPU else [Extension("cbloss_fused._C", SOURCES, py_limited_api=True)]
EXTENSIONS += [] if NO_CUDA is not None else [Extension("cbloss_fused._cuda", ["csrc/cuda/ops.cu"])]


def readme() -> str:
    """README.md, its links to files whole, for readers elsewhere."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (repository,) = re.findall(r'^Repository = "(.*)"$', project, re.MULTILINE)

    def whole(link: re.Match[str]) -> str:
        kind = "raw" if link[1].startswith("!") else "blob"
        return f"{link[1]}({repository}/{kind}/main/{link[2]})"

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"(!?\[[^\]]*\])\((?!\w+:|#)([^)\s]+)\)", whole, text)


if __name__ == "__main__":
    setup(
        long_description=readme(),
        long_description_content_type="text/markdown",
        ext_modules=EXTENSIONS,
        cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if EXTENSIONS else {},
    )
