"""The operators on a GPU: the launches of plan.py, made.

Nothing synchronises and nothing but scratch is allocated, so a CUDA graph can hold a training step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from ..inputs import Inputs, class_by_class, compute_dtype, is_soft, unknown_label
from ..options import Formula
from .call import Call, Launch, Plan
from .heuristics import Device
from .plan import plan, scaling

INTERPRETED: bool = triton.knobs.runtime.interpret
_kept: dict[tuple[Any, ...], Any] = {}


def loss(logits: Tensor, *arguments: Any) -> bool:
    """The operator cbloss_fused::loss, see ops.py; False: too large for the kernels' indices."""
    inputs, formula = Inputs(*arguments[:7]), Formula.of_numbers(arguments[7])
    ignore_index, background_index, reduction, loss, grad, saved = arguments[8:]
    rows, C = logits.numel() // logits.shape[1], logits.shape[1]
    if rows == 0:
        loss.zero_()
        return True
    for vector, numel in zip(inputs[1:], (C, rows, 1, C, C, C), strict=True):
        if vector is not None:
            _check(vector, loss.dtype, numel)
    target, soft, access = _target(logits, inputs, formula, grad)
    call = Call(
        logits.shape,
        logits.dtype,
        logits.stride(),
        None if grad is None else grad.stride(),
        grad is None or _aligned(logits, grad),
        formula,
        device_of(logits),
        logits.device.index,
        soft=soft,
        access=access,
        weight=inputs.weight is not None,
        sample_weight=inputs.sample_weight is not None,
        normalizer=inputs.normalizer is not None,
        logit_bias=inputs.logit_bias is not None,
        margin=inputs.margin is not None,
        pos_weight=inputs.pos_weight is not None,
        ignore_index=ignore_index if soft is None else None,
        background_index=background_index,
        unknown=unknown_label(inputs.target.dtype, ignore_index) if formula.sigmoid else None,
        reduction=reduction,
        per_row=loss.dim() > 0,
        saved=saved is not None,
    )
    planned = plan(call)
    if planned is None:
        return False
    scratch = [loss.new_empty(n) if n else None for n in planned[1:]]
    run(planned, (logits, target, *inputs[1:], None, loss, grad, saved, *scratch, None), logits)
    return True


def gradient(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    logit_bias: Tensor | None,
    margin: Tensor | None,
    pos_weight: Tensor | None,
    saved: Tensor,
    grad_loss: Tensor,
    numbers: Sequence[float],
    ignore_index: int | None,
    background_index: int | None,
    grad: Tensor,
) -> bool:
    """The operator cbloss_fused::gradient, see ops.py; False: as above."""
    formula, rows = Formula.of_numbers(numbers), logits.numel() // logits.shape[1]
    if rows == 0:
        return True
    compute = compute_dtype(logits.dtype)
    _check(saved, compute, (1 if formula.sigmoid else 3) * rows)
    _check(grad_loss, compute, rows if grad_loss.dim() else 1)
    inputs = Inputs(target, weight, logit_bias=logit_bias, margin=margin, pos_weight=pos_weight)
    for vector in inputs[1:]:
        if vector is not None:
            _check(vector, compute, logits.shape[1])
    target, soft, access = _target(logits, inputs, formula, grad)
    call = Call(
        logits.shape,
        logits.dtype,
        logits.stride(),
        grad.stride(),
        _aligned(logits, grad),
        formula,
        device_of(logits),
        logits.device.index,
        backward=True,
        soft=soft,
        access=access,
        vector=grad_loss.dim() > 0,
        in_place=grad.data_ptr() == logits.data_ptr(),
        weight=weight is not None,
        logit_bias=logit_bias is not None,
        margin=margin is not None,
        pos_weight=pos_weight is not None,
        background_index=background_index,
        unknown=unknown_label(inputs.target.dtype, ignore_index) if formula.sigmoid else None,
    )
    planned = plan(call)
    if planned is None:
        return False
    tensors = (logits, target, *inputs[1:], grad_loss, None, grad, saved, None, None, None, None)
    run(planned, tensors, logits)
    return True


def _target(
    logits: Tensor, inputs: Inputs, formula: Formula, grad: Tensor | None
) -> tuple[Tensor, tuple[torch.dtype, tuple[int, ...]] | None, int]:
    """The target as kernels read it, Call.soft and Call.access."""
    target, vectors = inputs.target, (inputs.weight, inputs.pos_weight)
    if not is_soft(target):
        _check(target, torch.int64, logits.numel() // logits.shape[1])
        by_class = class_by_class(formula, inputs)
        return target, None, _access([logits, grad], vectors) if by_class else 1
    if target.shape != logits.shape:
        raise ValueError(
            f"the operator needs soft targets of the logits' shape {tuple(logits.shape)}, got "
            f"{tuple(target.shape)}"
        )
    if target.dtype is torch.bool:
        target = target.view(torch.uint8)
    return target, (target.dtype, target.stride()), _access([logits, grad, target], vectors)


def scale_gradient(grad: Tensor, grad_loss: Tensor, numel: int) -> None:
    """Multiply numel elements of memory from grad on by grad_loss, where that is not 1."""
    planned = scaling(numel, grad.dtype, grad_loss.dtype, device_of(grad), grad.device.index)
    run(planned, (*(None,) * 8, grad_loss, None, grad, *(None,) * 5), grad)


def _check(vector: Tensor, dtype: torch.dtype, numel: int) -> None:
    """What functional.py sees to, for those who call the operators themselves."""
    if vector.dtype is not dtype or vector.numel() != numel or not vector.is_contiguous():
        raise ValueError(
            f"the operator needs {numel} contiguous elements of {dtype}, got {vector.numel()} of "
            f"{vector.dtype}"
        )


def _aligned(logits: Tensor, grad: Tensor) -> bool:
    """Whether every row of grad lies modulo 16 bytes as the row of logits does."""
    apart, itemsize = grad.data_ptr() - logits.data_ptr(), logits.element_size()
    if logits.stride() != grad.stride():
        for dim, size in enumerate(logits.shape):
            if size > 1 and dim != 1:
                apart |= (grad.stride(dim) - logits.stride(dim)) * itemsize
    return apart % 16 == 0


def _access(tensors: list[Tensor | None], vectors: tuple[Tensor | None, ...]) -> int:
    """Elements, at most 8, that whole vectors of every row of these, and of (C,) vectors, have."""
    odd = 8
    for vector in vectors:
        if vector is not None:
            odd |= vector.data_ptr() // vector.element_size()
    for tensor in tensors:
        if tensor is not None:
            odd |= tensor.shape[1] | tensor.data_ptr() // tensor.element_size()
            for dim, size in enumerate(tensor.shape):
                if size > 1 and dim != 1:
                    odd |= tensor.stride(dim)
    return odd & -odd


def device_of(tensor: Tensor) -> Device:
    """An H100's numbers where there is no GPU: the interpreter's, and code compiled ahead."""
    return _device(tensor.device.index) if tensor.is_cuda else Device(132, 32)


@cache
def _device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.multi_processor_count, getattr(properties, "warp_size", 32))


# Launching ---------------------------------------------------------------------------------------


def run(planned: Plan, tensors: tuple[Tensor | None, ...], like: Tensor) -> None:
    """Make the launches on the device of a tensor, in its current stream."""
    if INTERPRETED:
        for launch in planned.launches:
            launch.kernel[launch.grid](*launch.pick(tensors), *launch.tail)
        return
    current_device, current_stream = _driver()
    device = current_device()
    if like.is_cuda and like.device.index != device:
        with torch.cuda.device(like.device):
            run(planned, tensors, like)
        return
    stream = current_stream(device)
    for launch in planned.launches:
        pointers = launch.pick(tensors)
        if launch.compiled is None:
            launch.compiled = _compile(launch, pointers, device)
        _launch(launch, (*pointers, *launch.tail), stream)


@cache
def _driver() -> tuple[Any, Any]:
    active = driver.active
    return active.get_current_device, active.get_current_stream


def _launch(launch: Launch, arguments: tuple[Any, ...], stream: int) -> None:
    compiled, launcher = launch.compiled
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    profiled = None  # what profilers hook in for; without one, their chain of calls is empty
    if getattr(enter, "calls", enter):
        profiled = compiled.launch_metadata(launch.grid, stream, *arguments)
    function, metadata = compiled.function, compiled.packed_metadata
    launcher(*launch.grid, stream, function, metadata, profiled, enter, leave, *arguments)


def _compile(launch: Launch, pointers: tuple[Tensor | None, ...], device: int) -> tuple[Any, Any]:
    """A compiled kernel and its launcher, kept by all that Triton specialises on.

    numerics.kernel lets it look at no value and no alignment. Its own look at every argument of
    every launch costs 7 us.
    """
    types = tuple([p if p is None else p.dtype for p in pointers])
    constants = tuple([(type(c), c) for c in launch.constants])  # 1 == True
    key = (launch.kernel, types, constants, launch.warps, launch.registers, device)
    compiled = _kept.get(key)
    if compiled is None:
        arguments = (*pointers, *launch.tail)
        options = {"num_warps": launch.warps, "enable_fp_fusion": True}  # whatever the default is
        if launch.registers and torch.version.cuda is not None:
            options["maxnreg"] = launch.registers
        compiled = launch.kernel.warmup(*arguments, grid=launch.grid, **options)
        _kept[key] = compiled
    return compiled, compiled.run  # which loads it
