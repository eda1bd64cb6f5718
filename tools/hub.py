"""Lay out the package as a kernel of a hub: `python tools/hub.py FOLDER`, after a build in place.

For huggingface/kernels: kernels.get_local_kernel loads the folder, kernel-builder builds from it.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "cbloss_fused"
VARIANT = f"torch-stable-abi211-cpu-{platform.machine()}-{sys.platform}"
LEAVE = shutil.ignore_patterns("__pycache__", "*.stamp", "_cuda*")


def main(folder: Path) -> None:
    """Sources, and the build of this machine."""
    if not any(PACKAGE.glob("_C.*so")):
        raise SystemExit("there are no compiled kernels in cbloss_fused: run make first")
    shutil.rmtree(folder, ignore_errors=True)
    sources = folder / "torch-ext" / "cbloss_fused"
    shutil.copytree(PACKAGE, sources, ignore=lambda *given: LEAVE(*given) | {"_C.abi3.so"})
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copy(ROOT / "build.toml", folder)
    variant = folder / "build" / VARIANT
    shutil.copytree(PACKAGE, variant, ignore=LEAVE)
    (variant / "metadata.json").write_text(json.dumps(metadata(), indent=2) + "\n")


def metadata() -> dict[str, object]:
    """What the hub's loader reads; the id, the module's name, tells versions apart."""
    library = next(PACKAGE.glob("_C.*so")).read_bytes()
    (version,) = re.findall(r"^version = (\d+)$", (ROOT / "build.toml").read_text(), re.MULTILINE)
    return {
        "id": f"_cbloss_fused_cpu_{hashlib.sha256(library).hexdigest()[:12]}",
        "name": "cbloss-fused",
        "version": int(version),
        "license": "MIT",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
