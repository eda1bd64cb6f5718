"""Host time of a GPU call, without a GPU: `python -m bench.launch_cost`.

Triton's launcher runs unchanged on a libcuda whose launch does nothing (fakecuda.c), over CPU
tensors: the driver's launch, the CUDA allocator and torch's look at the current stream are missing.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def main() -> None:
    """Build the library, then start over in a process that finds it first."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"
        build = ["cc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o"]
        subprocess.run([*build, str(library), str(HERE / "fakecuda.c")], check=True)
        (Path(folder) / "libcuda.so").symlink_to(library)
        found = {"TRITON_LIBCUDA_PATH": folder, "LD_LIBRARY_PATH": folder}
        code = f"from bench.launch_cost import measure; measure({str(library)!r})"
        run = subprocess.run([sys.executable, "-c", code], env=os.environ | found)
    sys.exit(run.returncode)


def measure(path: str) -> None:
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
    from triton.runtime import driver

    from cbloss_fused import kernels, ops

    library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    launches = ctypes.c_long.in_dll(library, "launches")

    class Fake(CudaDriver):
        def __init__(self) -> None:
            self.utils: Any = CudaUtils()
            self.launcher_cls: Any = CudaLauncher
            self.get_device_capability = lambda device=None: (9, 0)
            self.get_current_stream = lambda device: 0
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    driver.set_active(Fake())
    x, y = torch.randn(32, 8142, dtype=torch.bfloat16), torch.randint(0, 8142, (32,))
    w = torch.rand(8142)
    loss, rows, grad = torch.empty(()), torch.empty(32), torch.empty_like(x)
    formula = (True, 0.5, 0.0)
    plain = (x, y, None, None, None, *formula, None)
    cases: dict[str, Callable[[], Any]] = {
        "operator, one kernel (reduction none)": lambda: ops.losses["triton"](
            *plain, 0, rows, grad, None
        ),
        "operator, two (mean)": lambda: ops.losses["triton"](*plain, 1, loss, grad, None),
        "operator, three (mean, weight, ignore_index)": lambda: ops.losses["triton"](
            x, y, w, None, None, *formula, -100, 1, loss, grad, None
        ),
        "scaling of a stored gradient": lambda: kernels.load().scale_gradient(
            grad, loss, grad.numel()
        ),
        "for scale: torch.empty_like(x)": lambda: torch.empty_like(x),
    }
    for name, call in cases.items():
        call()
        before = launches.value
        call()
        count = launches.value - before
        print(f"{name:50s}{count:3d} launches {_best(call):7.2f} us")


def _best(call: Callable[[], Any], calls: int = 2000, turns: int = 9) -> float:
    """Microseconds of a call, the best of some turns."""
    best = float("inf")
    for _ in range(turns):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls * 1e6)
    return best


if __name__ == "__main__":
    main()
