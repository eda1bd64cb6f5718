"""The implementations that tests run on, as the machine and TRITON_INTERPRET=1 have them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from emulator.build import emulated
from torch import Tensor

from cbloss_fused import class_balanced_loss, ops, triton
from cbloss_fused.backends import REGISTRY, load_cuda, set_isa
from cbloss_fused.backends import Backend as Record
from cbloss_fused.buffers import co_aligned, new_loss
from cbloss_fused.inputs import Inputs
from cbloss_fused.options import Activation, BackendName, Formula, Options, Reduction

from .marks import IGNORED, REDUCTIONS

INTERPRETED = triton.interpreted()
MARKS = IGNORED, None  # ignore_index and background_index of operators that tests call
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def long_if_interpreted(test: Any) -> Any:
    """A test that runs with --long alone where Triton is interpreted, which is slow."""
    return pytest.mark.long(test) if INTERPRETED else test


@dataclass(frozen=True)
class Backend:
    """What a test needs to know about an implementation of the two operators."""

    argument: BackendName | None  # of class_balanced_loss(backend=...)
    isa: str = ""  # an instruction set of the C++ kernels
    fallback: bool = False  # the operators' Python implementation instead of the kernels

    @property
    def gpu(self) -> bool:
        """Takes values as given, whether it runs on a GPU, interpreted or emulated."""
        return self.argument in ("triton", "cuda")

    def same(self, a: Tensor, b: Tensor) -> bool:
        """Equal whatever layout and threads; others' sums depend on where a row begins and ends."""
        half = a.element_size() == 2
        rtol, atol = 0.0, 0.0
        if self.fallback or self.gpu:
            rtol, atol = (1e-2 if half else 1e-3, 1e-6)
        return torch.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True)

    @property
    def record(self) -> Record:
        """The package's own, as `active` leaves it: its operators are loss and gradient."""
        return REGISTRY[self.argument or "cpu"]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops, "_warned", True)
            if self.fallback:
                eager = ops.eager_loss, ops.eager_gradient
                cpu = self.record._replace(loss=eager[0], gradient=eager[1], loss_and_stats=None)
                patch.setitem(REGISTRY, "cpu", cpu)
            if self.gpu:
                record = self.record._replace(new_grad=_co_aligned)
                patch.setitem(REGISTRY, record.name, record)
            if self.isa:
                best = set_isa(self.isa)[0]
            try:
                yield
            finally:
                if self.isa:
                    set_isa(best)

    @contextlib.contextmanager
    def on_a_gpu_of(self, multiprocessors: int) -> Iterator[None]:
        """As if the GPU had so many, where it is not a real one."""
        if DEVICE == "cuda":
            yield
            return
        with pytest.MonkeyPatch.context() as patch:
            if self.argument == "triton":
                from cbloss_fused.triton import heuristics, launch

                device = heuristics.Device(multiprocessors, 32)
                patch.setattr(launch, "device_of", lambda tensor: device)
            elif EMULATOR is not None:
                patch.setattr(EMULATOR.setting("multiprocessors"), "value", multiprocessors)
            yield


def _co_aligned(logits: Tensor) -> Tensor:
    """As on a GPU, where the tensor's address is known."""
    return torch.empty_like(logits) if logits.is_meta else co_aligned(logits)


class Emulator:
    """The CUDA kernels on this CPU: tests/emulator/host/cuda_runtime.h."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        load_cuda(library, "cpu")

    def setting(self, name: str) -> ctypes.c_int:
        return ctypes.c_int.in_dll(self.library, f"emulated_{name}")


def _emulator() -> Emulator | None:
    if INTERPRETED or DEVICE == "cuda" or "libasan" in os.environ.get("LD_PRELOAD", ""):
        return None  # under a sanitizer, emulated kernels have a library and a test of their own
    library = emulated()
    return None if library is None else Emulator(library)


def _backends() -> dict[str, Backend]:
    """On a GPU its kernels; under TRITON_INTERPRET=1 the Triton kernels; else all on the CPU."""
    if INTERPRETED:
        return {"triton": Backend("triton")}
    if DEVICE == "cuda":
        names: tuple[BackendName, ...] = ("triton", "cuda")
        return {name: Backend(name) for name in names if REGISTRY[name].missing is None}
    found = {"fallback": Backend(None, fallback=True)}
    if REGISTRY["cpu"].missing is None:
        found = {f"cpu-{isa}": Backend("cpu", isa=isa) for isa in set_isa()} | found
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
    **options: Any,
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
    family: Activation,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    vectors: tuple[Tensor | None, ...] = (),
) -> tuple[tuple[object, ...], Tensor, tuple[object, ...]]:
    """Arguments of the operator loss before its buffers, a loss buffer, the formula's numbers."""
    numbers = Formula.of(Options(family, gamma, label_smoothing=label_smoothing))
    number = REDUCTIONS.index(reduction)
    arguments = (logits, *Inputs(target, *vectors), numbers, *MARKS, number)
    return arguments, new_loss(logits, target, number), numbers


def gradient_arguments(
    logits: Tensor, inputs: Inputs, saved: Tensor, incoming: Tensor, numbers: object, grad: Tensor
) -> tuple[object, ...]:
    """Arguments of the operator gradient."""
    return logits, *inputs.of_gradient(), saved, incoming, numbers, *MARKS, grad


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
