"""The last layer and its loss together, so that logits of all rows are never in memory."""

from __future__ import annotations

from math import prod
from typing import Any, Literal, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from . import hints
from .arguments import (
    Given,
    check_inputs,
    check_vector,
    exports_gradient,
    refuse_shards,
    refuse_transforms,
)
from .arrays import integer_or_none
from .autograd import differentiable
from .backends import choose
from .chunks import chunk_rows
from .dispatch import dispatch
from .distributed import over_ranks
from .dtensor import is_dtensor
from .groups import ProcessGroup
from .inputs import class_by_class, compute_dtype, is_soft, sum_dtype
from .linear_autograd import LinearCall, linear_loss, product_dtype
from .options import MEAN, LossOptions, LossSpec, lists_options, spec_of
from .row_weights import denominator_of
from .sharded import checked
from .sharded_linear import ShardedLinearCall, ShardedLinearLoss
from .shards import ClassShards, Part
from .stats import ClassStats
from .values import check_values, in_own_shape, jit_tracing


@overload
def linear_class_balanced_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    chunk_size: int | None = None,
    logit_bias: Tensor | None = None,
    margin: Tensor | None = None,
    sample_weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    shards: ClassShards | None = None,
    return_stats: Literal[False] = False,
    **options: Unpack[LossOptions],
) -> Tensor: ...
@overload
def linear_class_balanced_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    chunk_size: int | None = None,
    logit_bias: Tensor | None = None,
    margin: Tensor | None = None,
    sample_weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    shards: ClassShards | None = None,
    return_stats: Literal[True],
    **options: Unpack[LossOptions],
) -> tuple[Tensor, ClassStats]: ...
@overload
def linear_class_balanced_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    chunk_size: int | None = None,
    logit_bias: Tensor | None = None,
    margin: Tensor | None = None,
    sample_weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    shards: ClassShards | None = None,
    return_stats: bool,
    **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, ClassStats]: ...
@lists_options
def linear_class_balanced_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    chunk_size: int | None = None,
    logit_bias: Tensor | None = None,
    margin: Tensor | None = None,
    sample_weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    shards: ClassShards | None = None,
    return_stats: bool = False,
    **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, ClassStats]:
    """`class_balanced_loss` of the logits of a linear layer, which are never all in memory.

    The same loss and gradients as class_balanced_loss(F.linear(input, linear_weight, linear_bias),
    ...): the logits of some rows at a time lie in one buffer, which their gradient overwrites.
    Beside the gradients of input, linear_weight and linear_bias, which the forward computes, that
    buffer is all the memory it takes.

    Args:
        input: (..., D), any leading dimensions; float32, bfloat16, float16 or float64.
        linear_weight: (C, D), of input's dtype. Under autocast both are cast, as in F.linear.
        target: class indices (...), or soft or multi-hot labels (..., C).
        weight: (C,) class weights.
        linear_bias: (C,), of input's dtype.
        chunk_size: rows whose logits are in memory at a time, at least 1. None: as many as 128 MiB
            hold, but at least 128; on a GPU 512 MiB and 1024 rows. The gradient of linear_weight is
            read and written once for each chunk: small chunks are slow.
        sample_weight: (...), as target's rows.
        shards: as in `class_balanced_loss`: linear_weight and linear_bias are of this rank's
            classes (tensor parallel), input, target and chunk_size the same on every rank. The
            gradient of input is all-reduced, once.
        options: logit_bias, margin, pos_weight, normalizer, return_stats and all others as in
            `class_balanced_loss`, but for inplace and recompute, which have no meaning here.
            backend="reference" computes all logits, in eager PyTorch.

    input, linear_weight and linear_bias are differentiated; what requires no grad costs no product.
    The gradients of half types are summed in float32. With reduction="none", and for float16, the
    logits are computed once more in the backward.

    Returns:
        As `class_balanced_loss`; for "none" (...).

    Raises:
        IndexError, RuntimeError: as `class_balanced_loss`.
        ValueError: as there; shapes that do not fit; inplace or recompute; chunk_size below 1.
        TypeError: as there; dtypes that differ.
        NotImplementedError: as there; DTensors. Where FSDP shards the head, call a module that
            holds it: `LinearClassBalancedLoss`.

    Source: as `class_balanced_loss`.

    >>> import torch
    >>> from cbloss_fused import linear_class_balanced_loss
    >>> input, head = torch.ones(4, 8, requires_grad=True), torch.zeros(3, 8, requires_grad=True)
    >>> loss = linear_class_balanced_loss(input, head, torch.tensor([0, 1, 2, 2]))
    >>> loss.backward()
    >>> loss
    tensor(1.0986, grad_fn=<LinearLossBackward>)
    """
    spec = spec_of("linear_class_balanced_loss", options)
    given = target, weight, sample_weight, normalizer, logit_bias, margin, pos_weight
    head = linear_weight, linear_bias
    return linear_loss_of(input, head, given, spec, return_stats, chunk_size, shards=shards)


def linear_loss_of(
    input: Tensor, head: tuple[Any, Any], given: Given, spec: LossSpec,
    return_stats: bool, chunk_size: int | None,
    group: ProcessGroup | None = None, shards: ClassShards | None = None,
) -> Tensor | tuple[Tensor, ClassStats]:  # fmt: skip
    """Of checked options; group: ranks whose rows have one mean."""
    call = input, head, given, spec, return_stats, chunk_size
    try:
        return _whole(*call, group) if shards is None else _sharded(*call, shards)
    except (IndexError, ValueError) as error:
        target = given[0]
        if not isinstance(input, Tensor) or not isinstance(target, Tensor):
            raise
        rows = input.shape[:-1]
        flat = (rows.numel(), *target.shape[len(rows) :])
        shapes = {"target": (flat, target.shape), "sample_weight": ((rows.numel(),), rows)}
        raise in_own_shape(error, shapes) from None


def _whole(
    input: Tensor, head: tuple[Any, Any], given: Given, spec: LossSpec,
    return_stats: bool, chunk_size: int | None, group: ProcessGroup | None,
) -> Tensor | tuple[Tensor, ClassStats]:  # fmt: skip
    """Where no class lies on another rank."""
    inputs: Any = None

    def check() -> Tensor:
        nonlocal inputs
        logits, flat = _checked(input, head, given, spec)
        inputs = check_inputs(logits, *flat, spec, return_stats)
        return logits

    def denominator() -> Tensor:
        logits = check()
        if logits.is_cpu:
            check_values(logits, inputs, spec.formula, spec.ignore_index)
        return denominator_of(inputs, logits.shape[1], spec, sum_dtype(logits.device))

    if group is None:
        check()
    else:
        normalizer = over_ranks(denominator, input, group)
        dtype = compute_dtype(_logits_dtype(input))
        inputs = inputs._replace(normalizer=normalizer.to(dtype))
        spec = spec._replace(reduction=MEAN)
    linear_weight, linear_bias = head
    rows, x, C = input.shape[:-1], input.reshape(-1, input.shape[-1]), len(linear_weight)
    if spec.backend == "reference" or exports_gradient(input, *head):
        found = dispatch(F.linear(x, linear_weight, linear_bias), inputs, spec, return_stats)
        return cast(Tensor, found).reshape(() if spec.reduction else rows)
    refuse_transforms(input, linear_weight, linear_bias)
    backend = choose(input.device.type, spec.backend, class_by_class(spec.formula, inputs))
    if is_soft(inputs.target) and not spec.formula.sigmoid:  # it ignores no row
        spec = spec._replace(ignore_index=None)
    dtype = _logits_dtype(input)
    size = _rows_of_chunk(chunk_size, input, C, product_dtype(dtype, input.device.type))
    call = LinearCall(spec, backend, dtype, size, return_stats)
    loss, stats = linear_loss(x, linear_weight, linear_bias, inputs, call)
    if not spec.reduction:
        loss = loss.reshape(rows)
    return loss if stats is None else (loss, ClassStats.of(stats))


def _sharded(
    input: Tensor, head: tuple[Any, Any], given: Given, spec: LossSpec,
    return_stats: bool, chunk_size: int | None, shards: ClassShards,
) -> Tensor | tuple[Tensor, ClassStats]:  # fmt: skip
    """head: of this rank's classes."""

    def make() -> tuple[Tensor, Given]:
        found = _checked(input, head, given, spec, shards)
        check_chunk_size(chunk_size)
        refuse_transforms(input, *head)
        refuse_shards(input, *head)
        return found

    _, inputs, r = checked(make, input, spec, return_stats, shards)
    linear_weight, linear_bias = head
    backend = choose(input.device.type, spec.backend, class_by_class(spec.formula, inputs))
    part, dtype = Part.of(inputs, spec, shards), _logits_dtype(input)
    # The same on every rank: CPUs may differ in their instructions for a half type's products.
    buffer = compute_dtype(dtype) if input.is_cpu else dtype
    size = _rows_of_chunk(chunk_size, input, max(shards.sizes), buffer)
    call = ShardedLinearCall(part, r, backend, dtype, size, return_stats)
    apply: Any = ShardedLinearLoss.apply
    x = input.reshape(-1, input.shape[-1])
    loss, stats = apply(*differentiable(x, linear_weight, linear_bias), call)
    if not spec.reduction:
        loss = loss.reshape(input.shape[:-1])
    return loss if stats is None else (loss, ClassStats.of(stats))


def _checked(
    input: Any, head: tuple[Any, Any], given: Given, spec: LossSpec,
    shards: ClassShards | None = None,
) -> tuple[Tensor, Given]:  # fmt: skip
    """What stands for the logits (N, C), and what goes with them, one row after the other."""
    _check_head(input, *head, spec, shards)
    C, (target, weight, sample_weight, normalizer, bias, margin, pos_weight) = len(head[0]), given
    x = input.detach().reshape(-1, input.shape[-1])
    logits = x.new_empty((), dtype=_logits_dtype(input)).expand(x.shape[0], C)
    if sample_weight is not None:
        check_vector("sample_weight", sample_weight, input.shape[:-1], input.device)
        sample_weight = sample_weight.reshape(-1)
    target = _flat(input.shape[:-1], C, target)
    return logits, (target, weight, sample_weight, normalizer, bias, margin, pos_weight)


def _rows_of_chunk(chunk_size: int | None, input: Tensor, C: int, buffer: torch.dtype) -> int:
    shape = input.shape[:-1]  # numel is no symbol, and elements are tensors under torch.jit.trace
    rows = shape.numel() if jit_tracing() else prod(shape)
    return check_chunk_size(chunk_size) or chunk_rows(rows, C, buffer, input.device.type)


def _check_head(
    input: Any, weight: Any, bias: Any, spec: LossSpec, shards: ClassShards | None
) -> None:
    """Raise for tensors that are no head of this input."""
    check_linear_options(spec)
    for name, tensor in (("input", input), ("linear_weight", weight), ("linear_bias", bias)):
        if tensor is None and name == "linear_bias":
            continue
        if not isinstance(tensor, Tensor):
            hint = hints.of_layer(name, tensor)
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}{hint}")
        if is_dtensor(tensor):
            raise NotImplementedError(f"{name} must be a plain tensor, got a DTensor")
        kept = torch.float64 in (tensor.dtype, input.dtype)  # autocast leaves it as it is
        if tensor.dtype != input.dtype and (kept or not _autocasts(input.device.type)):
            hint = hints.of_head_dtype(name, tensor)
            raise TypeError(
                f"{name} must have input's dtype {input.dtype}, got {tensor.dtype}{hint}"
            )
        if tensor.device != input.device:
            raise ValueError(
                f"{name} must be on input's device {input.device}, got {tensor.device}"
            )
    if input.dim() < 1 or input.shape[-1] < 1:
        raise ValueError(f"input must be (..., D) with D >= 1, got shape {tuple(input.shape)}")
    D = input.shape[-1]
    wrong = len(weight) < 1 if shards is None else len(weight) != shards.num_local_classes
    if weight.dim() != 2 or weight.shape[1] != D or wrong:
        C = "C" if shards is None else shards.num_local_classes
        raise ValueError(
            f"linear_weight must have shape ({C}, {D}) for an input of shape {tuple(input.shape)}, "
            f"got {tuple(weight.shape)}{hints.of_head_shape(weight, D)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"linear_bias must have shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}"
        )


def check_linear_options(spec: LossSpec) -> None:
    if spec.inplace or spec.recompute is not None:
        raise ValueError(
            "inplace and recompute are about logits that are given: here they lie in a buffer, got "
            f"inplace={spec.inplace}, recompute={spec.recompute}"
        )


def check_chunk_size(given: Any) -> int | None:
    size = integer_or_none("chunk_size", given)
    if size is not None and size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {size}")
    return size


def _logits_dtype(input: Tensor) -> torch.dtype:
    """As F.linear's, whose inputs autocast casts, but for float64."""
    device_type = input.device.type
    if _autocasts(device_type) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return input.dtype


def _autocasts(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)  # meta cannot be asked


def _flat(rows: torch.Size, C: int, target: Any) -> Any:
    """The target of (N, C) logits; what is no tensor is left to its check."""
    if not isinstance(target, Tensor):
        return target
    shape = (*rows, C) if is_soft(target) else tuple(rows)
    if target.shape != shape:
        raise ValueError(
            f"target must have shape {shape} for {target.dtype} targets, {C} classes and rows "
            f"{tuple(rows)} of input, got {tuple(target.shape)}{hints.of_head_target(target, C)}"
        )
    return target.reshape(-1, C) if is_soft(target) else target.reshape(-1)
