"""The operators: schemas, fake kernels, what implements them where, backends().

loss fills its buffers, which the caller allocates:
    loss   0-d, or one loss per row, whatever the reduction divides by
    grad   like logits: the gradient of the loss (for reduction "none": of the sum); or None
    saved  (1, rows) or, for softmax, (3, rows): scale, M, R, for gradient; with soft targets s, r
           of reference.row_scale and no third; or None
_loss_and_stats, on the CPU, has stats (4, C) in the place of saved: sums by class, see stats.py.
Where a device has no kernel, the reference computes both.
"""

from __future__ import annotations

import importlib
import platform
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import cuda, kernels, reference
from .call import REDUCTIONS, Formula, Inputs, is_dense
from .reference import compute_dtype
from .spec import Spec, check_values
from .stats import class_stats

_CALL = (
    "Tensor logits, Tensor target, Tensor? weight, Tensor? sample_weight, Tensor? normalizer, "
    "Tensor? logit_bias, Tensor? margin, float[] formula, int? ignore_index, int reduction, "
    "Tensor(a!) loss"
)
_LOSS = f"({_CALL}, Tensor(b!)? grad, Tensor(c!)? saved) -> ()"
_GRADIENT = (
    "(Tensor logits, Tensor target, Tensor? weight, Tensor? logit_bias, Tensor? margin, "
    "Tensor saved, Tensor grad_loss, float[] formula, Tensor(a!) grad) -> ()"
)
_library = torch.library.Library("cbloss_fused", "DEF")
_OVERLOADS = ("", ".triton", ".cuda", ".reference")  # the device's choice; a backend asked for
for _overload in _OVERLOADS:
    _library.define(f"loss{_overload}{_LOSS}")
    _library.define(f"gradient{_overload}{_GRADIENT}")
_library.define(f"_loss_and_stats({_CALL}, Tensor(b!) grad, Tensor(c!) stats) -> ()")
_library.define("_set_isa(str name) -> str")
_library.define("_scale(Tensor(a!) grad, Tensor grad_loss, int numel) -> ()")
for _name in ("_cuda_architectures", "_cuda_unusable"):
    _library.define(f"{_name}() -> str")
_library.define("_serve_cuda() -> ()")


def _load() -> str | None:
    """Load the compiled operators; the reason in one line if there are none."""
    try:
        importlib.import_module("cbloss_fused._C")
    except ImportError as error:
        note = Path(__file__).parent / "_build_note.txt"
        if note.exists():
            return note.read_text().strip()
        return f"the compiled extension cannot be loaded ({error}); reinstall cbloss_fused"
    return None


missing = _load()
cuda.load()
_warned = False


def new_loss(logits: Tensor, target: Tensor, reduction: int) -> Tensor:
    """The buffer for the loss: one loss per row for reduction "none"."""
    shape: tuple[int, ...] = ()
    if not reduction:
        shape = logits.shape[:1] + logits.shape[2:] if is_dense(target) else target.shape
    return logits.new_empty(shape, dtype=compute_dtype(logits.dtype))


def new_grad(logits: Tensor) -> Tensor:
    """The buffer for the gradient.

    On a GPU its rows lie modulo 16 bytes as those of the logits do, where the logits' address and
    strides are odd: so both are read and written in whole vectors.
    """
    if not logits.is_cuda or type(logits) is not Tensor or is_compiling():
        return torch.empty_like(logits)
    return co_aligned(logits)


def co_aligned(logits: Tensor) -> Tensor:
    """A tensor like logits whose rows lie modulo 16 bytes as those of logits do."""
    vector = 16 // logits.element_size()
    odd = logits.data_ptr() // logits.element_size() % vector
    if (odd == 0 and logits.is_contiguous()) or logits.stride(1) != 1 or logits.numel() == 0:
        return torch.empty_like(logits)
    N, C, *inner = logits.shape
    strides, size = list(logits.stride()), C  # classes side by side: dimensions around them
    for dim, n in ((2, inner[0]), (0, N)) if inner else ((0, N),):
        strides[dim] = size + (logits.stride(dim) - size) % vector
        size = strides[dim] * n
    buffer = logits.new_empty(odd + _span(logits.shape, strides))
    return buffer.as_strided(logits.shape, strides, odd)


def new_saved(logits: Tensor, sigmoid: bool) -> Tensor:
    """The buffer that a forward leaves for a recomputing backward."""
    shape = (1 if sigmoid else 3, logits.shape[0] * logits.shape[2:].numel())
    return logits.new_empty(shape, dtype=compute_dtype(logits.dtype))


def scaled(grad: Tensor, grad_loss: Tensor) -> Tensor:
    """grad * grad_loss, rounded once."""
    return (grad.to(grad_loss.dtype) * grad_loss).to(grad.dtype)


def scale_stored(grad: Tensor, grad_loss: Tensor, owned: bool) -> Tensor:
    """grad * grad_loss without a look at grad_loss: in place where no later backward needs grad.

    owned: what lies between the elements of grad is new_grad's padding, and nobody else's.
    """
    plain = type(grad) is Tensor and type(grad_loss) is Tensor
    served = grad.device.type == cuda.device
    if not plain or not (served or (kernels.available and grad.is_cuda)) or grad.numel() == 0:
        return scaled(grad, grad_loss)
    span = _span(grad.shape, grad.stride())
    if span != grad.numel() and not (owned and _fills_its_storage(grad, span)):
        return scaled(grad, grad_loss)
    keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    if keep_graph():
        grad, span = grad.clone(), grad.numel()  # which is dense
    if served:
        torch.ops.cbloss_fused._scale(grad, grad_loss, span)
    else:
        kernels.load().scale_gradient(grad, grad_loss, span)
    return grad


def _fills_its_storage(grad: Tensor, span: int) -> bool:
    size = grad.element_size()
    return grad.untyped_storage().nbytes() == (grad.storage_offset() + span) * size


def _span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last of a tensor that is not empty."""
    return sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1


def _loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
    logit_bias: Tensor | None,
    margin: Tensor | None,
    formula: Sequence[float],
    ignore_index: int | None,
    reduction: int,
    loss: Tensor,
    grad: Tensor | None,
    saved: Tensor | None,
) -> None:
    """The operator loss in eager PyTorch."""
    _warn_once(logits.device.type)
    f = Formula.of(formula)
    inputs = Inputs(target, weight, sample_weight, normalizer, logit_bias, margin)
    if logits.device.type == "cpu":  # here, where the message can name target's own index
        if not is_dense(target):
            reference.check_target(target, logits.shape[1], ignore_index)
        check_values(logits, inputs, f)
    inputs = inputs.by_row(logits)
    name = REDUCTIONS[reduction]
    L, gradient, s, r = reference.loss_and_grad(logits, inputs, f, ignore_index, name)
    loss.copy_(L.reshape(loss.shape) if loss.dim() else L.sum())
    if grad is not None:
        grad.copy_(gradient)
    if saved is not None:
        saved.zero_()[0].copy_(s.flatten())
        if not f.sigmoid and is_dense(target):
            saved[1].copy_(r.flatten())
        elif not f.sigmoid:
            M, R = reference.max_and_sum(logits, inputs, r < 0, f.logit_scale)
            saved[1].copy_(M.flatten())
            saved[2].copy_(R.flatten())


def _gradient(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    logit_bias: Tensor | None,
    margin: Tensor | None,
    saved: Tensor,
    grad_loss: Tensor,
    formula: Sequence[float],
    grad: Tensor,
) -> None:
    """The operator gradient in eager PyTorch."""
    inputs = Inputs(target, weight, logit_bias=logit_bias, margin=margin).by_row(logits)
    rows = logits.shape[:1] + logits.shape[2:]
    incoming = grad_loss.reshape(rows) if grad_loss.dim() else grad_loss
    f = Formula.of(formula)
    s, r = saved[0], saved[1 if is_dense(target) and not f.sigmoid else 0]
    grad.copy_(reference.gradient(logits, inputs, s.reshape(rows), r.reshape(rows), incoming, f))


def _triton_loss(*arguments: Any) -> None:
    if not kernels.load().loss(*arguments):
        _loss(*arguments)


def _triton_gradient(*arguments: Any) -> None:
    if not kernels.load().gradient(*arguments):
        _gradient(*arguments)


# Which of two serves CUDA tensors by default. On an H200 CUDA C++ takes 0.4 to 0.95 of the time of
# Triton (1.1 to 1.4 where a few rows have very many classes), and nothing is compiled at the first
# call: bench/results/nvidia-h200-2026-11-27.md.
PREFERRED = "cuda"

# autograd.py differentiates: below it the dispatcher need not look for gradients again. They only
# write: nothing to fake.
for _name in ("_loss_and_stats", *(f"{n}{o}" for n in ("loss", "gradient") for o in _OVERLOADS)):
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    _library.impl(_name, torch.library.fallthrough_kernel, "ADInplaceOrView")
    torch.library.register_fake(f"cbloss_fused::{_name}", lambda *_: None, lib=_library)
_library.impl("loss", _loss, "CompositeExplicitAutograd")
_library.impl("gradient", _gradient, "CompositeExplicitAutograd")
_library.impl("loss.reference", _loss, "CompositeExplicitAutograd")
_library.impl("gradient.reference", _gradient, "CompositeExplicitAutograd")
if cuda.device is not None and (PREFERRED == "cuda" or not kernels.available):
    torch.ops.cbloss_fused._serve_cuda()
elif kernels.available:
    _library.impl("loss", _triton_loss, "CUDA")
    _library.impl("gradient", _triton_gradient, "CUDA")
if kernels.available:
    _library.impl("loss.triton", _triton_loss, "CompositeExplicitAutograd")
    _library.impl("gradient.triton", _triton_gradient, "CompositeExplicitAutograd")

loss = torch.ops.cbloss_fused.loss.default
gradient = torch.ops.cbloss_fused.gradient.default
loss_and_stats = None if missing else torch.ops.cbloss_fused._loss_and_stats
# By what was asked for; None: the device's own choice.
losses: dict[str | None, Any] = {
    None: loss,
    "cpu": loss,
    "triton": torch.ops.cbloss_fused.loss.triton,
    "cuda": torch.ops.cbloss_fused.loss.cuda,
    "reference": torch.ops.cbloss_fused.loss.reference,
}
gradients: dict[str | None, Any] = {
    None: gradient,
    "cpu": gradient,
    "triton": torch.ops.cbloss_fused.gradient.triton,
    "cuda": torch.ops.cbloss_fused.gradient.cuda,
    "reference": torch.ops.cbloss_fused.gradient.reference,
}


def serving_classes(input: Tensor, backend: str | None) -> str | None:
    """Who serves soft targets and weights of classes: CUDA C++ leaves them to Triton."""
    if backend == "cuda" or (input.is_cuda and backend is None):
        return "triton" if kernels.available and input.is_cuda else "reference"
    return backend


def run_loss(
    logits: Tensor, inputs: Inputs, spec: Spec, loss: Tensor, grad: Tensor | None,
    saved: Tensor | None,
) -> None:  # fmt: skip
    """Fill the buffers by the backend that serves."""
    losses[spec.backend](
        logits, *inputs, spec.numbers, spec.ignore_index, spec.reduction, loss, grad, saved
    )


def run_loss_and_stats(
    logits: Tensor, inputs: Inputs, spec: Spec, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss and statistics (4, C) of its classes, see stats.py; fills grad."""
    if loss_and_stats is not None and logits.is_cpu and spec.backend in (None, "cpu"):
        loss = new_loss(logits, inputs.target, spec.reduction)
        stats = loss.new_empty(4, logits.shape[1])
        loss_and_stats(
            logits, *inputs, spec.numbers, spec.ignore_index, spec.reduction, loss, grad, stats
        )
        return loss, stats
    losses = new_loss(logits, inputs.target, 0)
    saved = new_saved(logits, spec.formula.sigmoid)
    run_loss(logits, inputs, spec, losses, grad, saved)
    return losses.sum(), class_stats(logits, inputs, spec, losses, grad, saved)


def _warn_once(device: str) -> None:
    global _warned
    no_gpu = f"Triton is not installed; CUDA C++: {cuda.missing or 'has none for this call'}"
    why = {"cpu": missing, "cuda": no_gpu}.get(device)
    if why is not None and not _warned:
        _warned = True
        warnings.warn(
            f"cbloss_fused runs in eager PyTorch, not in its fused kernels: {why}", stacklevel=3
        )


def backends() -> dict[str, str]:
    """What each device type gets here, and why.

    Returns:
        One line each for "cpu", "cuda" (AMD GPUs too) and every other device: the kernels, the
        instruction set or the architectures they were built for, and why no others serve.

    >>> sorted(backends())
    ['cpu', 'cuda', 'other']
    """
    if missing is None:
        isa = torch.ops.cbloss_fused._set_isa("").split()[0]
        cpu = f"fused C++ kernels, {isa} code chosen for this {platform.machine()}"
    else:
        cpu = f"reference: {missing}"
    if cuda.device == "cuda":
        built = torch.ops.cbloss_fused._cuda_architectures()
        cpp = f"fused CUDA C++ kernels, built for {built}"
    else:
        cpp = f"no CUDA C++ kernels: {cuda.missing}"
    triton = "fused Triton kernels, compiled at the first call"
    if not kernels.available:
        gpu = cpp if cuda.device == "cuda" else f"reference: Triton is not installed; {cpp}"
    elif cuda.device == "cuda" and PREFERRED == "cuda":
        gpu = f"{cpp}; backend='triton' for Triton's"
    else:
        gpu = f"{triton}; {cpp}" + ("; backend='cuda' for them" if cuda.device else "")
    if kernels.available:
        gpu += "; soft targets and class_weighting='class' always in Triton"
    if not torch.cuda.is_available():
        gpu += "; no GPU here"
    return {"cpu": cpu, "cuda": gpu, "other": "reference: no kernels for other devices"}
