"""The tests of the kernels for CPUs under AddressSanitizer and UndefinedBehaviorSanitizer.

`python -m native.sanitize`, with this folder's parent in PYTHONPATH: `make sanitize`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from emulator.build import SANITIZERS

from cbloss_fused.backends import set_isa

from . import build
from .build import NAME, ROOT, link, objects_of, package

FLAGS = [*SANITIZERS, "-O1", "-g1", "-fno-omit-frame-pointer", "-w"]
FILES = ("kernels", "soft_targets", "layouts", "background", "finite", "guard_pages")
CHOSEN = "cpu or guard_pages"  # of the tests in them


def built(folder: Path) -> Path:
    """The folder, its extension compiled if it is not up to date."""
    library = package(folder) / NAME
    sources = [*(ROOT / "csrc").rglob("*"), Path(build.__file__), Path(__file__)]
    newest = max(path.stat().st_mtime for path in sources)
    if not library.exists() or library.stat().st_mtime < newest:
        objects = objects_of(ROOT / "csrc", folder / "objects", set_isa(), FLAGS)
        link(library, list(objects.values()), SANITIZERS)
    return folder


def runtimes() -> list[str]:
    """The sanitizers' libraries, which must be loaded before all others."""
    names = [f"-print-file-name=lib{kind}san.so" for kind in ("a", "ub")]
    found = [subprocess.run(["g++", name], capture_output=True, text=True).stdout for name in names]
    return [path.strip() for path in found]


def main() -> None:
    libraries = runtimes()
    if not all(Path(path).is_absolute() for path in libraries):
        sys.exit("g++ has no sanitizers here: nothing was checked")
    folder = built(ROOT / "build" / "sanitized")
    environment = {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's and PyTorch's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(folder),
    }
    loaded = "from cbloss_fused.backends import _extension; print(_extension().__file__)"
    place = ROOT / "tests"  # where Python and pytest do not see the package of this repository
    told = subprocess.run(
        [sys.executable, "-c", loaded], capture_output=True, text=True, cwd=place,
        env=os.environ | environment,
    )  # fmt: skip
    if told.stdout.strip() != str(folder / "cbloss_fused" / NAME):
        sys.exit(f"the sanitized extension is not what Python loads: {told.stdout}{told.stderr}")
    command = [sys.executable, "-m", "pytest", "-q", "-o", "pythonpath=", "-k", CHOSEN]
    command += [*sys.argv[1:], *(f"test_{name}.py" for name in FILES)]
    sys.exit(subprocess.run(command, cwd=place, env=os.environ | environment).returncode)


if __name__ == "__main__":
    main()
