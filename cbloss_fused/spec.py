"""The edge: every check of an argument and its message, once; what passes is a Spec.

What needs the values inside a tensor (targets in range, weights >= 0) is checked in the operator.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import cuda, kernels
from .call import REDUCTIONS, Formula, Inputs, formula, is_dense
from .reference import compute_dtype

ACTIVATIONS = ("softmax", "sigmoid")
BACKENDS = ("cpu", "triton", "cuda", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)

WEIGHTINGS = ("sample", "class")
CONSTANT = (str, int, float, type(None))


class Spec(NamedTuple):
    """Checked options, as autograd and the operators take them."""

    formula: Formula
    numbers: tuple[float, ...]  # the formula, as the operators take it
    ignore_index: int | None
    reduction: int  # index of REDUCTIONS
    inplace: bool
    recompute: bool | None
    backend: str | None  # that serves; None: whatever the device chooses


def check_options(
    activation: str,
    gamma: float,
    gamma_neg: float | None,
    alpha: float | None,
    clip: float,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    class_weighting: str,
    ignore_index: int | None,
    reduction: str,
    inplace: bool,
    recompute: bool | None,
    backend: str | None,
) -> Spec:
    """All options that no tensor can make wrong; raises for those that none could make right."""
    formula = check_formula(
        activation, gamma, gamma_neg, alpha, clip, label_smoothing, z_loss, logit_scale,
        class_weighting, reduction,
    )  # fmt: skip
    if reduction not in REDUCTIONS:
        raise ValueError(_choice("reduction", reduction, REDUCTIONS))
    if backend is not None and backend not in BACKENDS:
        raise ValueError(_choice("backend", backend, (None, *BACKENDS)))
    if ignore_index is not None and not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int or None, got {ignore_index!r}")
    if inplace and backend == "reference":
        raise ValueError("inplace=True needs a kernel: backend='reference' never writes its input")
    index = REDUCTIONS.index(reduction)
    return Spec(formula, formula.short(), ignore_index, index, inplace, recompute, backend)


def remembered(*options: Any) -> Spec:
    """`check_options`, once for each set of options: it costs a tenth of a small loss's time."""
    if not is_compiling():
        try:
            return _remembered(*options)
        except TypeError:
            pass  # no constants, or not even hashable
    return check_options(*options)


@lru_cache(maxsize=256, typed=True)
def _remembered(*options: Any) -> Spec:
    if not all(isinstance(option, CONSTANT) for option in options):
        raise TypeError("a tensor may change")
    return check_options(*options)


def check_formula(
    activation: str,
    gamma: float,
    gamma_neg: float | None,
    alpha: float | None,
    clip: float,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    class_weighting: str,
    reduction: str,
) -> Formula:
    """The formula's numbers; raises for those out of range and those that have no meaning."""
    if activation not in ACTIVATIONS:
        raise ValueError(_choice("activation", activation, ACTIVATIONS))
    if class_weighting not in WEIGHTINGS:
        raise ValueError(_choice("class_weighting", class_weighting, WEIGHTINGS))
    try:
        if not 0 <= gamma < inf:
            raise ValueError(f"gamma must be finite and >= 0, got {gamma}")
        if gamma_neg is not None and not 0 <= gamma_neg < inf:
            raise ValueError(f"gamma_neg must be None or finite and >= 0, got {gamma_neg}")
        if alpha is not None and not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be None or in [0, 1], got {alpha}")
        if not 0 <= clip < 1:
            raise ValueError(f"clip must be in [0, 1), got {clip}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        if not 0 <= z_loss < inf:
            raise ValueError(f"z_loss must be finite and >= 0, got {z_loss}")
        if not 0 < logit_scale <= 1e30:
            raise ValueError(f"logit_scale must be positive and <= 1e30, got {logit_scale}")
    except (TypeError, RuntimeError):  # the second of a tensor of several numbers
        numbers = {
            "gamma": gamma, "gamma_neg": gamma_neg, "alpha": alpha, "clip": clip,
            "label_smoothing": label_smoothing, "z_loss": z_loss, "logit_scale": logit_scale,
        }  # fmt: skip
        given = ", ".join(f"{name}={value!r}" for name, value in numbers.items())
        raise TypeError(f"{', '.join(numbers)} must be numbers, got {given}") from None
    if activation == "sigmoid":
        if z_loss:
            raise ValueError(
                "z_loss holds softmax's log-sum-exp near 0: activation='sigmoid' has none"
            )
        if class_weighting == "class" and reduction == "weighted_mean":
            raise ValueError(
                "reduction='weighted_mean' divides by the rows' weights: with "
                "class_weighting='class' weight belongs to no row"
            )
    elif gamma_neg is not None or alpha is not None or clip:
        raise ValueError(
            "gamma_neg, alpha and clip tell positives from negatives: activation='softmax' has one "
            f"target, got gamma_neg={gamma_neg}, alpha={alpha}, clip={clip}"
        )
    elif class_weighting == "class":
        raise ValueError(
            "class_weighting='class' weighs each class's term: activation='softmax' has but one"
        )
    return formula(
        activation, gamma, gamma_neg, alpha, clip, label_smoothing, z_loss, logit_scale,
        class_weighting,
    )  # fmt: skip


def check_tensors(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    logit_bias: Tensor | None,
    margin: Tensor | None,
) -> tuple[Inputs, bool]:
    """What the operators take, and whether targets are dense.

    Raises for a rank, shape, dtype or device that does not fit, or a grad that will not come.
    """
    if not isinstance(input, Tensor) or not isinstance(target, Tensor):
        name, given = ("target", target) if isinstance(input, Tensor) else ("input", input)
        raise TypeError(f"{name} must be a Tensor, got {type(given).__name__}")
    if input.dtype not in DTYPES:
        raise TypeError(f"input must be one of {_names(DTYPES)}, got {input.dtype}")
    shape = input.shape
    if not shape:
        raise ValueError("input must be (C,), (N, C) or (N, C, d1, ..., dk), got a 0-d tensor")
    rows: tuple[int, ...]
    if len(shape) == 2:
        N, C = shape
        rows = (N,)  # a slice would cost 0.3 us
    else:
        C, rows = (shape[0], ()) if len(shape) == 1 else (shape[1], shape[:1] + shape[2:])
    if C < 1:
        raise ValueError(f"input must have at least one class, got shape {tuple(shape)}")
    dense = is_dense(target)
    if not dense and target.dtype not in INTEGERS:
        raise TypeError(
            f"target must hold class indices ({_names(INTEGERS)}) or, in input's shape, float or "
            f"bool values, got {target.dtype}"
        )
    expected = shape if dense else rows
    if target.shape != expected:
        raise ValueError(
            f"target must have shape {tuple(expected)} for an input of shape {tuple(shape)} and "
            f"{target.dtype} targets, got {tuple(target.shape)}"
        )
    device, dtype = input.device, compute_dtype(input.dtype)
    if target.device != device:
        raise ValueError(f"target must be on input's device {device}, got {target.device}")
    if not dense and (target.dtype is not torch.int64 or not target.is_contiguous()):
        target = target.to(torch.int64).contiguous()
    if weight is not None:
        weight = _vector("weight", weight, (C,), device, dtype)
    if sample_weight is not None:
        sample_weight = _vector("sample_weight", sample_weight, rows, device, dtype)
    if logit_bias is not None:
        logit_bias = _vector("logit_bias", logit_bias, (C,), device, dtype)
    if margin is not None:
        margin = _vector("margin", margin, (C,), device, dtype)
    return Inputs(target, weight, sample_weight, None, logit_bias, margin), dense


def _vector(
    name: str, vector: Tensor, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Checked, contiguous and of the type that the loss is computed in."""
    _check_vector(name, vector, shape, device)
    if vector.dtype is dtype and vector.is_contiguous():
        return vector
    return vector.to(dtype).contiguous()


def check_dense(inputs: Inputs, formula: Formula, ignore_index: int | None) -> None:
    """Raise for what soft or multi-hot targets leave without a meaning."""
    if inputs.target.requires_grad:
        raise ValueError("target requires grad, but only input is differentiated: detach it")
    if formula.gamma and not formula.sigmoid:
        raise ValueError(
            f"gamma focuses on the one target of a row: with soft targets activation='softmax' "
            f"needs gamma=0, got {formula.gamma}"
        )
    if inputs.margin is not None:
        raise ValueError("margin is taken off the one target's logit: soft targets have none")
    if ignore_index is not None and ignore_index >= 0:
        raise ValueError(
            f"ignore_index={ignore_index} is a class index: soft targets have none, drop the rows "
            "or give them sample_weight 0"
        )


def check_stats(dense: bool, spec: Spec) -> None:
    """Raise for what return_stats=True cannot go with."""
    if dense:
        raise ValueError("return_stats sorts rows by their class: soft targets have none")
    if not spec.reduction or spec.inplace or spec.recompute or spec.backend == "reference":
        raise ValueError(
            "return_stats reads the stored gradient of a reduced loss: it needs a reduction, no "
            f"inplace, no recompute and a kernel, got reduction={REDUCTIONS[spec.reduction]!r}, "
            f"inplace={spec.inplace}, recompute={spec.recompute}, backend={spec.backend!r}"
        )


def check_kernel(input: Tensor, backend: str | None) -> None:
    """Raise where the fused kernels cannot serve."""
    if backend == "cpu" and input.device.type != "cpu":
        raise ValueError(f"backend='cpu' needs CPU tensors, got {input.device}")
    if backend == "triton":
        _check_triton(input)
    if backend == "cuda":
        _check_cuda(input)
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "torch.func transforms need a differentiable formula: pass backend='reference'"
        )


def _check_triton(input: Tensor) -> None:
    if not kernels.available:
        raise ValueError("backend='triton' needs the package triton, which is not installed")
    if not (input.is_cuda or (input.is_cpu and kernels.load().INTERPRETED)):
        raise ValueError(
            f"backend='triton' needs CUDA tensors, got {input.device}; CPU tensors only under "
            "Triton's interpreter (TRITON_INTERPRET=1 in the environment)"
        )


def _check_cuda(input: Tensor) -> None:
    if cuda.device is None:
        raise ValueError(f"backend='cuda': no CUDA C++ kernels here: {cuda.missing}")
    if input.device.type != cuda.device:
        raise ValueError(f"backend='cuda' needs CUDA tensors, got {input.device}")


def check_values(logits: Tensor, inputs: Inputs, formula: Formula) -> None:
    """What the kernels check as they read, for the reference on the CPU."""
    for name in ("weight", "sample_weight"):
        _check_all(name, getattr(inputs, name), _is_weight, "finite and >= 0")
    for name in ("logit_bias", "margin"):
        _check_all(name, getattr(inputs, name), torch.isfinite, "finite")
    normalizer = inputs.normalizer
    if normalizer is not None and not 0 < float(normalizer) < inf:
        raise ValueError(f"normalizer must be positive and finite, got {float(normalizer)}")
    if inputs.target.dtype.is_floating_point:  # looked at in the type that is computed in
        target = inputs.target.to(compute_dtype(logits.dtype))
        if formula.sigmoid:
            _check_all("target", target, lambda t: (t >= 0) & (t <= 1), "in [0, 1]")
        else:
            _check_all("target", target, _is_weight, "finite and >= 0")


def _is_weight(v: Tensor) -> Tensor:
    return (v >= 0) & v.isfinite()


def _check_all(
    name: str, vector: Tensor | None, good: Callable[[Tensor], Tensor], what: str
) -> None:
    if vector is None:
        return
    bad = ~good(vector)
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"{name}{list(first)} = {float(vector[first])}: must be {what}")


def check_inplace(input: Tensor, target: Tensor) -> None:
    """Raise if the gradient may not be written over input."""
    if not input.requires_grad or not torch.is_grad_enabled():
        return  # then nothing is written
    compiling = torch.compiler.is_compiling()  # which cannot trace the rest, and never aliases
    if input.is_leaf or (not compiling and input._base is not None and input._base.is_leaf):
        raise ValueError(
            "inplace=True would write the gradient over a leaf (a parameter or an input): "
            "pass logits that the model computed"
        )
    if compiling:
        return
    if target.data_ptr() == input.data_ptr() and input.numel():
        raise ValueError("inplace=True would write the gradient over target: it is the logits")
    given = f"got one of shape {tuple(input.shape)} and strides {input.stride()}"
    span = 0  # of the dimensions with smaller strides
    for stride, size in sorted(zip(input.stride(), input.shape, strict=True)):
        if size > 1 and stride <= span:
            raise ValueError(f"inplace=True needs logits neither expanded nor overlapping: {given}")
        span += (size - 1) * stride
    inner_dims = zip(input.shape[2:], input.stride()[2:], strict=True)
    dims = [(n, stride) for n, stride in inner_dims if n > 1]
    for (_, outer), (n, inner) in pairwise(dims):
        if outer != n * inner:
            raise ValueError(
                f"inplace=True needs logits that can be viewed as (N, C, d1 * ... * dk), {given}"
            )


def normalizer_tensor(normalizer: float | Tensor, reduction: int, input: Tensor) -> Tensor:
    """The normalizer as a 0-d tensor of the type that the loss is computed in."""
    if reduction != REDUCTIONS.index("mean"):
        name = REDUCTIONS[reduction]
        raise ValueError(f"normalizer replaces the mean's denominator: reduction is {name!r}")
    dtype = compute_dtype(input.dtype)
    if isinstance(normalizer, Tensor):
        return _vector("normalizer", normalizer, (), input.device, dtype)
    if not hasattr(normalizer, "__float__"):
        raise TypeError(f"normalizer must be a number or a 0-d tensor, got {normalizer!r}")
    if not 0 < normalizer < inf:
        raise ValueError(f"normalizer must be positive and finite, got {normalizer}")
    return torch.full((), normalizer, dtype=dtype, device=input.device)


def check_class_vector(name: str, vector: Tensor, C: int) -> Tensor:
    """The vector, looked at once: (C,), finite, not differentiated."""
    _check_vector(name, vector, (C,), vector.device)
    _check_all(name, vector, torch.isfinite, "finite")
    return vector


def _check_vector(name: str, vector: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(vector, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(vector).__name__}")
    if vector.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(vector.shape)}")
    if not vector.dtype.is_floating_point:
        raise TypeError(f"{name} must have a floating dtype, got {vector.dtype}")
    if vector.device != device:
        raise ValueError(f"{name} must be on input's device {device}, got {vector.device}")
    if vector.requires_grad:
        raise ValueError(f"{name} requires grad, but only input is differentiated: detach it")


def _choice(name: str, given: object, valid: tuple[object, ...]) -> str:
    return f"{name} must be one of {', '.join(map(repr, valid))}, got {given!r}"


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
