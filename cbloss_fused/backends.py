"""The implementations of the operators, one record each, and which of them a call takes.

Triton on another device: its type in the record here, its properties in triton/launch.py.
"""

from __future__ import annotations

import ctypes
import importlib
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops, triton
from .buffers import co_aligned

FOLDER = Path(__file__).parent
REINSTALL = (
    "reinstall cbloss_fused (pip install --force-reinstall --no-deps --no-cache-dir cbloss_fused, "
    "or uv pip install --reinstall-package cbloss_fused cbloss_fused)"
)


class Backend(NamedTuple):
    """What there is to know about one implementation of the operators of ops.py."""

    name: str
    devices: tuple[str, ...]  # types of the devices whose tensors it takes
    missing: str | None  # why it cannot be used here, in one line
    about: Callable[[], str]  # what it is, for `backends`
    loss: Any  # its overloads of the operators
    gradient: Any
    soft: bool = True  # takes soft targets and class_weighting="class"
    on_request: tuple[str, ...] = ()  # device types that it takes only if asked for
    hint: str = ""  # appended to the error about another device: how to have it taken
    new_grad: Callable[[Tensor], Tensor] = torch.empty_like
    loss_and_stats: Any = None  # the operator; None: statistics by PyTorch's operators
    scale_gradient: Callable[[Tensor, Tensor, int], None] | None = None  # grad *= factor, in place
    register_default: Callable[[str], None] | None = None  # as the operators of a device type


REGISTRY: dict[str, Backend] = {}  # those before others in it are preferred


def choose(device_type: str, requested: str | None, soft: bool) -> Backend:
    """The backend for tensors on a device type.

    requested: the option `backend`; None: the first that takes them. soft: soft targets, or
    class_weighting="class". A backend without kernels for these leaves them to those after it.

    Raises:
        ValueError: the backend that was asked for cannot be used here, or not with such tensors.
    """
    candidates: Iterable[Backend] = REGISTRY.values()
    if requested is not None:
        asked = REGISTRY[requested]
        _check_usable(asked, device_type)
        if asked.soft or not soft:
            return asked
        names = list(REGISTRY)
        candidates = [REGISTRY[name] for name in names[names.index(requested) + 1 :]]
    for backend in candidates:
        usable = backend.missing is None and device_type in backend.devices
        if usable and (backend.soft or not soft):
            return backend
    return REGISTRY["reference"]


def _check_usable(asked: Backend, device_type: str) -> None:
    if asked.missing is not None:
        raise ValueError(f"backend={asked.name!r} cannot be used here: {asked.missing}")
    if asked.name != "reference" and device_type not in asked.devices + asked.on_request:
        needed = " or ".join(map(str.upper, asked.devices))
        raise ValueError(
            f"backend={asked.name!r} needs {needed} tensors, got {device_type}{asked.hint}"
        )


# The CPU's kernels, in the extension module _C


def _extension() -> Any:
    """_C, or, in a package of a hub, what its builder has called it."""
    found = [path.name.split(".")[0] for path in FOLDER.glob("_*.abi3.so")]
    return importlib.import_module(f".{min(found, default='_C')}", __package__)


def _cpu() -> Backend:
    missing = None
    try:
        _extension().register(ops.NAMESPACE)
    except (ImportError, AttributeError) as error:  # of another version
        built = any(FOLDER.glob("_*.abi3.so"))
        why = f"cannot be loaded ({error})" if built else "was not built"
        missing = f"the compiled extension {why}; {REINSTALL}"

    def about() -> str:
        return f"fused C++ kernels, {set_isa()[0]} code chosen for this {platform.machine()}"

    stats = None if missing else ops.operators._loss_and_stats.default
    loss, gradient = ops.overloads("default")
    return Backend("cpu", ("cpu",), missing, about, loss, gradient, loss_and_stats=stats)


def set_isa(name: str = "") -> list[str]:
    """Switch the CPU's kernels to an instruction set, for tests; "" changes nothing.

    Returns:
        Those that this machine has, best first.

    Raises:
        ValueError: it does not have that one.
    """
    return _extension().set_isa(name).split()


# CUDA C++: a library of its own, there where the package was built with nvcc. On an H200 it takes
# 0.4 to 0.95 of the time of Triton (1.1 to 1.4 where a few rows have very many classes), and
# nothing is compiled at the first call: bench/results/nvidia-h200-2026-11-27.md.


def _cuda() -> Backend:
    # Of a PyTorch for AMD GPUs, whose device type is "cuda" too, version.cuda is None.
    library, note = FOLDER / "_cuda.so", FOLDER / "_cuda_note.txt"
    if not library.exists():
        return _without_cuda(note.read_text().strip() if note.exists() else "not built")
    if torch.version.cuda is None:
        return _without_cuda("built, but this PyTorch has no CUDA")
    try:
        loaded = ctypes.CDLL(str(library))
        return _cuda_record(loaded, "cuda")._replace(missing=too_old_driver(loaded))
    except (OSError, AttributeError) as error:  # of another version
        return _without_cuda(f"the library cannot be loaded ({error}); {REINSTALL}")


def _without_cuda(missing: str) -> Backend:
    return Backend("cuda", ("cuda",), missing, str, *ops.overloads("cuda"), soft=False)


def _cuda_record(library: ctypes.CDLL, device_type: str) -> Backend:
    """Of csrc/cuda/ops.cu, its kernels registered."""
    names = ops.NAMESPACE.encode(), device_type.upper().encode()
    if not library.cbloss_register(*names):
        return _without_cuda(f"PyTorch does not take the library's kernels; {REINSTALL}")
    library.cbloss_architectures.restype = ctypes.c_char_p

    def about() -> str:
        return f"fused CUDA C++ kernels, built for {library.cbloss_architectures().decode()}"

    loss, gradient = ops.overloads("cuda")
    return Backend(
        "cuda", (device_type,), None, about, loss, gradient, soft=False, new_grad=co_aligned,
        scale_gradient=ops.operators._scale.default,
        register_default=lambda device: library.cbloss_register_default(*names),
    )  # fmt: skip


def too_old_driver(library: ctypes.CDLL) -> str | None:
    """Why NVIDIA's driver cannot run what the library holds."""
    needed, driver = library.cbloss_built_with() // 1000, _driver()
    if driver // 1000 >= needed:  # any minor version of it is enough
        return None
    found = f"{driver // 1000}.{driver % 1000 // 10}"
    return f"built with CUDA {needed}, but the driver supports only CUDA {found}"


def _driver() -> int:
    """The newest CUDA that NVIDIA's driver supports, 1000 * major + 10 * minor; 0: no driver.

    Asked of the driver's library itself: the runtime's cudaDriverGetVersion initialises the driver,
    after which a forked process cannot use it, and CUDA_VISIBLE_DEVICES comes too late.
    """
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0
    return version.value


def load_cuda(library: Path, device_type: str) -> None:
    """Load a library of the CUDA kernels whose kernels take tensors of another device type."""
    REGISTRY["cuda"] = _cuda_record(ctypes.CDLL(str(library)), device_type)


# Triton


def _triton_loss(*arguments: Any) -> None:
    if not triton.load().loss(*arguments):
        ops.eager_loss(*arguments)


def _triton_gradient(*arguments: Any) -> None:
    if not triton.load().gradient(*arguments):
        ops.eager_gradient(*arguments)


def _triton_scale_gradient(grad: Tensor, factor: Tensor, numel: int) -> None:
    triton.load().scale_gradient(grad, factor, numel)


def _register_triton(device_type: str) -> None:
    ops.library.impl("loss", _triton_loss, device_type.upper())
    ops.library.impl("gradient", _triton_gradient, device_type.upper())


def _triton() -> Backend:
    if triton.available:
        ops.library.impl("loss.triton", _triton_loss, "CompositeExplicitAutograd")
        ops.library.impl("gradient.triton", _triton_gradient, "CompositeExplicitAutograd")
    loss, gradient = ops.overloads("triton")
    return Backend(
        "triton", ("cuda",), None if triton.available else "Triton is not installed",
        lambda: "fused Triton kernels, compiled at the first call", loss, gradient,
        on_request=("cpu",) if triton.interpreted() else (),
        hint="; CPU tensors only under Triton's interpreter: TRITON_INTERPRET=1 in the environment",
        new_grad=co_aligned,
        scale_gradient=_triton_scale_gradient, register_default=_register_triton,
    )  # fmt: skip


def _reference() -> Backend:
    loss, gradient = ops.overloads("reference")
    return Backend("reference", (), None, lambda: "eager PyTorch", loss, gradient)


def _register() -> None:
    for backend in (_cpu(), _cuda(), _triton(), _reference()):
        REGISTRY[backend.name] = backend
    registered = {"cpu"}  # by the extension module itself
    for backend in REGISTRY.values():
        for device_type in backend.devices:
            if (
                backend.missing is None
                and backend.register_default
                and device_type not in registered
            ):
                registered.add(device_type)
                backend.register_default(device_type)
    for device_type in _device_types():
        found = [b for b in REGISTRY.values() if device_type in b.devices]
        if all(b.missing for b in found):
            ops.why_eager[device_type] = _why_none(found)


def backends() -> dict[str, str]:
    """What each device type gets here, and why.

    Returns:
        One line each for "cpu", "cuda" (AMD GPUs too) and every other device: the kernels, the
        instruction set or the architectures they were built for, and why others are missing.

    >>> sorted(backends())
    ['cpu', 'cuda', 'other']
    """
    found = {device_type: _about(device_type) for device_type in _device_types()}
    if not torch.cuda.is_available():
        found["cuda"] += "; no GPU here"
    return found | {"other": "reference: no kernels for other devices"}


def _device_types() -> list[str]:
    """Those that a backend has kernels for."""
    return list(dict.fromkeys(d for backend in REGISTRY.values() for d in backend.devices))


def _why_none(known: list[Backend]) -> str:
    if len(known) == 1:
        return f"{known[0].missing}"
    return "; ".join(f"no backend={b.name!r}: {b.missing}" for b in known)


def _about(device_type: str) -> str:
    known = [b for b in REGISTRY.values() if device_type in b.devices]
    usable = [b for b in known if b.missing is None]
    texts = [b.about() if b in usable[:1] else f"{b.about()} by backend={b.name!r}" for b in usable]
    if not usable:
        return f"reference: {_why_none(known)}"
    if not usable[0].soft:
        texts.append(
            "soft targets and class_weighting='class' by backend="
            f"{choose(device_type, None, soft=True).name!r}"
        )
    texts += [f"backend={b.name!r} cannot be used: {b.missing}" for b in known if b.missing]
    return "; ".join(texts)


_register()
