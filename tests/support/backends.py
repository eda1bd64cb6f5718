"""The implementations that tests run on, as the machine and TRITON_INTERPRET=1 have them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from emulator.build import emulated
from torch import Tensor

from cbloss_fused import class_balanced_loss, cuda, kernels, ops
from cbloss_fused.call import Inputs, formula

from .marks import IGNORED, REDUCTIONS

INTERPRETED = kernels.available and os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


@dataclass(frozen=True)
class Backend:
    """What a test needs to know about an implementation of the two operators."""

    argument: str | None  # of class_balanced_loss(backend=...)
    isa: str = ""  # an instruction set of the C++ kernels
    fallback: bool = False  # the operators' Python implementation instead of the kernels

    @property
    def gpu(self) -> bool:
        """Takes values as given, whether it runs on a GPU, interpreted or emulated."""
        return self.argument in ("triton", "cuda")

    def same(self, a: Tensor, b: Tensor) -> bool:
        """Equal whatever layout and threads; others' sums depend on where a row begins and ends."""
        half = a.element_size() == 2
        rtol, atol = (0, 0)
        if self.fallback or self.gpu:
            rtol, atol = (1e-2 if half else 1e-3, 1e-6)
        return torch.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops, "_warned", True)
            if self.fallback:
                patch.setattr(ops, "loss", ops._loss)
                patch.setattr(ops, "gradient", ops._gradient)
                patch.setattr(ops, "loss_and_stats", None)
                patch.setitem(ops.losses, None, ops._loss)
                patch.setitem(ops.gradients, None, ops._gradient)
            if self.gpu:
                patch.setattr(ops, "loss", ops.losses[self.argument])
                patch.setattr(ops, "gradient", ops.gradients[self.argument])
                patch.setattr(ops, "new_grad", _co_aligned)
            if self.isa:
                best = torch.ops.cbloss_fused._set_isa(self.isa).split()[0]
            try:
                yield
            finally:
                if self.isa:
                    torch.ops.cbloss_fused._set_isa(best)

    def scale(self, grad: Tensor, grad_loss: Tensor, numel: int) -> None:
        """The kernel that multiplies a stored gradient."""
        if self.argument == "cuda":
            torch.ops.cbloss_fused._scale(grad, grad_loss, numel)
        else:
            kernels.load().scale_gradient(grad, grad_loss, numel)

    @contextlib.contextmanager
    def on_a_gpu_of(self, multiprocessors: int) -> Iterator[None]:
        """As if the GPU had so many, where it is not a real one."""
        if DEVICE == "cuda":
            yield
            return
        with pytest.MonkeyPatch.context() as patch:
            if self.argument == "triton":
                from cbloss_fused.kernels import launch, layout

                device = layout.Device(multiprocessors, 32)
                patch.setattr(launch, "device_of", lambda tensor: device)
            elif EMULATOR is not None:
                patch.setattr(EMULATOR.setting("multiprocessors"), "value", multiprocessors)
            yield


def _co_aligned(logits: Tensor) -> Tensor:
    """As on a GPU, where the tensor's address is known."""
    if torch.compiler.is_compiling() or logits.is_meta or type(logits) is not Tensor:
        return torch.empty_like(logits)
    return ops.co_aligned(logits)


class Emulator:
    """The CUDA kernels on this CPU: tests/emulator/host/cuda_runtime.h."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        cuda.load_from(library, "cpu")

    def setting(self, name: str) -> ctypes.c_int:
        return ctypes.c_int.in_dll(self.library, f"emulated_{name}")


def _emulator() -> Emulator | None:
    if INTERPRETED or DEVICE == "cuda":
        return None
    library = emulated()
    return None if library is None else Emulator(library)


def _backends() -> dict[str, Backend]:
    """On a GPU its kernels; under TRITON_INTERPRET=1 the Triton kernels; else all on the CPU."""
    if INTERPRETED:
        return {"triton": Backend("triton")}
    if DEVICE == "cuda":
        names = ["triton"] * kernels.available + ["cuda"] * (cuda.device == "cuda")
        return {name: Backend(name) for name in names}
    found = {"fallback": Backend(None, fallback=True)}
    if ops.missing is None:
        isas = torch.ops.cbloss_fused._set_isa("").split()
        found = {f"cpu-{isa}": Backend("cpu", isa=isa) for isa in isas} | found
    if EMULATOR is not None:
        found["cuda"] = Backend("cuda")
    return found


EMULATOR = _emulator()
BACKENDS = _backends()
BEST = next(iter(BACKENDS.values()))
GPU_BACKENDS = {name: each for name, each in BACKENDS.items() if each.gpu}


def loss_and_grad(
    backend: Backend,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    grad_output: Tensor | None = None,
    **options: object,
) -> tuple[Tensor, Tensor]:
    """Loss and gradient through the public function; the logits keep their layout."""
    leaf = logits.detach().requires_grad_()
    loss = class_balanced_loss(leaf, target, weight, backend=backend.argument, **options)
    if grad_output is None:
        grad_output = torch.ones_like(loss)
    (grad,) = torch.autograd.grad(loss, leaf, grad_output)
    return loss.detach(), grad


def operator_arguments(
    logits: Tensor,
    target: Tensor,
    family: str,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    vectors: tuple[Tensor | None, ...] = (None, None, None),
) -> tuple[tuple[object, ...], Tensor, tuple[object, ...]]:
    """Arguments of the operator loss before its buffers, a loss buffer, the formula's numbers."""
    numbers = formula(family, gamma, label_smoothing=label_smoothing)
    number = REDUCTIONS.index(reduction)
    arguments = (logits, *Inputs(target, *vectors), numbers, IGNORED, number)
    return arguments, ops.new_loss(logits, target, number), numbers


@contextlib.contextmanager
def nothing_synchronises() -> Iterator[None]:
    """Within, on a GPU, what waits for the device raises."""
    if DEVICE == "cpu":
        yield
        return
    with warnings.catch_warnings():  # that this mode is a prototype
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("default")
