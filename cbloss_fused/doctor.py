"""What there is to know about an installation, and whether it computes what it should: `doctor`."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import __version__
from .backends import FOLDER, REGISTRY, backends, set_isa
from .self_test import Expected, all_cases, failures_of, routes

FEATURES = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX512_BF16"}  # of /proc/cpuinfo
ENVIRONMENT = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", "ATEN_CPU_CAPABILITY")
SHOWN = 5  # failures of a backend that are told in text


class Verdict(NamedTuple):
    """Of a backend on a device."""

    name: str
    checks: int
    failures: list[str]


def add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON document, with every failure")
    parser.set_defaults(run=run_doctor, parser=parser)


def run_doctor(options: argparse.Namespace) -> None:
    """Tell what is here, check it, and exit with status 1 if a check fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about drivers for example
        found = installation()
    say = silent if options.json else partial(print, flush=True)
    say("\n".join(as_lines(found)))
    verdicts, expected = [], Expected()
    for route in routes(all_cases()):
        say(f"self-test, {route.name}: ", end="")  # first: a kernel may crash
        verdict = Verdict(route.name, len(route.cases), failures_of(route, expected))
        say("\n".join(as_lines_of(verdict)))
        verdicts.append(verdict)
    failed = sum(len(verdict.failures) for verdict in verdicts)
    if options.json:
        checks = [verdict._asdict() for verdict in verdicts]
        print(json.dumps(found | {"self_test": checks, "passed": not failed}, indent=1))
    number = sum(verdict.checks for verdict in verdicts)
    say(f"{failed} of {number} checks failed" if failed else f"all {number} checks passed")
    if failed:
        sys.stdout.flush()
        raise SystemExit(1)


def silent(*_: object, **__: object) -> None:
    """In the place of print: a JSON document is all of the output."""


def installation() -> dict[str, Any]:
    """Versions, machine, kernels, GPUs, and what each device gets."""
    return {
        "versions": {"cbloss_fused": __version__, "python": platform.python_version()}
        | {name: version_of(name) for name in ("torch", "triton", "numpy")},
        "folder": str(FOLDER),
        "platform": platform.platform(),
        "cpu": cpu(),
        "threads": {"torch": torch.get_num_threads(), "cpus": os.cpu_count()},
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "kernels": {"cpu": cpu_kernels(), "cuda": cuda_kernels()},
        "gpus": gpus(),
        "backends": backends(),
    }


def version_of(name: str) -> str | None:
    """Of a package that is here; None: it is not."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return str(importlib.import_module(name).__version__)
    except Exception as error:  # whatever a broken package raises
        return f"cannot be imported: {error}"


def cpu() -> dict[str, Any]:
    """Its model, its features of FEATURES where /proc/cpuinfo tells them, and what PyTorch uses."""
    found: dict[str, Any] = {"model": platform.processor() or platform.machine(), "features": None}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    pairs = [line.partition(":") for line in reversed(lines)]  # each CPU's: the first's count
    told = {name.strip(): value.strip() for name, _, value in pairs}
    found["model"] = told.get("model name", found["model"])
    if "flags" in told:
        flags = told["flags"].split()
        found["features"] = [name for flag, name in FEATURES.items() if flag in flags]
    return found | {"torch": torch.backends.cpu.get_cpu_capability()}


def cpu_kernels() -> dict[str, Any]:
    """Where they are, their instruction sets that this machine has, best first, or why not."""
    missing = REGISTRY["cpu"].missing
    return {
        "file": _first("_*.abi3.so"),
        "missing": missing,
        "instruction_sets": [] if missing else set_isa(),
    }


def cuda_kernels() -> dict[str, Any]:
    missing = REGISTRY["cuda"].missing
    file = _first("_cuda.so")
    return {
        "file": file,
        "missing": missing,
        "about": None if missing else REGISTRY["cuda"].about(),
    }


def _first(*patterns: str) -> str | None:
    """A file of the package."""
    return next((str(file) for pattern in patterns for file in FOLDER.glob(pattern)), None)


def gpus() -> dict[str, Any]:
    """Those that PyTorch uses; those that NVIDIA's driver knows, with its version."""
    used = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(i)
            memory = f"{about.total_memory / 2**30:.0f} GiB"
            used.append(f"{about.name}, compute capability {about.major}.{about.minor}, {memory}")
    return {
        "torch": used,
        "torch_cuda": torch.version.cuda,
        "torch_hip": torch.version.hip,
        "driver": nvidia_driver(),
    }


def nvidia_driver() -> list[str]:
    """A line for each GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


# As text ------------------------------------------------------------------------------------------


def as_lines(found: dict[str, Any]) -> list[str]:
    """One line for each thing."""
    versions = ", ".join(
        f"{name} {version or 'not installed'}" for name, version in found["versions"].items()
    )
    features = found["cpu"]["features"]
    named = "features unknown" if features is None else ", ".join(features) or "none of AVX2 and on"
    environment = "".join(f", {name}={value}" for name, value in found["environment"].items())
    return [
        versions,
        f"installed in {found['folder']}",
        f"platform: {found['platform']}",
        f"CPU: {found['cpu']['model']}; {named}; PyTorch uses {found['cpu']['torch']}",
        f"threads: {found['threads']['torch']} of {found['threads']['cpus']} CPUs{environment}",
        f"CPU kernels: {_built(found['kernels']['cpu'], 'instruction_sets')}",
        f"CUDA kernels: {_built(found['kernels']['cuda'], 'about')}",
        f"GPUs: {_gpus(found['gpus'])}",
        *(f"device {device}: {text}" for device, text in found["backends"].items()),
    ]


def _built(kernels: dict[str, Any], what: str) -> str:
    if kernels["missing"] is not None:
        return f"none usable: {kernels['missing']}"
    made_for = kernels[what] if isinstance(kernels[what], str) else ", ".join(kernels[what])
    return f"{kernels['file']}: {made_for}"


def _gpus(found: dict[str, Any]) -> str:
    toolkit = found["torch_cuda"] or found["torch_hip"]
    of_torch = f"PyTorch with {'HIP' if found['torch_hip'] else 'CUDA'} {toolkit}"
    if toolkit is None:
        of_torch = "PyTorch without CUDA"
    used = "; ".join(found["torch"]) or "none that PyTorch can use"
    driver = f"; by the driver: {'; '.join(found['driver'])}" if found["driver"] else ""
    return f"{used} ({of_torch}){driver}"


def as_lines_of(verdict: Verdict) -> list[str]:
    """One line, and one for each of the first failures."""
    checks, failures = verdict.checks, verdict.failures
    if not failures:
        return [f"{checks} checks passed"]
    more = [f"  … and {len(failures) - SHOWN} more"] if len(failures) > SHOWN else []
    told = [f"  {failure}" for failure in failures[:SHOWN]]
    return [f"{len(failures)} of {checks} checks failed", *told, *more]
