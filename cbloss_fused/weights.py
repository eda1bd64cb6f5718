"""From class counts to class weights, in float64 on the CPU; results go to the counts' device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias, TypeVar, overload

import torch
from torch import Tensor, nn

from . import caller, hints
from .arrays import Array, Vector, class_vector, device, reals, require

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Empty: TypeAlias = Literal["error", "zero", "one"]  # what a class without samples gets


def effective_number(counts: Vector, beta: float | Vector) -> Tensor:
    """Effective number of samples of each class, (1 - beta^n) / (1 - beta).

    No power is formed and nothing cancels: the relative error is below 1e-12 for n >= 1. Warns of
    frequencies in the place of counts, as `class_balanced_weights`.

    Args:
        counts: (C,) samples per class, finite and >= 0, fractions allowed.
        beta: in [0, 1]: one for all classes or (C,), one per class.
    Returns:
        (C,) float64 on the device of counts: 0 where n = 0, n where beta = 1, 1 where beta = 0 < n.
    Raises:
        ValueError: beta outside [0, 1], a negative or non-finite count, or a wrong shape.
        TypeError: counts or beta are not real numbers.
    Source: Cui et al., CVPR 2019 (arXiv 1901.05555), section 3.

    >>> effective_number([0, 1, 10, 1000], beta=0.9)
    tensor([ 0.0000,  1.0000,  6.5132, 10.0000], dtype=torch.float64)
    """
    n = checked_counts(counts)
    b = _beta(beta, len(n))
    warn_of_frequencies(n, b)
    return _effective_number(n, b).to(device(counts))


@overload
def beta_from_prototypes(N: float) -> float: ...
@overload
def beta_from_prototypes(N: Tensor | Sequence[float]) -> Tensor: ...
@overload
def beta_from_prototypes(N: Array) -> float | Tensor: ...  # NumPy's scalars are arrays, too
def beta_from_prototypes(N: float | Vector) -> float | Tensor:
    """The beta of N unique prototypes, (N - 1) / N: the effective number tends to N.

    Args:
        N: finite and >= 1; a number, or a tensor, array or sequence of them.
    Returns:
        A float for a number, else float64 of N's shape, on its device.
    Raises:
        ValueError: an N below 1 or not finite.
        TypeError: N is not a real number.
    Source: Cui et al., CVPR 2019 (arXiv 1901.05555), section 3.

    >>> beta_from_prototypes(1000)
    0.999
    """
    n = reals(N, "N")
    require((n >= 1) & n.isfinite(), n, "N", "a finite N >= 1")
    beta = (n - 1) / n
    return beta.to(device(N)) if isinstance(N, Tensor) or beta.dim() else float(beta)


def class_balanced_weights(
    counts: Vector,
    beta: float | Vector = 0.999,
    *,
    empty: Empty = "error",
) -> Tensor:
    """Weight each class by the inverse of its effective number of samples.

    Computed in float64, rounded once. Warns where nothing is re-weighted: beta^n has vanished
    for every class, so that effective numbers are 1 / (1 - beta) however much counts differ; and of
    frequencies in the place of counts, of which beta changes next to nothing.

    Args:
        counts: (C,) samples per class, finite and >= 0, fractions allowed.
        beta: in [0, 1], one for all or (C,); 0 weighs all classes alike, 1 by inverse frequency.
        empty: what a class without samples gets: "error" raises, "zero" gives it weight 0,
            "one" counts it as one sample.
    Returns:
        (C,) float32 on the device of counts. The sum is C, under "zero" the number of classes
        that have samples.
    Raises:
        ValueError: as `effective_number`; a count of 0 under "error", nothing but zeros, or
            counts too far apart for float32 weights.
        TypeError: counts or beta are not real numbers.
    Source: Cui et al., CVPR 2019 (arXiv 1901.05555), section 4.

    >>> class_balanced_weights(torch.tensor([100, 10, 1]), beta=0.9)
    tensor([0.2393, 0.3674, 2.3932])
    """
    n = checked_counts(counts)
    b = _beta(beta, len(n)).expand_as(n)
    given = n
    n = _handle_empty_classes(
        n, empty, ', or empty="zero" (weight 0) or empty="one" (counted as one sample)'
    )
    present = n > 0
    E = _effective_number(n, b)[present]
    _check_spread(E, n[present])
    _warn_if_collapsed(E, n[present], b[present])
    warn_of_frequencies(given, b)
    inverse = E.min() / E  # in (0, 1], where 1 / E may be infinite
    weights = torch.zeros_like(n)
    weights[present] = inverse * (len(inverse) / inverse.sum())
    return weights.float().to(device(counts))


def logit_adjustment(counts: Vector, tau: float = 1.0) -> Tensor:
    """Logarithms of the class frequencies times tau: the `logit_bias` of logit adjustment.

    The model then learns balanced logits, which are used as they are in evaluation; tau = 1 is
    balanced softmax.

    Args:
        counts: (C,) samples per class, finite and > 0, fractions allowed.
        tau: finite.
    Returns:
        (C,) float32 on the device of counts, tau log(n_c / Σ n).
    Raises:
        ValueError: a class without samples, whose logarithm would be -inf; a wrong shape or value.
        TypeError: counts are not real numbers.
    Source: Menon et al., Long-tail learning via logit adjustment, ICLR 2021 (arXiv 2007.07314),
        equation 10; Ren et al., Balanced Meta-Softmax, NeurIPS 2020 (arXiv 2007.10740).

    >>> logit_adjustment([90, 10])
    tensor([-0.1054, -2.3026])
    """
    n = _handle_empty_classes(checked_counts(counts), "error")
    tau = float(reals(tau, "tau"))
    if not math.isfinite(tau):
        raise ValueError(f"tau must be finite, got {tau}")
    return (tau * (n / n.sum()).log()).float().to(device(counts))


def ldam_margin(counts: Vector, max_margin: float = 0.5) -> Tensor:
    """Margins that grow as classes get rarer, n_c^(-1/4), the rarest class's being max_margin.

    For `margin`, with `logit_scale=30` and logits that are cosines.

    Args:
        counts: (C,) samples per class, finite and > 0, fractions allowed.
        max_margin: finite and >= 0; the paper has 0.5, and 0.3 for iNaturalist.
    Returns:
        (C,) float32 on the device of counts.
    Raises:
        ValueError: a class without samples; a wrong shape or value.
        TypeError: counts are not real numbers.
    Source: Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss,
        NeurIPS 2019 (arXiv 1906.07413), the LDAM loss.

    >>> ldam_margin([160, 10])
    tensor([0.2500, 0.5000])
    """
    n = _handle_empty_classes(checked_counts(counts), "error")
    max_margin = float(reals(max_margin, "max_margin"))
    if not 0 <= max_margin < math.inf:
        raise ValueError(f"max_margin must be finite and >= 0, got {max_margin}")
    return (max_margin * (n.min() / n) ** 0.25).float().to(device(counts))


def init_head_bias_(linear: ModuleT) -> ModuleT:
    """Fill the last layer's bias with -log(C - 1), in place: sigmoid losses start at p = 1/C.

    Args:
        linear: the layer that gives the logits, `nn.Linear` or a convolution, with a bias (C,).
    Returns:
        The same layer.
    Raises:
        ValueError: the layer has no bias, or C = 1, where p = 1 has no finite bias.
        TypeError: linear is not a module.
    Source: the TensorFlow code of Cui et al., CVPR 2019 (arXiv 1901.05555).

    >>> init_head_bias_(nn.Linear(2, 3)).bias.detach()
    tensor([-0.6931, -0.6931, -0.6931])
    """
    if not isinstance(linear, nn.Module):
        raise TypeError(f"linear must be an nn.Module, got {type(linear).__name__}")
    bias = getattr(linear, "bias", None)
    if not isinstance(bias, Tensor) or bias.numel() < 2:
        found = f"a bias of shape {tuple(bias.shape)}" if isinstance(bias, Tensor) else "no bias"
        raise ValueError(
            f"{type(linear).__name__} has {found}: expected the last layer, with a bias of C >= 2"
        )
    with torch.no_grad():
        bias.fill_(-math.log(bias.numel() - 1))
    return linear


def _effective_number(n: Tensor, beta: Tensor) -> Tensor:
    # log(beta) is log1p(-(1 - beta)), without the rounding of 1 - beta where beta < 1/2.
    E = torch.expm1(n * beta.log()) / (beta - 1)
    return torch.where((n == 0) | (beta == 1), n, E)  # the limits, where E may be NaN or -0


def _handle_empty_classes(n: Tensor, empty: str, also: str = "") -> Tensor:
    if empty not in ("error", "zero", "one"):
        raise ValueError(f'empty = {empty!r}: expected "error", "zero" or "one"')
    zeros = (n == 0).nonzero().flatten().tolist()
    if len(zeros) == len(n):
        raise ValueError(f"all {len(n)} counts are 0: expected a class with samples")
    if zeros and empty == "error":
        names = ", ".join(map(str, zeros[:10])) + (", …" if len(zeros) > 10 else "")
        raise ValueError(
            f"{len(zeros)} of {len(n)} classes have no samples ({names}): expected counts > 0{also}"
            f"{hints.of_empty(n)}"
        )
    return n.masked_fill(n == 0, 1.0) if empty == "one" else n


def _check_spread(E: Tensor, n: Tensor) -> None:
    # Every weight is at least E.min() / E.max(); tiny counts may also have made E underflow to 0.
    if not E.min() / E.max() >= torch.finfo(torch.float32).tiny:
        raise ValueError(
            f"counts from {n.min():g} to {n.max():g} are too far apart, or too small, for float32 "
            "weights: expected effective numbers within a factor of 1e37"
        )


def _warn_if_collapsed(E: Tensor, n: Tensor, beta: Tensor) -> None:
    # The suggestion is the smallest of the paper's 0.9, 0.99, 0.999, … whose prototypes,
    # N = 1/(1 - beta), are no fewer than the largest class has samples: beta^n stays above 1/3.
    # Where even that moves no weight by 1 %, the classes are balanced: nothing to warn of.
    suggestion = 1 - 10.0 ** -max(1, math.ceil(math.log10(n.max())))
    other = _effective_number(n, torch.full_like(n, suggestion))
    if beta.max() > 0 and E.max() / E.min() < 1.01 <= other.max() / other.min():
        caller.warn(
            f"beta = {beta.max().item()!r} re-weights nothing: beta**n has vanished for every "
            f"class (counts {n.min():g} to {n.max():g}), so all weights are equal within 1 %; "
            f"try beta={suggestion!r}, or beta=0 if equal weights are meant"
        )


def warn_of_frequencies(n: Tensor, beta: Tensor) -> None:
    """Warn of shares of 1 in the place of counts, unless beta weighs both alike."""
    shares = (n <= 1).all() and (n != n.round()).any() and abs(n.sum() - 1) <= 0.01  # rounded ones
    if shares and ((beta > 0) & (beta < 1)).any():
        caller.warn(
            "these look like frequencies: counts are expected, the numbers of samples; without "
            "them beta does next to nothing"
        )


def checked_counts(counts: Vector) -> Tensor:
    """(C,) float64 on the CPU."""
    n = class_vector(counts)
    if n.dim() != 1 or len(n) == 0:
        raise ValueError(
            f"counts has shape {tuple(n.shape)}: expected (C,) with C >= 1{hints.of_rank(n.dim())}"
        )
    require((n >= 0) & n.isfinite(), n, "counts", "a finite count >= 0")
    return n


def _beta(beta: float | Vector, C: int) -> Tensor:
    b = reals(beta, "beta")
    if b.dim() > 0 and b.shape != (C,):
        raise ValueError(f"beta has shape {tuple(b.shape)}: expected a number, or one each ({C},)")
    require((b >= 0) & (b <= 1), b, "beta", "0 <= beta <= 1")
    return b
