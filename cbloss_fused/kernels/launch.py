"""The operators on a GPU: the steps of plan.py, launched.

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

from .. import reference
from ..call import REDUCTIONS, Formula, Inputs, is_dense
from ..reference import compute_dtype
from .layout import Device
from .plan import dense, plan, scaling
from .steps import Call, Plan, Step

INTERPRETED: bool = triton.knobs.runtime.interpret
_kept: dict[tuple[Any, ...], Any] = {}


def loss(logits: Tensor, *arguments: Any) -> bool:
    """The operator cbloss_fused::loss, see ops.py; False: too large for the kernels' indices."""
    inputs, formula = Inputs(*arguments[:6]), Formula.of(arguments[6])
    ignore_index, reduction, loss, grad, saved = arguments[7:]
    rows, C = logits.numel() // logits.shape[1], logits.shape[1]
    if rows == 0:
        loss.zero_()
        return True
    if formula.per_class or is_dense(inputs.target):
        return _dense_loss(logits, inputs, formula, ignore_index, reduction, loss, grad, saved)
    _check(inputs.target, torch.int64, rows)
    for vector, numel in zip(inputs[1:], (C, rows, 1, C, C), strict=True):
        if vector is not None:
            _check(vector, loss.dtype, numel)
    call = Call(
        logits.shape,
        logits.dtype,
        logits.stride(),
        None if grad is None else grad.stride(),
        grad is None or _aligned(logits, grad),
        formula,
        device_of(logits),
        logits.device.index,
        weight=inputs.weight is not None,
        sample_weight=inputs.sample_weight is not None,
        normalizer=inputs.normalizer is not None,
        logit_bias=inputs.logit_bias is not None,
        margin=inputs.margin is not None,
        ignore_index=ignore_index,
        reduction=reduction,
        per_row=loss.dim() > 0,
        saved=saved is not None,
    )
    steps = plan(call)
    if steps is None:
        return False
    scratch = [loss.new_empty(n) if n else None for n in steps[1:]]
    run(steps, (logits, *inputs, None, loss, grad, saved, *scratch, None), logits)
    return True


def gradient(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    logit_bias: Tensor | None,
    margin: Tensor | None,
    saved: Tensor,
    grad_loss: Tensor,
    numbers: Sequence[float],
    grad: Tensor,
) -> bool:
    """The operator cbloss_fused::gradient, see ops.py; False: as above."""
    formula, rows = Formula.of(numbers), logits.numel() // logits.shape[1]
    if rows == 0:
        return True
    if formula.per_class or is_dense(target):
        inputs = Inputs(target, weight, logit_bias=logit_bias, margin=margin)
        scale = saved.flatten()[:rows]
        return _run_dense(logits, inputs, formula, scale, grad_loss, None, grad)
    _check(target, torch.int64, rows)
    _check(saved, compute_dtype(logits.dtype), (1 if formula.sigmoid else 3) * rows)
    for vector in (logit_bias, margin):
        if vector is not None:
            _check(vector, saved.dtype, logits.shape[1])
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
        vector=grad_loss.dim() > 0,
        in_place=grad.data_ptr() == logits.data_ptr(),
        logit_bias=logit_bias is not None,
        margin=margin is not None,
    )
    steps = plan(call)
    if steps is None:
        return False
    inputs = Inputs(target, logit_bias=logit_bias, margin=margin)
    run(steps, (logits, *inputs, grad_loss, None, grad, saved, None, None, None, None), logits)
    return True


def _dense_loss(
    logits: Tensor, inputs: Inputs, formula: Formula, ignore_index: int | None, reduction: int,
    loss: Tensor, grad: Tensor | None, saved: Tensor | None,
) -> bool:  # fmt: skip
    """Soft targets, weights of classes: what is one number a row is left to PyTorch."""
    name = REDUCTIONS[reduction]
    scale = reference.row_scale(logits, inputs.by_row(logits), formula, ignore_index, name)[1]
    scale = scale.flatten()
    losses = loss.reshape(-1) if loss.dim() else loss.new_empty(scale.shape)
    if not _run_dense(logits, inputs, formula, scale, None, losses, grad):
        return False
    if not loss.dim():
        loss.copy_(losses.sum())
    if saved is not None:
        saved.zero_()[0].copy_(scale)
    return True


def _run_dense(
    logits: Tensor, inputs: Inputs, formula: Formula, scale: Tensor, grad_loss: Tensor | None,
    losses: Tensor | None, grad: Tensor | None,
) -> bool:  # fmt: skip
    weight = inputs.weight if formula.per_class else None
    target = inputs.target.view(torch.uint8) if inputs.target.dtype is torch.bool else inputs.target
    call = Call(
        logits.shape,
        logits.dtype,
        logits.stride(),
        None if grad is None else grad.stride(),
        True,
        formula,
        device_of(logits),
        logits.device.index,
        backward=losses is None,
        vector=grad_loss is not None and grad_loss.dim() > 0,
        weight=weight is not None,
        logit_bias=inputs.logit_bias is not None,
        margin=inputs.margin is not None,
    )
    strided = [logits, *([] if grad is None else [grad])]
    t_strides = None
    if is_dense(inputs.target):
        strided.append(target)
        t_strides = target.stride()
    steps = dense(call, t_strides, _vector(strided))
    if steps is None:
        return False
    tensors = (logits, target, weight, None, None, inputs.logit_bias, inputs.margin, grad_loss)
    run(steps, (*tensors, None, grad, None, scale, losses, None, None), logits)
    return True


def scale_gradient(grad: Tensor, grad_loss: Tensor, numel: int) -> None:
    """Multiply numel elements of memory from grad on by grad_loss, where that is not 1."""
    step = scaling(numel, grad.element_size(), device_of(grad), grad.device.index)
    run(step, (*(None,) * 7, grad_loss, None, grad, *(None,) * 5), grad)


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


def _vector(tensors: list[Tensor]) -> int:
    """Elements, at most 8, that whole vectors of every row of these may have."""
    odd = 8 | tensors[0].shape[1]
    for tensor in tensors:
        odd |= tensor.data_ptr() // tensor.element_size()
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


def run(steps: Plan, tensors: tuple[Tensor | None, ...], like: Tensor) -> None:
    """Launch the steps on the device of a tensor, in its current stream."""
    if INTERPRETED:
        for step in steps.steps:
            step.kernel[step.grid](*step.pick(tensors), *step.tail)
        return
    current_device, current_stream = _driver()
    device = current_device()
    if like.is_cuda and like.device.index != device:
        with torch.cuda.device(like.device):
            run(steps, tensors, like)
        return
    stream = current_stream(device)
    for step in steps.steps:
        pointers = step.pick(tensors)
        if step.compiled is None:
            step.compiled = _compile(step, pointers, device)
        _launch(step, (*pointers, *step.tail), stream)


@cache
def _driver() -> tuple[Any, Any]:
    active = driver.active
    return active.get_current_device, active.get_current_stream


def _launch(step: Step, arguments: tuple[Any, ...], stream: int) -> None:
    compiled, launcher = step.compiled
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    profiled = None  # what profilers hook in for; without one, their chain of calls is empty
    if getattr(enter, "calls", enter):
        profiled = compiled.launch_metadata(step.grid, stream, *arguments)
    function, metadata = compiled.function, compiled.packed_metadata
    launcher(*step.grid, stream, function, metadata, profiled, enter, leave, *arguments)


def _compile(step: Step, pointers: tuple[Tensor | None, ...], device: int) -> tuple[Any, Any]:
    """A compiled kernel and its launcher, kept by all that Triton specialises on.

    rows.kernel lets it look at no value and no alignment. Its own look at every argument of every
    launch costs 7 us.
    """
    types = tuple([p if p is None else p.dtype for p in pointers])
    constants = tuple([(type(c), c) for c in step.constants])  # 1 == True
    key = (step.kernel, types, constants, step.warps, device)
    compiled = _kept.get(key)
    if compiled is None:
        arguments = (*pointers, *step.tail)
        options = {"num_warps": step.warps, "enable_fp_fusion": True}  # whatever the default is
        if step.registers and torch.version.hip is None:
            options["maxnreg"] = step.registers
        compiled = step.kernel.warmup(*arguments, grid=step.grid, **options)
        _kept[key] = compiled
    return compiled, compiled.run  # which loads it
