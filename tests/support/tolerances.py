"""How near to the oracle a result must be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cbloss_fused.inputs import compute_dtype

EXACT = 1e-12, 2e-5  # relative, computed in float64 or float32
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a spacing, relative
SMALLEST = {torch.float64: 2.3e-308, torch.float16: 2.0**-24}  # float32: may be flushed to 0
FLUSHED = 1.2e-38  # a class


def assert_loss(
    got: Tensor,
    want: Tensor,
    dtype: torch.dtype,
    C: int = 1,
    slack: float | Tensor = 0,
    **context: object,
) -> None:
    """The loss, or every row's, against float64; C: where flushed terms count."""
    assert got.dtype == compute_dtype(dtype)
    assert got.shape == want.shape
    rtol = EXACT[0] if dtype == torch.float64 else EXACT[1]
    smallest = SMALLEST[dtype] if dtype == torch.float64 else FLUSHED
    bound = rtol * want.abs() + C * smallest + slack
    _assert_within(got, want, bound, "loss", context)


def assert_grad(
    got: Tensor, want: Tensor, dtype: torch.dtype, slack: float | Tensor = 0, **context: object
) -> None:
    """The gradient (N, C, ...): relative to the row's largest, half types rounded once."""
    assert got.dtype == dtype
    assert got.shape == want.shape
    rtol = EXACT[0] if dtype == torch.float64 else EXACT[1]
    largest = want.abs().amax(1, keepdim=True)
    smallest = SMALLEST.get(dtype, want.shape[1] * FLUSHED)
    bound = rtol * largest + ROUNDING.get(dtype, 0) * want.abs() + smallest
    bound = bound + slack
    _assert_within(got, want, bound, "gradient", context)


def _assert_within(
    got: Tensor, want: Tensor, bound: Tensor, what: str, context: dict[str, object]
) -> None:
    got = got.detach().double()
    good = ((got - want).abs() <= bound) | (got == want) | (got.isnan() & want.isnan())
    if good.all():
        return
    where = tuple((~good).nonzero()[0].tolist())
    told = "".join(f", {key} {value}" for key, value in context.items())
    pytest.fail(
        f"{what}{list(where)} is {got[where]:.9g}, expected {want[where]:.9g} "
        f"within {bound.expand_as(want)[where]:.2g} "
        f"({int((~good).sum())} of {good.numel()} wrong{told})"
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN too."""
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(integer), b.contiguous().view(integer)
    )
