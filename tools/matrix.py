"""The tests with other versions of Python, PyTorch, Triton and NumPy: `make matrix`.

Each in an environment of its own in build/matrix, which downloads gigabytes, with the kernels that
were built here: one library serves every version. Writes bench/results/versions.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "matrix"
KERNEL_TESTS = "@bench/gpu_tests.txt"
COLUMNS = ("Python", "torch", "triton", "NumPy", "tests on the CPU", "Triton interpreted")
NOTE = """
Of each run what passed, failed and was skipped. Warnings are errors, so nothing that these versions
deprecate is used. Rows are renewed one by one (--only): they may be of different commits.
Skipped is what another run has (kernels of an instruction set that the CPU lacks, Triton that is
not interpreted) or what an environment lacks."""


class Versions(NamedTuple):
    python: str
    torch: str
    triton: str
    numpy: str  # a requirement

    @property
    def folder(self) -> Path:
        return FOLDER / f"python{self.python}-torch{self.torch}"

    @property
    def command(self) -> str:
        return str(self.folder / "bin" / "python")


MATRIX = (
    Versions("3.10", "2.11.0", "3.6.0", "numpy==1.26.4"),
    Versions("3.11", "2.13.0", "3.7.1", "numpy==2.4.6"),
    Versions("3.12", "2.14.1", "3.8.0", "numpy>=2"),
    Versions("3.13", "2.15.0", "3.9.0", "numpy>=2"),
)


def interpreter(version: str) -> str | None:
    """From PATH, or of pyenv."""
    installed = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = sorted(installed.glob(f"{version}.*/bin/python{version}"))
    return str(found[-1]) if found else shutil.which(f"python{version}")


def packages(extra: str) -> list[str]:
    text = (ROOT / "pyproject.toml").read_text()
    line = re.search(rf"^{extra} = \[(.*)\]$", text, re.MULTILINE)
    assert line is not None
    return [name for name in re.findall(r'"(.+?)"', line[1]) if not name.startswith("triton")]


def install(versions: Versions, python: str) -> None:
    done = versions.folder / "ready"
    if done.exists():
        return
    subprocess.run([python, "-m", "venv", versions.folder], check=True)
    wanted = [f"torch=={versions.torch}", f"triton=={versions.triton}", versions.numpy]
    pip = [versions.command, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, *wanted, *packages("test"), "setuptools>=77", "wheel"], check=True)
    done.touch()


def tests(versions: Versions, interpreted: bool) -> tuple[str, str]:
    """The last line of pytest in short, and the names of what failed."""
    command = [versions.command, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if interpreted:
        command += [KERNEL_TESTS]
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]]
    counts = re.findall(r"\d+ (?:passed|failed|errors?|skipped)", lines[-1])
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    (versions.folder / f"tests{'-interpreted' * interpreted}.log").write_text(done.stdout)
    return ", ".join(counts) or lines[-1], "\n".join(failed)


def installed(versions: Versions) -> list[str]:
    code = (
        "import importlib.metadata as m, platform; "
        "print(platform.python_version(), *map(m.version, ('torch', 'triton', 'numpy')))"
    )
    command = [versions.command, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def row(versions: Versions) -> list[str]:
    """Of the table; kept in the environment's folder, beside what pytest has said."""
    python = interpreter(versions.python)
    if python is None:
        return [*versions[:3], "", "no such Python here", ""]
    install(versions, python)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(tests, [versions] * 2, (False, True)))
    for _, failed in results:
        if failed:
            print(failed, file=sys.stderr, flush=True)
    found = [*installed(versions), *(counts for counts, _ in results)]
    (versions.folder / "row.json").write_text(json.dumps(found))
    return found


def kept(versions: Versions) -> list[str]:
    path = versions.folder / "row.json"
    return json.loads(path.read_text()) if path.exists() else [*versions[:3], "", "not run", ""]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a version of Python; others as they were")
    arguments = parser.parse_args()
    table = []
    for versions in MATRIX:
        chosen = versions.python.startswith(arguments.only)
        table.append(row(versions) if chosen else kept(versions))
        print(" | ".join(table[-1]), flush=True)
    from bench.cpu import environment

    facts = environment("make matrix")
    text = ["# Versions", ""]
    text += [f"- {name}: {facts[name]}" for name in ("date", "command", "cpu", "cbloss_fused")]
    text += ["", *(f"| {' | '.join(line)} |" for line in (COLUMNS, ["---"] * len(COLUMNS), *table))]
    (ROOT / "bench" / "results" / "versions.md").write_text("\n".join([*text, NOTE, ""]))
    return int(any(word in cell for line in table for cell in line for word in ("failed", "error")))


if __name__ == "__main__":
    sys.exit(main())
