"""The operators: schemas, fake kernels, what implements them where, backends().

loss fills its buffers, which the caller allocates:
    loss   0-d, or for reduction "none" like target
    grad   like logits: the gradient of the loss (for reduction "none": of the sum); or None
    saved  (1, rows) or, for softmax, (3, rows): scale, M, R, for gradient; or None
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

_FORMULA = (
    "bool sigmoid, float gamma, float gamma_neg, float alpha, float alpha_neg, float clip, "
    "float label_smoothing, float z_loss, float logit_scale, bool per_class"
)
_LOSS = (
    "(Tensor logits, Tensor target, Tensor? weight, Tensor? sample_weight, Tensor? normalizer, "
    f"Tensor? logit_bias, Tensor? margin, {_FORMULA}, "
    "int? ignore_index, int reduction, Tensor(a!) loss, Tensor(b!)? grad, Tensor(c!)? saved) -> ()"
)
_GRADIENT = (
    "(Tensor logits, Tensor target, Tensor? weight, Tensor? logit_bias, Tensor? margin, "
    f"Tensor saved, Tensor grad_loss, {_FORMULA}, Tensor(a!) grad) -> ()"
)
_library = torch.library.Library("cbloss_fused", "DEF")
for _overload in (
    "",
    ".triton",
    ".cuda",
    ".reference",
):  # the device's own choice; a backend that was asked for
    _library.define(f"loss{_overload}{_LOSS}")
    _library.define(f"gradient{_overload}{_GRADIENT}")
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
    """The buffer for the loss: one a row for reduction "none"."""
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


def _rows_of(logits: Tensor, vector: Tensor) -> Tensor:
    """A target or sample weights in the shape of the rows of (N, C) or (N, C, K) logits."""
    return vector.reshape(logits.shape[:1] + logits.shape[2:])


def _loss(logits: Tensor, *arguments: Any) -> None:
    """The operator loss in eager PyTorch."""
    tensors, numbers, rest = arguments[:6], arguments[6:16], arguments[16:]
    ignore_index, reduction, loss, grad, saved = rest
    inputs = Inputs(*tensors)
    _warn_once(logits.device.type)
    if logits.device.type == "cpu":  # here, where the message can name target's own index
        if not is_dense(inputs.target):
            reference.check_target(inputs.target, logits.shape[1], ignore_index)
        check_values(inputs)
    if not is_dense(inputs.target):
        inputs = inputs._replace(target=_rows_of(logits, inputs.target))
    if inputs.sample_weight is not None:
        inputs = inputs._replace(sample_weight=_rows_of(logits, inputs.sample_weight))
    L, gradient, scale = reference.loss_and_grad(
        logits, inputs, Formula(*numbers), ignore_index, REDUCTIONS[reduction]
    )
    loss.copy_(L.reshape(loss.shape))
    if grad is not None:
        grad.copy_(gradient)
    if saved is not None:
        saved.zero_()[0].copy_(scale.flatten())
        if len(saved) > 1 and not is_dense(inputs.target):
            M, R = reference.max_and_sum(logits, inputs, scale < 0, Formula(*numbers).logit_scale)
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
    *arguments: Any,
) -> None:
    """The operator gradient in eager PyTorch."""
    *numbers, grad = arguments
    if not is_dense(target):
        target = _rows_of(logits, target)
    inputs = Inputs(target, weight, logit_bias=logit_bias, margin=margin)
    scale = _rows_of(logits, saved[0])
    incoming = _rows_of(logits, grad_loss) if grad_loss.dim() else grad_loss
    grad.copy_(reference.gradient(logits, inputs, scale, incoming, Formula(*numbers)))


def _triton_loss(*arguments: Any) -> None:
    if not kernels.load().loss(*arguments):
        _loss(*arguments)


def _triton_gradient(*arguments: Any) -> None:
    if not kernels.load().gradient(*arguments):
        _gradient(*arguments)


# Which of two serves CUDA tensors by default: CUDA C++ has fewer instructions an element, a third
# of the host time and nothing to compile at the first call. Neither was timed on a GPU yet.
PREFERRED = "cuda"

# autograd.py differentiates: below it the dispatcher need not look for gradients again. They only
# write: nothing to fake.
for _name in (
    f"{n}{o}" for n in ("loss", "gradient") for o in ("", ".triton", ".cuda", ".reference")
):
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


def _serving(target: Tensor, spec: Spec) -> str | None:
    """Who computes a call: CUDA C++ leaves soft targets and per-class weights to Triton."""
    by_class = spec.formula.per_class or is_dense(target)
    if by_class and (spec.backend == "cuda" or (target.is_cuda and spec.backend is None)):
        return "triton" if kernels.available and target.is_cuda else "reference"
    return spec.backend


def run_loss(
    logits: Tensor, inputs: Inputs, spec: Spec, loss: Tensor, grad: Tensor | None,
    saved: Tensor | None,
) -> None:  # fmt: skip
    """Fill the buffers by the backend that was asked for."""
    losses[_serving(inputs.target, spec)](
        logits, *inputs, *spec.formula, spec.ignore_index, spec.reduction, loss, grad, saved
    )


def run_gradient(
    logits: Tensor, vectors: Sequence[Tensor | None], saved: Tensor, grad_loss: Tensor, spec: Spec,
    grad: Tensor,
) -> None:  # fmt: skip
    """The recomputing backward; vectors: target, weight, logit_bias, margin."""
    target = vectors[0]
    assert target is not None
    gradients[_serving(target, spec)](
        logits, *vectors, saved, grad_loss.contiguous(), *spec.formula, grad
    )


def _warn_once(device: str) -> None:
    global _warned
    no_gpu = f"Triton is not installed; CUDA C++: {cuda.missing}"
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
