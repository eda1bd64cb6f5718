"""The torch.autograd.Function of a linear head with its loss, and the operators under it.

The operators are opaque to torch.compile. They fill their buffers, as those of ops.py do:
    loss, saved, stats   see chunks.Result
    grad_*               see chunks.HeadGradients
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import chunks
from .autograd import (
    NOT_TRACED,
    refuse_batches,
    refuse_second_derivatives,
    scaled,
)
from .backends import REGISTRY, Backend
from .chunks import Head, HeadGradients, Result
from .inputs import Inputs, compute_dtype, sum_dtype, weights_classes
from .ops import NAMESPACE, library, operators
from .options import Formula, LossSpec
from .values import jit_tracing

_GIVEN = (
    "Tensor x, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, "
    "Tensor? sample_weight, Tensor? normalizer, Tensor? logit_bias, Tensor? margin, "
    "Tensor? pos_weight, float[] formula, int? ignore_index, int? background_index, "
    "int reduction, str backend, SymInt rows"
)
_GRADS = "Tensor(b!)? grad_x, Tensor(c!)? grad_weight, Tensor(d!)? grad_bias"
_SCHEMAS = {
    "_linear_loss": f"{_GIVEN}, Tensor(a!) loss, {_GRADS}, Tensor(e!)? saved, Tensor(f!)? stats",
    "_linear_gradient": f"{_GIVEN}, Tensor saved, Tensor grad_loss, {_GRADS}",
}
_HAS_BFLOAT16: bool = torch.cpu._is_avx512_bf16_supported()  # instructions that multiply


class LinearCall(NamedTuple):
    """What a call is, beside its tensors."""

    spec: LossSpec
    backend: Backend
    dtype: torch.dtype  # of the logits
    rows: int  # of a chunk
    return_stats: bool


def linear_loss(
    input: Tensor, weight: Tensor, bias: Tensor | None, inputs: Inputs, call: LinearCall
) -> tuple[Tensor, Tensor | None]:
    """(loss, statistics (4, C) or None) of an input (N, D) and a head."""
    head = input, weight, bias
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in head):
        return _forward(*head, inputs, call, (False,) * 3, False)[:2]
    if jit_tracing():
        raise NotImplementedError(NOT_TRACED)
    apply: Any = LinearLoss.apply
    return apply(*head, inputs, call)


def _forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, inputs: Inputs, call: LinearCall,
    needed: tuple[bool, ...], later: bool,
) -> tuple[Tensor, Tensor | None, HeadGradients, Tensor | None]:  # fmt: skip
    """(loss, statistics, gradients that are needed, saved for gradients that come later)."""
    spec = call.spec
    x, head = cast(input, weight, bias, call.dtype)
    grads = new_grads(x, head, needed)
    N, C = x.shape[0], weight.shape[0]  # len is no symbol
    loss = x.new_empty((N,) if not spec.reduction else (), dtype=compute_dtype(x.dtype))
    saved = loss.new_empty(chunks.saved_numbers(spec) * N) if later else None
    wide = sum_dtype(x.device)
    stats = loss.new_empty(4, C, dtype=wide) if call.return_stats else None
    _operators.loss(*_given(x, head, inputs, call), loss, *grads, saved, stats)
    return loss, stats, grads, saved


class LinearLoss(torch.autograd.Function):
    """Gradients of input, weight and bias in the forward; or, where spec.recomputes, afterwards."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, inputs: Inputs,
        call: LinearCall,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        spec, needed = call.spec, ctx.needs_input_grad[:3]
        later = any(needed) and spec.recomputes(call.dtype)
        now = (False,) * 3 if later else needed
        loss, stats, grads, saved = _forward(input, weight, bias, inputs, call, now, later)
        if later:
            if not weights_classes(spec.formula, inputs.target):
                inputs = inputs._replace(weight=None)  # in saved already; it may change in place
            ctx.save_for_backward(input, weight, bias, *inputs.of_gradient(), saved)
        else:
            ctx.save_for_backward(*cast_back(grads, input, weight, bias))
        ctx.call, ctx.later = call, later
        if stats is not None:
            ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)  # no zeros for stats
        return loss, stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:  # the loss was not used
            return (None,) * 5
        refuse_second_derivatives()
        if not ctx.later:
            return *all_scaled(ctx.saved_tensors, grad_loss, ctx.call.backend), None, None
        refuse_batches(grad_loss)
        input, weight, bias, target, w, *vectors, saved = ctx.saved_tensors
        x, head = cast(input, weight, bias, ctx.call.dtype)
        grads = new_grads(x, head, ctx.needs_input_grad[:3])
        inputs = Inputs(target, w, None, None, *vectors)
        incoming = grad_loss.contiguous()
        _operators.gradient(*_given(x, head, inputs, ctx.call), saved, incoming, *grads)
        return *cast_back(grads, input, weight, bias), None, None


def cast(
    input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Head]:
    """Of values of this dtype, in the type of their products."""
    wide = product_dtype(dtype, input.device.type)
    x, w = (tensor.to(dtype).to(wide) for tensor in (input, weight))
    return x, Head(w, None if bias is None else bias.to(dtype).to(wide))


def product_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """float32 for half types on a CPU without instructions for them, where torch's are slow."""
    if device_type != "cpu" or dtype.itemsize > 2:
        return dtype
    return dtype if dtype == torch.bfloat16 and _HAS_BFLOAT16 else torch.float32


def new_grads(x: Tensor, head: Head, needed: tuple[bool, ...]) -> HeadGradients:
    wide = compute_dtype(x.dtype)
    dtypes = x.dtype, wide, wide
    return HeadGradients(*(
        torch.empty(t.shape, dtype=dtype, device=t.device) if need and t is not None else None
        for need, t, dtype in zip(needed, (x, *head), dtypes, strict=True)
    ))  # fmt: skip


def cast_back(grads: HeadGradients, *of: Tensor | None) -> tuple[Tensor | None, ...]:
    """As the tensors whose gradients they are."""
    pairs = zip(grads, of, strict=True)
    return tuple(None if g is None or t is None else g.to(t.dtype) for g, t in pairs)


def _given(x: Tensor, head: Head, inputs: Inputs, call: LinearCall) -> tuple[Any, ...]:
    """The operators' first arguments."""
    return x, *head, *inputs, *call.spec[1:5], call.backend.name, call.rows


def all_scaled(
    grads: tuple[Tensor | None, ...], grad_loss: Tensor, backend: Backend
) -> tuple[Tensor | None, ...]:
    """Stored gradients of a head times grad_loss."""
    scale = backend.scale_gradient
    return tuple(None if g is None else scaled(g, grad_loss, True, scale) for g in grads)


# The operators


def _spec_of(
    numbers: Sequence[float], ignore_index: int | None, background_index: int | None, reduction: int
) -> LossSpec:
    formula, marks = Formula.of_numbers(numbers), (ignore_index, background_index)
    return LossSpec(formula, tuple(numbers), *marks, reduction, False, None, None)


def _loss(x: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, *given: Any) -> None:
    inputs, spec = Inputs(*given[:7]), _spec_of(*given[7:11])
    backend, rows, loss, *grads, saved, stats = given[11:]
    head = Head(linear_weight, linear_bias)
    result = Result(loss, HeadGradients(*grads), saved, stats)
    chunks.forward(x, head, inputs, spec, REGISTRY[backend], rows, result)


def _gradient(x: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, *given: Any) -> None:
    inputs, spec = Inputs(*given[:7]), _spec_of(*given[7:11])
    backend, rows, saved, grad_loss, *grads = given[11:]
    head, wanted = Head(linear_weight, linear_bias), HeadGradients(*grads)
    chunks.backward(x, head, inputs, spec, REGISTRY[backend], rows, saved, grad_loss, wanted)


class _Operators(NamedTuple):
    loss: Any
    gradient: Any


def _register() -> _Operators:
    for (name, arguments), code in zip(_SCHEMAS.items(), (_loss, _gradient), strict=True):
        library.define(f"{name}({arguments}) -> ()")
        library.impl(name, code, "CompositeExplicitAutograd")
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        library.impl(name, torch.library.fallthrough_kernel, "ADInplaceOrView")
        torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *_: None, lib=library)
    return _Operators(operators._linear_loss.default, operators._linear_gradient.default)


_operators = _register()
