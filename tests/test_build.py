"""What setup.py builds, and what it says when it cannot; the package under other names."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from support.backends import INTERPRETED

import setup
from cbloss_fused.backends import REGISTRY, _cuda

ROOT = Path(__file__).parent.parent
SOURCES = ("csrc", "cbloss_fused", "setup.py", "pyproject.toml", "README.md", "LICENSE")
COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="has nothing to do with Triton")


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
@pytest.mark.parametrize("changed", (False, True), ids=("as they are", "one changed"))
def test_the_declarations_are_pytorchs(tmp_path, changed):
    """Of C functions two declarations that differ do not compile."""
    ours = (ROOT / "csrc" / "torch_abi.h").read_text()
    if changed:
        ours = ours.replace(
            "get_dim(AtenTensorHandle tensor, int64_t*", "get_dim(int64_t, int64_t*"
        )
    headers = ("inductor/aoti_torch/c/shim.h", "stable/c/shim.h")
    lines = ["#define USE_CUDA", *(f"#include <torch/csrc/{each}>" for each in headers), ours]
    include = Path(torch.__file__).parent / "include"
    done = subprocess.run(
        [COMPILER or "g++", "-std=c++17", "-fsyntax-only", f"-isystem{include}",
         "-DTORCH_TARGET_VERSION=0x020b000000000000", "-x", "c++", "-"],
        input="\n".join(lines), capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode != 0) == changed, done.stderr
    assert changed == ("conflicting declaration" in done.stderr)


def test_the_stand_ins_have_every_declared_function(tmp_path):
    declared = set(
        re.findall(r"\b(?:aoti_)?torch_\w+(?=\()", (ROOT / "csrc/torch_abi.h").read_text())
    )
    setup.stand_ins(tmp_path, "torch_cpu", "torch_cuda")
    found = [set(re.findall(r"\w+(?=\(\))", path.read_text())) for path in tmp_path.glob("*.cpp")]
    assert set.union(*found) == declared
    assert not set.intersection(*found)
    assert {setup.IN_CUDA} in found


# Errors -------------------------------------------------------------------------------------------


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--force"]
    command += ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"CBLOSS_CUDA": "0"} | environment,
    )  # fmt: skip


def compiler(folder: Path, text: str) -> str:
    path = folder / "c++"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


OLD = "echo '#define __GNUC__ 8'"
HEADERS = (
    "case $* in *-dM*) echo '#define __GNUC__ 12';; "
    "*) echo 'x.cpp:1: fatal error: Python.h: No such file or directory' >&2; exit 1;; esac"
)


@pytest.mark.parametrize(
    "text, told",
    [
        (None, r"no C\+\+ compiler '.*' \(No such file or directory\): install GCC >= \d+"),
        (
            "echo 'c++: error: out of luck' >&2; exit 3",
            r"'.*' fails \(c\+\+: error: out of luck\): ",
        ),
        (OLD, r"'.*' is GCC 8: install GCC >= \d+ or Clang >= \d+ and set CXX to it"),
        (HEADERS, r"Python's headers are missing \(/.*/Python\.h\): install them .*python3-dev"),
    ],
    ids=("none", "broken", "old", "no headers"),
)
def test_a_compiler_that_cannot_be_used(tmp_path, text, told):
    done = build(tmp_path, CXX=str(tmp_path / "none") if text is None else compiler(tmp_path, text))
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert re.match(f"cbloss_fused: .*{told}", line), line
    assert "CBLOSS_CPU=0 for eager PyTorch alone" in line
    assert not list(tmp_path.rglob("*.so"))


def test_code_that_does_not_compile(tmp_path):
    """The compiler's own words, then one line."""
    text = f'case $* in *-c*) echo "$0: error: no" >&2; exit 1;; *) exec {COMPILER} "$@";; esac'
    done = build(tmp_path, CXX=compiler(tmp_path, text))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(r"cbloss_fused: the build of the CPU kernels failed \(.*\); CBLOSS_CPU=0", last)
    assert not list(tmp_path.rglob("*.so"))


# What is current ----------------------------------------------------------------------------------

FAKE = """case $* in *-dM*) echo '#define __GNUC__ 12'; exit;; --version) exit;; esac
echo >> "{log}"; for word; do [ "$last" != -o ] || echo a library > "$word"; last=$word; done"""


@pytest.mark.parametrize("keep", ("0", "1"))
def test_what_is_current_is_not_built_again(tmp_path, keep):
    """In place, wherever the temporary files go: pip's editable installation has its own."""
    folder = copied(tmp_path)
    fake = compiler(tmp_path, FAKE.format(log=tmp_path / "calls"))

    def calls(temporary: str, **environment: str) -> int:
        (tmp_path / "calls").write_text("")
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "-t", temporary]
        settings = {"CXX": fake, "CBLOSS_CUDA": "0", "CBLOSS_KEEP": keep} | environment
        subprocess.run(command, cwd=folder, check=True, env=os.environ | settings)
        return len((tmp_path / "calls").read_text())

    assert calls("one") > 5
    assert (folder / "cbloss_fused" / "_C.stamp").exists()
    assert calls("two") == 0
    assert (calls("two", CXXFLAGS="-g") == 0) == (keep == "1")
    with (folder / "csrc" / "call.h").open("a") as file:
        file.write("// changed\n")
    assert calls("two") > 5


# Wheels -------------------------------------------------------------------------------------------


def copied(folder: Path) -> Path:
    """The sources alone, as in an archive of them."""
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            leave = shutil.ignore_patterns("__pycache__", "*.so", "*.stamp", "_*_note.txt")
            shutil.copytree(source, folder / name, ignore=leave)
        else:
            shutil.copy(source, folder)
    return folder


def test_a_wheel_without_kernels_is_one_for_any_platform(tmp_path):
    """What earlier builds left behind, here or of another version, is in no wheel."""
    folder = copied(tmp_path)
    stale = [folder / "cbloss_fused", folder / "build" / "lib" / "cbloss_fused"]
    for each in stale:
        each.mkdir(parents=True, exist_ok=True)
        for name in ("_C.abi3.so", "_cuda.so", "_C.stamp", "_cuda_note.txt"):
            (each / name).write_text("stale")
    (stale[1] / "removed.py").write_text("stale")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel"], cwd=folder, check=True,
        capture_output=True, env=os.environ | {"CBLOSS_CPU": "0", "CBLOSS_CUDA": "0"},
    )  # fmt: skip
    (wheel,) = (folder / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "cbloss_fused/__init__.py" in names
    assert "cbloss_fused/experiments/paper_error_rates.csv" in names
    kinds = (".so", ".stamp", "_note.txt", "removed.py")
    assert not [name for name in names if name.endswith(kinds)]


@pytest.mark.parametrize("keep", ("0", "1"))
def test_a_library_that_is_not_built_now_is_not_used(tmp_path, keep):
    """In place; CBLOSS_KEEP=1: it was carried here, to where there is no nvcc."""
    folder = copied(tmp_path)
    library = folder / "cbloss_fused" / "_cuda.so"
    library.write_text("of an earlier build")
    environment = {"CBLOSS_CPU": "0", "CBLOSS_CUDA": "", "CBLOSS_KEEP": keep, "CUDA_HOME": ""}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=folder,
        capture_output=True, text=True,
        env=os.environ | environment | {"CUDA_PATH": "", "PATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert library.exists() == (keep == "1")
    assert "no nvcc found" in (library.parent / "_cuda_note.txt").read_text()


def test_the_archive_of_sources_is_complete(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    kept = {name for name in listed.stdout.split() if (ROOT / name).exists()}
    command = [sys.executable, "setup.py", "-q", "sdist", "--formats=tar", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.iterdir()
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    left = {name for name in kept - names if not name.startswith(".")}
    assert not left
    assert not [name for name in names if name.endswith((".so", ".stamp", ".pyc"))]


def test_links_of_the_readme_are_whole_elsewhere():
    links = re.findall(r"\]\(([^)]+)\)", setup.readme())
    assert len(links) > 10
    for link in links:
        assert re.match(r"https://|#", link), link
    here = re.findall(r"\]\((?!\w+:|#)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    for link in here:
        assert any(each.split("#")[0].endswith(f"/main/{link}") for each in links), link


# Other names --------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.skipif(REGISTRY["cpu"].missing is not None, reason="no library")
def test_the_layout_of_a_hub(tmp_path):
    """The list of the build is complete; the hub's loader finds the package and its kernels."""
    subprocess.run([sys.executable, "tools/hub.py", str(tmp_path / "hub")], cwd=ROOT, check=True)
    listed = re.findall(r'"(csrc/[^"]+)"', (tmp_path / "hub" / "build.toml").read_text())
    assert len(listed) == len(set(listed))
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert set(listed) == {name for name in sources if not name.startswith("csrc/cuda")}
    (variant,) = (tmp_path / "hub" / "build").iterdir()
    metadata = json.loads((variant / "metadata.json").read_text())
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", HUB, metadata["id"], str(variant / "__init__.py")],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "fused C++ kernels" in done.stdout


HUB = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location(*sys.argv[1:])
sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[spec.name])
print(sys.modules[spec.name].backends()["cpu"])
"""


TWICE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import cbloss_fused, one, two.inner as two
x, y = torch.randn(5, 7), torch.arange(5)
losses = []
for package in (cbloss_fused, one, two):
    loss_fn = package.ClassBalancedLoss([5, 4, 3, 2, 1, 1, 1], activation="sigmoid", gamma=0.5)
    z = x.clone().requires_grad_()
    loss_fn(z, y).backward()
    head = package.LinearClassBalancedLoss(7, [5, 4, 3], bias=False)
    head(x, torch.tensor([0, 1, 2, 0, 1])).backward()
    losses.append(z.grad)
    assert sys.modules[package.__name__ + "._C"].__file__.startswith(package.__path__[0])
    print(package.backends()["cpu"])
assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])
assert torch.ops.one.loss is not torch.ops.cbloss_fused.loss
assert torch._C._dispatch_has_kernel_for_dispatch_key("two_inner::loss", "CPU")
"""


@pytest.mark.skipif(REGISTRY["cpu"].missing is not None, reason="no library")
def test_two_copies_of_the_package_live_beside_each_other(tmp_path):
    """As packages of a hub are loaded, whose names tell their versions apart."""
    (tmp_path / "two").mkdir()
    for name in ("one", "two/inner"):
        shutil.copytree(ROOT / "cbloss_fused", tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", TWICE, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fused C++ kernels") == 3


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
def test_a_cuda_library_of_another_version_is_told_not_raised(tmp_path, monkeypatch):
    library = tmp_path / "_cuda.so"
    command = [COMPILER or "g++", "-shared", "-x", "c++", "-", "-o", str(library)]
    subprocess.run(command, input="", text=True, check=True)
    monkeypatch.setitem(_cuda.__globals__, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    missing = _cuda().missing
    assert missing is not None
    assert re.match(r"the library cannot be loaded \(.*cbloss_register\); reinstall", missing)
