"""Host time of a GPU call: `python -m bench.launch_cost`. Needs no GPU.

The tensors are on the CPU, so malloc replaces CUDA's allocator. Triton's launcher runs unchanged on
a libcuda whose launch does nothing (fake_cuda.c): the times lack the driver's launch and torch's
query of the current stream. The CUDA C++ operators are compiled for the host by tests/emulator:
their times lack the runtime's launch and the choice of the device, too.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cbloss_fused.backends import Backend

FOLDER = Path(__file__).parent


def main() -> None:
    """Build the fake libcuda and measure in a new process that finds it first."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"
        build = ["cc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o"]
        subprocess.run([*build, str(library), str(FOLDER / "fake_cuda.c")], check=True)
        (Path(folder) / "libcuda.so").symlink_to(library)
        found = {"TRITON_LIBCUDA_PATH": folder, "LD_LIBRARY_PATH": folder}
        code = f"from bench.launch_cost import measure; measure({str(library)!r})"
        run = subprocess.run([sys.executable, "-c", code], env=os.environ | found)
    sys.exit(run.returncode)


def emulated() -> Path | None:
    """The library of the CUDA C++ operators for the host; None without g++."""
    return runpy.run_path(str(FOLDER.parent / "tests" / "emulator" / "build.py"))["emulated"]()


def measure(path: str) -> None:
    from cbloss_fused.backends import REGISTRY

    counters = [fake_driver(path)]
    cases = calls(REGISTRY["triton"])
    library = emulated()
    if library is None:
        print("cuda: left out, g++ is missing")
    else:
        counters.append(idle(library))
        cases |= calls(REGISTRY["cuda"])
    for name, us in best(cases).items():
        before = sum(each.value for each in counters)
        cases[name]()
        launches = sum(each.value for each in counters) - before
        print(f"{name:50s}{launches:3d} launches {us:7.2f} us")


def fake_driver(path: str) -> ctypes.c_long:
    """Make Triton launch on the fake libcuda; return its counter of launches."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
    from triton.runtime import driver

    library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)

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
    return ctypes.c_long.in_dll(library, "launches")


def idle(path: Path) -> ctypes.c_long:
    """Load the CUDA C++ operators without real launches; return their counter of launches."""
    from cbloss_fused.backends import load_cuda

    load_cuda(path, "cpu")
    library = ctypes.CDLL(str(path))
    ctypes.c_int.in_dll(library, "emulated_idle").value = 1
    return ctypes.c_long.in_dll(library, "emulated_launches")


def calls(backend: Backend) -> dict[str, Callable[[], Any]]:
    """The calls of a backend that are timed, by name."""
    import torch

    from cbloss_fused.buffers import new_loss
    from cbloss_fused.inputs import Inputs
    from cbloss_fused.options import Formula, Options

    x, y = torch.randn(32, 8142, dtype=torch.bfloat16), torch.randint(0, 8142, (32,))
    w = torch.rand(8142)
    loss, rows, grad = torch.empty(()), torch.empty(32), torch.empty_like(x)
    numbers, operator = Formula.of(Options("sigmoid", 0.5)).numbers(), backend.loss
    scale_gradient = backend.scale_gradient
    assert scale_gradient is not None
    plain = (x, *Inputs(y), numbers, None, None)
    full = (x, *Inputs(y, w), numbers, -100, None)

    def allocated() -> None:
        operator(*full, 1, new_loss(x, y, 1), backend.new_grad(x), None)

    named: dict[str, Callable[[], Any]] = {
        "operator, reduction none": lambda: operator(*plain, 0, rows, grad, None),
        "operator, mean": lambda: operator(*plain, 1, loss, grad, None),
        "operator, mean, weight, ignore_index": lambda: operator(*full, 1, loss, grad, None),
        "the same with new buffers": allocated,
        "scaling of a stored gradient": lambda: scale_gradient(grad, loss, grad.numel()),
        "for comparison: torch.empty_like(x)": lambda: torch.empty_like(x),
    }
    return {f"{backend.name}: {name}": call for name, call in named.items()}


def best(
    cases: dict[str, Callable[[], Any]], count: int = 1000, turns: int = 20
) -> dict[str, float]:
    """Microseconds per call, the best of some turns: a busy machine slows down all of a turn."""
    found = dict.fromkeys(cases, float("inf"))
    for _ in range(turns):
        for name, call in cases.items():
            start = time.perf_counter()
            for _ in range(count):
                call()
            found[name] = min(found[name], (time.perf_counter() - start) / count * 1e6)
    return found


if __name__ == "__main__":
    main()
