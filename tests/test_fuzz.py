"""Random calls on every backend against the reference in float64: `make fuzz`.

A call raises the same error everywhere, or agrees. CBLOSS_FUZZ is the number of calls.
"""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from support.backends import BACKENDS, DEVICE, INTERPRETED, Backend
from support.calls import Call, calls
from support.tolerances import assert_grad, assert_loss
from torch import Tensor

from cbloss_fused import (
    ClassShards,
    ClassStats,
    class_balanced_loss,
    linear_class_balanced_loss,
)
from cbloss_fused.inputs import is_soft

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function:DeprecationWarning"),  # torch's
    pytest.mark.slow,
    pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="fuzzes what runs on a CPU"),
]
EXAMPLES = int(os.environ.get("CBLOSS_FUZZ", "300"))
ERRORS = (ValueError, TypeError, IndexError, RuntimeError)
BEST = next(iter(BACKENDS.values()))
OF_VALUES = (ValueError, IndexError)  # GPU kernels take values as given


def told(error: Exception, call: Call) -> str:
    """The message: C++ writes -3.0 as -3; a head's soft targets have another shape."""
    permuted = call.mode == "linear" and is_soft(call.target)
    return re.sub(r"\.0\b|^target\[[\d, ]*\]" if permuted else r"\.0\b", "", str(error))


def run(call: Call, backend: Any) -> tuple[Tensor, Tensor | None, ClassStats | None]:
    """Loss, gradient and statistics, in the call's mode."""
    options = {"backend": backend.argument} | call.options
    if call.mode == "linear":
        return *of_head(call, options), None
    leaf = call.logits.detach().requires_grad_(call.mode != "no_grad")
    x = leaf
    if call.mode in ("recompute", "stored"):
        options["recompute"] = call.mode == "recompute"
    if call.mode == "inplace":  # what a model computed, with the strides of the logits
        x = leaf.clone(memory_format=torch.preserve_format)
        options["inplace"] = True
    loss_of: Any = class_balanced_loss
    if call.mode == "compile" and backend is BEST:  # the others' operators are traced alike
        torch._dynamo.reset()
        loss_of = torch.compile(class_balanced_loss, fullgraph=True, backend="aot_eager")
    if call.mode == "shards":  # of one rank, whose code is its own
        options["shards"] = ClassShards(call.logits.shape[min(1, call.logits.dim() - 1)])
    stats = None
    if call.mode == "stats":
        loss, stats = loss_of(x, call.target, call.weight, return_stats=True, **options)
    else:
        loss = loss_of(x, call.target, call.weight, **options)
    if call.mode == "no_grad":
        return loss, None, None
    incoming = torch.ones_like(loss)
    if call.mode == "retain_graph":
        (first,) = torch.autograd.grad(loss, leaf, incoming, retain_graph=True)
        (again,) = torch.autograd.grad(loss, leaf, incoming)
        assert torch.equal(first.nan_to_num(), again.nan_to_num())
    else:
        (again,) = torch.autograd.grad(loss, leaf, incoming)
    return loss.detach(), again, stats


def of_head(call: Call, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Loss and gradient of a head whose products are exact: they are the logits."""

    def with_classes_last(values: Tensor) -> Tensor:
        return values.movedim(min(1, values.dim() - 1), -1)

    leaf = with_classes_last(call.logits.detach()).requires_grad_()
    target = with_classes_last(call.target) if is_soft(call.target) else call.target
    head = torch.eye(leaf.shape[-1], dtype=leaf.dtype)
    loss = linear_class_balanced_loss(leaf, head, target, call.weight, chunk_size=3, **options)
    (grad,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
    return loss.detach(), grad.movedim(-1, min(1, grad.dim() - 1))


def assert_stats(call: Call, loss: Tensor, stats: ClassStats) -> None:
    """Rows of each class, counted here; sums of the classes; a mean of probabilities."""
    counted = call.target.flatten().long()
    for name in ("ignore_index", "background_index"):
        if call.options.get(name) is not None:
            counted = counted[counted != call.options[name]]
    rows = torch.bincount(counted, minlength=stats.rows.numel())
    assert torch.equal(stats.rows, rows.to(stats.rows.dtype))
    if call.options.get("background_index") is None:
        total = stats.loss.sum().to(loss.dtype)
        torch.testing.assert_close(total, loss, rtol=1e-5, atol=1e-6, equal_nan=True)
    p = stats.probability[rows > 0]
    assert ((p >= 0) & (p <= 1 + 1e-6) | p.isnan()).all()


def expected(call: Call) -> tuple[Tensor, Tensor] | Exception:
    """From the reference in float64, of the same numbers.

    Of extreme logits by its explicit gradient: that of autograd is NaN where a limit is not, and
    exp(z - lse) is off by the rounding of a large lse.
    """
    leaf = call.logits.detach().double().requires_grad_()

    def result(name: Any) -> tuple[Tensor, Tensor]:
        loss = class_balanced_loss(leaf, call.target, call.weight, backend=name, **call.options)
        (grad,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
        return loss.detach(), grad

    try:
        found = result("reference")
    except ERRORS as error:
        return error
    if not call.extreme:
        return found
    with Backend(None, fallback=True).active():
        return result(None)


def slack_of(call: Call) -> float:
    """What cancels: as test_every_combination_of_options has it, times what multiplies rows."""
    options, f64 = call.options, call.logits.dtype == torch.float64
    cancelling = 1.0 if options["label_smoothing"] else 0.0
    if call.target.shape == call.logits.shape and call.target.numel():
        cancelling = max(1.0, call.target.double().clamp(min=0).sum(1).max().item())
    slack = (1e-14 if f64 else 4e-7) * cancelling
    if options.get("clip") and not f64:
        slack = 1e-6
    return slack * 4 * options["logit_scale"]


def rounding_of_z(call: Call) -> float:
    """Relative, of (1 - p)^gamma (-log p), where float32 z of bias, margin and scale is rounded."""
    options = call.options
    vectors = [options[name] for name in ("logit_bias", "margin") if options.get(name) is not None]
    scale, x = options["logit_scale"], call.logits.double()
    if (scale == 1 and not vectors) or call.logits.dtype == torch.float64 or not x.numel():
        return 0.0
    largest = scale * (x.abs().max().item() + sum(v.abs().max().item() for v in vectors))
    return (1 + options["gamma"]) * 1.2e-7 * largest


def assert_agrees(call: Call, got: Any, want: tuple[Tensor, Tensor]) -> None:
    dtype, C = call.logits.dtype, call.logits.shape[min(1, call.logits.dim() - 1)]
    slack = slack_of(call) * max(1, want[0].numel(), call.target.numel())
    relative = 0.0 if call.extreme else rounding_of_z(call)
    classes = C * max(1, call.target.numel())
    loss, exact = both_finite(got[0], want[0])
    of_loss = relative * exact.abs() if relative else 0.0  # 0 times infinity is NaN
    assert_loss(loss, exact, dtype, classes, slack=slack + of_loss)
    if got[1] is not None:
        grad, exact = both_finite(got[1], want[1])
        if grad.dim() == 1:
            grad, exact = grad[None], exact[None]
        of_grad = relative * exact.abs().amax(1, keepdim=True) if relative else 0.0
        assert_grad(grad, exact, dtype, slack=slack + of_grad)


def both_finite(got: Tensor, want: Tensor) -> tuple[Tensor, Tensor]:
    """0 where both are NaN, or infinite alike: a bounded one is the largest number of its type."""
    same = (got.isnan() & want.isnan()) | (~want.isfinite() & (got == want))
    same |= (want.abs() > 1e100) & (got.double().abs() > 1e30) & (got.sign() == want.sign())
    return got.masked_fill(same, 0), want.masked_fill(same, 0)


@given(call=calls())
@settings(
    max_examples=EXAMPLES, derandomize=False, print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
def test_every_backend_agrees_or_raises(call):
    want = expected(call)
    if isinstance(want, Exception) and call.mode == "compile":
        call = call._replace(mode="plain")  # what is traced raises the compiler's errors
    for name, backend in BACKENDS.items():
        with backend.active():
            try:
                got = run(call, backend)
            except ERRORS as error:
                if call.mode == "inplace" and str(error).startswith("inplace=True needs"):
                    continue  # strides of the inner dimensions
                assert type(error) is type(want), f"{name}: {error!r}, reference: {want!r}"
                assert told(error, call) == told(want, call), f"{name}: {error}, reference: {want}"
                continue
        if isinstance(want, Exception):
            assert backend.gpu and isinstance(want, OF_VALUES), f"{name} did not raise {want!r}"
            continue
        if got[2] is not None:
            assert_stats(call, got[0], got[2])
        try:
            assert_agrees(call, got, want)
        except pytest.fail.Exception as failed:
            pytest.fail(f"{name}: {failed}")
