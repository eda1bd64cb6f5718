"""From class counts to class weights, in float64 on the CPU; results go to the counts' device."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset


class Array(Protocol):
    """What NumPy, pandas and JAX arrays have in common; NumPy itself is not needed."""

    def __array__(self) -> Any: ...


Vector: TypeAlias = Tensor | Array | Sequence[float]
T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


def effective_number(counts: Vector, beta: float | Vector) -> Tensor:
    """Effective number of samples of each class, (1 - beta^n) / (1 - beta).

    No power is formed and nothing cancels: the relative error is below 1e-12 for n >= 1.

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
    n = _counts(counts)
    return _effective_number(n, _beta(beta, len(n))).to(_device(counts))


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
    n = _reals(N, "N")
    _require((n >= 1) & n.isfinite(), n, "N", "a finite N >= 1")
    beta = (n - 1) / n
    return beta.to(_device(N)) if isinstance(N, Tensor) or beta.dim() else float(beta)


def class_balanced_weights(
    counts: Vector,
    beta: float | Vector = 0.999,
    *,
    empty: Literal["error", "zero", "one"] = "error",
) -> Tensor:
    """Weight each class by the inverse of its effective number of samples.

    Computed in float64, rounded once. Warns where nothing is re-weighted: beta^n has vanished
    for every class, so that effective numbers are 1 / (1 - beta) however much counts differ.

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
    n = _counts(counts)
    b = _beta(beta, len(n)).expand_as(n)
    n = _fill_empty(n, empty)
    present = n > 0
    E = _effective_number(n, b)[present]
    _check_spread(E, n[present])
    _warn_if_collapsed(E, n[present], b[present])
    inverse = E.min() / E  # in (0, 1], where 1 / E may be infinite
    weights = torch.zeros_like(n)
    weights[present] = inverse * (len(inverse) / inverse.sum())
    return weights.float().to(_device(counts))


def class_counts(
    labels_or_dataset: Tensor | Array | Sequence[int] | Dataset[Any] | DataLoader[Any],
    num_classes: int | None = None,
) -> Tensor:
    """Count the samples of each class.

    A dataset with `.targets` or `.labels` is not iterated (its `target_transform` is applied), nor
    is a `Subset` of one. Of any other, and of a DataLoader, every item or batch is loaded, with a
    progress bar if tqdm is installed; its label is element 1, or "label", "labels" or "target".

    Args:
        labels_or_dataset: class indices (not one-hot) of any integer type and any shape, a
            map-style dataset, or a DataLoader (counted as it samples, a last batch dropped too).
        num_classes: C; the largest label + 1 if None.
    Returns:
        (C,) int64, on the device of the labels if they are a tensor.
    Raises:
        ValueError: a label outside [0, C) (filter ignored ones out before), or none to tell C by.
        TypeError: labels that are not integers, or no labels to be found.

    >>> class_counts([0, 2, 2, 1, 2], num_classes=4)
    tensor([1, 1, 3, 0])
    """
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes = {num_classes}: expected at least 1, or None")
    below = math.inf if num_classes is None else num_classes
    expected = "a label >= 0" if num_classes is None else f"0 <= label < {num_classes}"
    counts = torch.zeros(num_classes or 0, dtype=torch.int64, device="cpu")
    seen = 0
    for labels in _label_chunks(labels_or_dataset):
        _require((labels >= 0) & (labels < below), labels, "labels", expected, start=seen)
        old, counts = counts, torch.bincount(labels, minlength=len(counts))
        counts[: len(old)] += old
        seen += len(labels)
    if len(counts) == 0:
        raise ValueError("there are no labels: expected at least one, or num_classes")
    return counts.to(_device(labels_or_dataset))


def init_head_bias_(linear: M) -> M:
    """Fill the last layer's bias with -log(C - 1), in place: sigmoid losses start at p = 1/C.

    Args:
        linear: the layer that gives the logits, `nn.Linear` or a convolution, with a bias (C,).
    Returns:
        The same layer.
    Raises:
        ValueError: the layer has no bias, or C = 1, where p = 1 has no finite bias.
    Source: the TensorFlow code of Cui et al., CVPR 2019 (arXiv 1901.05555).

    >>> init_head_bias_(nn.Linear(2, 3)).bias.detach()
    tensor([-0.6931, -0.6931, -0.6931])
    """
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


def _fill_empty(n: Tensor, empty: str) -> Tensor:
    if empty not in ("error", "zero", "one"):
        raise ValueError(f'empty = {empty!r}: expected "error", "zero" or "one"')
    zeros = (n == 0).nonzero().flatten().tolist()
    if len(zeros) == len(n):
        raise ValueError(f"all {len(n)} counts are 0: expected a class with samples")
    if zeros and empty == "error":
        names = ", ".join(map(str, zeros[:10])) + (", …" if len(zeros) > 10 else "")
        raise ValueError(
            f"{len(zeros)} of {len(n)} classes have no samples ({names}): expected counts > 0, "
            'or empty="zero" (weight 0) or empty="one" (counted as one sample)'
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
        warnings.warn(
            f"beta = {beta.max().item()!r} re-weights nothing: beta**n has vanished for every "
            f"class (counts {n.min():g} to {n.max():g}), so all weights are equal within 1 %; "
            f"try beta={suggestion!r}, or beta=0 if equal weights are meant",
            stacklevel=3,  # the caller of class_balanced_weights
        )


def _counts(counts: Vector) -> Tensor:
    n = _reals(counts, "counts")
    if n.dim() != 1 or len(n) == 0:
        raise ValueError(f"counts has shape {tuple(n.shape)}: expected (C,) with C >= 1")
    _require((n >= 0) & n.isfinite(), n, "counts", "a finite count >= 0")
    return n


def _beta(beta: float | Vector, C: int) -> Tensor:
    b = _reals(beta, "beta")
    if b.dim() > 0 and b.shape != (C,):
        raise ValueError(f"beta has shape {tuple(b.shape)}: expected a number, or one each ({C},)")
    _require((b >= 0) & (b <= 1), b, "beta", "0 <= beta <= 1")
    return b


def _require(ok: Tensor, values: Tensor, name: str, expected: str, start: int = 0) -> None:
    """Raise for the first value that is not ok; start is the index of values[0]."""
    bad = (~ok).nonzero()
    if len(bad):
        first = tuple(bad[0].tolist())
        index = "".join(f"[{start + i}]" for i in first)
        many = f" ({len(bad)} of {start + len(values)} are wrong)" if first else ""
        raise ValueError(f"{name}{index} = {values[first].item()}: expected {expected}{many}")


def _reals(values: float | Vector, name: str) -> Tensor:
    t = _tensor(values, f"{name} must be real numbers", torch.float64)
    if t.is_complex():
        raise TypeError(f"{name} must be real numbers, got {t.dtype}")
    return t.double()


def _integers(values: Any) -> Tensor:
    t = _tensor(values, "labels must be integers, a tensor, an array or a sequence")
    if t.numel() and (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool):
        raise TypeError(f"labels must be integers (class indices), got {t.dtype}")
    return t.long().flatten()


def _tensor(values: Any, what: str, dtype: torch.dtype | None = None) -> Tensor:
    """values on the CPU; dtype is for Python numbers, tensors and arrays keep theirs."""
    if isinstance(values, Tensor):
        return values.detach().cpu()
    try:
        if hasattr(values, "__array__"):  # copied: it may be read-only, or reversed
            return torch.as_tensor(values.__array__().copy(), device="cpu")
        return torch.as_tensor(values, dtype=dtype, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{what}, got {type(values).__name__}: {error}") from error


def _device(values: Any) -> torch.device:
    return values.device if isinstance(values, Tensor) else torch.get_default_device()


def _label_chunks(source: Any) -> Iterator[Tensor]:
    if isinstance(source, DataLoader):
        yield from (_integers(_label_of(batch)) for batch in _progress(source))
    elif isinstance(source, Tensor | Sequence) or hasattr(source, "__array__"):
        yield _integers(source)
    elif (labels := _stored_labels(source)) is not None:
        yield labels
    elif not hasattr(source, "__len__") or isinstance(source, IterableDataset | Mapping):
        raise TypeError(
            f"cannot count the labels of a {type(source).__name__}: expected integer labels, "
            "a map-style dataset with a length, or a DataLoader"
        )
    else:
        yield from (_integers(_label_of(source[i])) for i in _progress(range(len(source))))


def _stored_labels(dataset: Any) -> Tensor | None:
    if isinstance(dataset, Subset):
        labels = _stored_labels(dataset.dataset)
        return None if labels is None else labels[_integers(dataset.indices)]
    for name in ("targets", "labels"):
        if (stored := getattr(dataset, name, None)) is not None:
            transform = getattr(dataset, "target_transform", None)
            labels = _integers(stored)
            return labels if transform is None else _integers(list(map(transform, labels.tolist())))
    return None


def _label_of(item: Any) -> Any:
    if isinstance(item, tuple | list) and len(item) > 1:
        return item[1]
    for key in ("label", "labels", "target"):
        if isinstance(item, Mapping) and key in item:
            return item[key]
    raise TypeError(
        f"no label in a {type(item).__name__}: expected (input, label, …), or a mapping with "
        '"label", "labels" or "target"'
    )


def _progress(items: Iterable[T]) -> Iterable[T]:
    try:
        from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]
    except ImportError:  # an extra: without it the labels are counted silently
        return items
    bar: Iterable[T] = tqdm(items, desc="counting labels", leave=False)
    return bar
