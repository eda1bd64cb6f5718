"""Every check of a tensor argument and its message, in one visit; what passes is `Inputs`.

What needs the values inside a tensor (targets in range, weights >= 0) is checked in the operators,
by values.py in those of eager PyTorch.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import hints
from .inputs import Inputs, compute_dtype, is_soft
from .options import MEAN, REDUCTIONS, LossSpec, is_bool
from .values import check_all, is_weight, jit_tracing

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)

# What a call gives beside the logits, unchecked, in the order of Inputs.
Given: TypeAlias = tuple[Any, Any, Any, Any, Any, Any, Any]


def check_inputs(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    normalizer: float | Tensor | None,
    logit_bias: Tensor | None,
    margin: Tensor | None,
    pos_weight: Tensor | None,
    spec: LossSpec,
    return_stats: bool,
) -> Inputs:
    """What the operators take.

    Raises for a rank, shape, dtype or device that does not fit, for options that have no meaning
    with these tensors, and for a grad that will not come.
    """
    if not isinstance(input, Tensor) or not isinstance(target, Tensor):
        name, given = ("target", target) if isinstance(input, Tensor) else ("input", input)
        raise TypeError(f"{name} must be a Tensor, got {type(given).__name__}")
    if input.layout is not torch.strided or input.is_nested:
        raise _wrong_layout("input", input)
    if input.dtype not in DTYPES:
        hint = hints.of_swapped(input, target)
        raise TypeError(f"input must be one of {_names(DTYPES)}, got {input.dtype}{hint}")
    if target.layout is not torch.strided or target.is_nested:
        raise _wrong_layout("target", target)
    C, rows = _classes_and_rows(input)
    soft = is_soft(target)
    if soft:
        _check_soft(input, target, rows, margin, spec)
    else:
        target = _indices(input, target, rows)
        if spec.background_index is not None:
            check_background(spec, C)
    device, dtype = input.device, compute_dtype(input.dtype)
    if target.device != device:
        raise ValueError(f"target must be on input's device {device}, got {target.device}")
    if weight is not None:
        weight = _vector("weight", weight, (C,), device, dtype)
    if sample_weight is not None:
        sample_weight = _vector("sample_weight", sample_weight, rows, device, dtype)
    if logit_bias is not None:
        logit_bias = _vector("logit_bias", logit_bias, (C,), device, dtype)
    if margin is not None:
        margin = _vector("margin", margin, (C,), device, dtype)
    if pos_weight is not None:
        check_pos_weight(spec)
        pos_weight = _vector("pos_weight", pos_weight, (C,), device, dtype)
    if normalizer is not None:
        normalizer = _normalizer(normalizer, spec.reduction, device, dtype)
    if return_stats is not False:
        _check_stats(return_stats, soft, spec)
    if spec.backend != "reference":
        vectors = logit_bias, margin, pos_weight
        refuse_transforms(input, target, weight, sample_weight, normalizer, *vectors)
    if spec.inplace:
        check_inplace(input, target)
    return Inputs(target, weight, sample_weight, normalizer, logit_bias, margin, pos_weight)


def check_background(spec: LossSpec, C: int) -> None:
    """Raise if background_index is a class."""
    index = spec.background_index
    if index is not None and 0 <= index < C:
        raise ValueError(
            f"background_index={index} is one of the {C} classes: expected another integer"
        )


def check_pos_weight(spec: LossSpec) -> None:
    """Raise for the family where pos_weight has no meaning."""
    if not spec.formula.sigmoid:
        raise ValueError(
            "pos_weight multiplies the terms of positive classes: activation='softmax' has no such "
            "terms"
        )


def refuse_transforms(*tensors: Tensor | None) -> None:
    """Raise for torch.func and for forward-mode derivatives, which would be lost."""
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "torch.func transforms need a differentiable formula: pass backend='reference'"
        )
    if forward_ad._current_level < 0:
        return
    compiling = torch.compiler.is_compiling()  # which cannot see tangents
    for tensor in tensors:
        if tensor is None:
            continue
        if compiling or forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                "forward-mode derivatives need a differentiable formula: pass backend='reference'"
            )


def exports_gradient(*tensors: Tensor | None) -> bool:
    """Whether torch.export would lose the gradient of these: operators in its graph have none."""
    if not torch.compiler._is_exporting_flag or not torch.is_grad_enabled():
        return False  # is_exporting() is taken for true by the compiler of PyTorch 2.11
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def refuse_shards(*tensors: Tensor | None) -> None:
    """Raise where what is communicated, or the gradient of these, would not be recorded."""
    if jit_tracing() or exports_gradient(*tensors):
        raise NotImplementedError(
            "shards can be compiled, but neither traced by torch.jit.trace nor exported with a "
            "gradient"
        )


def _classes_and_rows(input: Tensor) -> tuple[int, tuple[int, ...]]:
    """C and the shape of an index target."""
    shape = input.shape
    if not shape:
        raise ValueError("input must be (C,), (N, C) or (N, C, d1, ..., dk), got a 0-d tensor")
    rows: tuple[int, ...]
    if len(shape) == 2:
        C, rows = shape[1], (shape[0],)  # a slice would cost 0.3 us
    elif len(shape) == 1:
        C, rows = shape[0], ()
    else:
        C, rows = shape[1], (*shape[:1], *shape[2:])
    if C < 1:
        raise ValueError(f"input must have at least one class, got shape {tuple(shape)}")
    return C, rows


def _indices(input: Tensor, target: Tensor, rows: tuple[int, ...]) -> Tensor:
    """Class indices, checked, as contiguous int64."""
    if target.dtype not in INTEGERS:
        raise TypeError(
            f"target must hold class indices ({_names(INTEGERS)}) or, in input's shape, float or "
            f"bool values, got {target.dtype}"
        )
    if target.shape != rows:
        raise _wrong_shape(input, target, rows, rows)
    if target.dtype is torch.int64 and target.is_contiguous():
        return target
    return target.to(torch.int64).contiguous()


def _check_soft(
    input: Tensor,
    target: Tensor,
    rows: tuple[int, ...],
    margin: Tensor | None,
    spec: LossSpec,
) -> None:
    """Raise for what soft or multi-hot targets leave without a meaning."""
    if target.shape != input.shape:
        raise _wrong_shape(input, target, input.shape, rows)
    if target.requires_grad:
        hint = "" if input.requires_grad else hints.ORDER
        raise ValueError(f"target requires grad, but only input is differentiated: detach it{hint}")
    if spec.formula.gamma and not spec.formula.sigmoid:
        raise ValueError(
            f"gamma focuses on the one target of a row: with soft targets activation='softmax' "
            f"needs gamma=0, got {spec.formula.gamma}; of one-hot targets pass target.argmax(1)"
        )
    if margin is not None:
        raise ValueError("margin is taken off the one target's logit: soft targets have none")
    if spec.ignore_index is not None and spec.ignore_index >= 0:
        raise ValueError(
            f"ignore_index={spec.ignore_index} is a class index: soft targets have none, drop the "
            "rows or give them sample_weight 0"
        )
    if spec.background_index is not None:
        raise ValueError(
            f"background_index={spec.background_index} is a class index: a multi-hot row without a "
            "positive class is all 0"
        )


def _wrong_layout(name: str, tensor: Tensor) -> TypeError:
    layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
    return TypeError(f"{name} must be a strided tensor, got a {layout} one")


def _wrong_shape(
    input: Tensor, target: Tensor, expected: tuple[int, ...], rows: tuple[int, ...]
) -> ValueError:
    return ValueError(
        f"target must have shape {tuple(expected)} for an input of shape {tuple(input.shape)} and "
        f"{target.dtype} targets, got {tuple(target.shape)}"
        f"{hints.of_target_shape(input, target, rows)}"
    )


def _vector(
    name: str, vector: Tensor, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Checked, contiguous and of the type that the loss is computed in."""
    check_vector(name, vector, shape, device)
    if vector.dtype is dtype and vector.is_contiguous():
        return vector
    return vector.to(dtype).contiguous()


def check_vector(
    name: str,
    vector: Tensor,
    shape: tuple[int, ...],
    device: torch.device,
    whose: str = "input",
) -> None:
    """Raise for another shape, type or device than whose vector it is asks for."""
    if not isinstance(vector, Tensor):
        hint = hints.of_vector_type(name, vector)
        raise TypeError(f"{name} must be a Tensor, got {type(vector).__name__}{hint}")
    if vector.layout is not torch.strided or vector.is_nested:
        raise _wrong_layout(name, vector)
    if vector.shape != shape:
        hint = hints.of_vector_shape(name, vector, shape)
        raise ValueError(
            f"{name} must have shape {tuple(shape)}{hints.meaning(name)}, got "
            f"{tuple(vector.shape)}{hint}"
        )
    if not vector.dtype.is_floating_point:
        hint = hints.of_vector_dtype(name, vector)
        raise TypeError(f"{name} must have a floating dtype, got {vector.dtype}{hint}")
    if vector.device != device:
        raise ValueError(f"{name} must be on {whose}'s device {device}, got {vector.device}")
    if vector.requires_grad:
        raise ValueError(f"{name} requires grad, but only input is differentiated: detach it")


def _normalizer(
    normalizer: float | Tensor, reduction: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """A 0-d tensor of the type that the loss is computed in."""
    if reduction != MEAN:
        name = REDUCTIONS[reduction]
        raise ValueError(f"normalizer replaces the mean's denominator: reduction is {name!r}")
    if isinstance(normalizer, Tensor):
        if normalizer.dtype in INTEGERS:
            normalizer = normalizer.to(dtype)
        return _vector("normalizer", normalizer, (), device, dtype)
    limits = torch.finfo(dtype)
    try:  # torch.compile has symbolic numbers, without hasattr
        good = limits.smallest_normal * limits.eps <= normalizer <= limits.max
    except (TypeError, ValueError):
        raise TypeError(
            f"normalizer must be a number or a 0-d tensor, got {normalizer!r}"
        ) from None
    if not good:
        given = f"{normalizer} for a loss in {_names((dtype,))}"
        raise ValueError(f"normalizer must be positive and finite, got {given}")
    if torch.compiler.is_compiling():  # which compiles full() anew for every number
        return torch.ones((), dtype=dtype, device=device) * normalizer
    return torch.full((), float(normalizer), dtype=dtype, device=device)


def _check_stats(return_stats: Any, soft: bool, spec: LossSpec) -> None:
    """Raise for what is no bool, and for what return_stats=True cannot go with."""
    if not is_bool(return_stats):
        raise TypeError(f"return_stats must be True or False, got {return_stats!r}")
    if not return_stats:
        return
    if soft:
        raise ValueError("return_stats sorts rows by their class: soft targets have none")
    if not spec.reduction or spec.inplace or spec.backend == "reference":
        raise ValueError(
            "return_stats needs a reduction, no inplace and a kernel, got "
            f"reduction={REDUCTIONS[spec.reduction]!r}, inplace={spec.inplace}, "
            f"backend={spec.backend!r}"
        )


def check_inplace(input: Tensor, target: Tensor) -> None:
    """Raise if the gradient may not be written over input."""
    if not input.requires_grad or not torch.is_grad_enabled():
        return  # then nothing is written
    if input.is_leaf or (input._base is not None and input._base.is_leaf):
        raise ValueError(
            "inplace=True would write the gradient over a leaf (a parameter or an input): "
            "pass logits that the model computed"
        )
    strides = list(zip(input.stride(), input.shape, strict=True))
    if torch.compiler.is_compiling():  # which never aliases, and cannot trace the rest
        if any(size > 1 and stride == 0 for stride, size in strides):
            raise _not_written(input, "neither expanded nor overlapping")
        return
    if input.is_neg():
        raise ValueError("inplace=True cannot write to a negated view: logits.resolve_neg()")
    real = type(input) is Tensor and type(target) is Tensor and not input.is_meta
    if real and target.data_ptr() == input.data_ptr() and input.numel():
        raise ValueError("inplace=True would write the gradient over target: it is the logits")
    span = 0  # of the dimensions with smaller strides
    for stride, size in sorted(strides):
        if size > 1 and stride <= span:
            raise _not_written(input, "neither expanded nor overlapping")
        span += (size - 1) * stride
    inner_dims = zip(input.shape[2:], input.stride()[2:], strict=True)
    dims = [(n, stride) for n, stride in inner_dims if n > 1]
    for (_, outer), (n, inner) in pairwise(dims):
        if outer != n * inner:
            raise _not_written(input, "that can be viewed as (N, C, d1 * ... * dk)")


def _not_written(input: Tensor, needed: str) -> ValueError:
    given = f"got one of shape {tuple(input.shape)} and strides {input.stride()}"
    return ValueError(f"inplace=True needs logits {needed}: {given}")


def check_class_vector(name: str, vector: Tensor, C: int) -> Tensor:
    """The vector, looked at once: (C,), finite, a weight >= 0, not differentiated."""
    check_vector(name, vector, (C,), vector.device)
    if name in ("weight", "pos_weight"):
        check_all(name, vector, is_weight, "finite and >= 0")
    else:
        check_all(name, vector, torch.isfinite, "finite")
    return vector


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
