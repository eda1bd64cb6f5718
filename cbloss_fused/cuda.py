"""The CUDA C++ kernels: a library of its own, there where the package was built with nvcc."""

from __future__ import annotations

from pathlib import Path

import torch

device: str | None = None  # whose tensors the kernels take, once they are loaded
missing: str | None = "not loaded"  # why they are not, in one line


def load() -> None:
    """Load the library if it can serve here; the operators' schemas must be defined."""
    global missing
    folder = Path(__file__).parent
    library = folder / "_cuda.so"
    note = folder / "_cuda_note.txt"
    if not library.exists():
        missing = note.read_text().strip() if note.exists() else "not built"
    elif torch.version.cuda is None:
        missing = "built, but this PyTorch has no CUDA"
    else:
        try:
            load_from(library, "cuda")
        except OSError as error:
            missing = f"the library cannot be loaded ({error}); reinstall cbloss_fused"


def load_from(library: Path, device_type: str) -> None:
    """Load a library whose kernels take tensors of a device type."""
    global device, missing
    torch.ops.load_library(library)
    missing = torch.ops.cbloss_fused._cuda_unusable() or None
    device = None if missing else device_type
