"""Both loss families in eager PyTorch, to be read beside the paper.

`loss` is differentiated by autograd: the oracle of the tests and the baseline of the benchmarks.
`loss_and_grad` and `gradient` hold the explicit formulas that the kernels compute too, with the
same names: what the operators fall back to where there is no kernel.

Logits are (N, C, ...), targets (N, ...): the classes are dimension 1.
"""

from __future__ import annotations

from math import inf, nan

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 logits, else float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | None = None,
    *,
    activation: str = "softmax",
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int | None = -100,
    reduction: str = "mean",
) -> Tensor:
    """The class-balanced loss as a differentiable eager expression."""
    z = logits.to(compute_dtype(logits.dtype))
    y, keep, valid = _classes(target, z.shape[1], ignore_index)
    if keep is not None:  # selected away, never multiplied by 0
        z = torch.where(keep.unsqueeze(1), z, 0.0)
    if activation == "softmax":
        L = _softmax_loss(z, y.unsqueeze(1), gamma, label_smoothing, z_loss)
    else:
        L = _sigmoid_loss(z, y.unsqueeze(1), gamma, label_smoothing)
    if valid is not None:
        L = torch.where(valid, L, nan)
    r = _row_weights(y, weight, sample_weight, L.dtype)
    return _reduce(L if r is None else _weighted(r, L), r, keep, reduction, normalizer)


def _softmax_loss(z: Tensor, y: Tensor, gamma: float, eps: float, zeta: float) -> Tensor:
    """(1-eps) q^gamma (-log p) + eps/C sum_j (lse - z_j) + zeta lse^2.

    With v = log sum_{j != y} e^{z_j} - z_y: p = sigma(-v), q = 1 - p = sigma(v),
    -log p = softplus(v).
    The target is left out of the sum, never subtracted, so v is exact at both ends.
    """
    others = z.scatter(1, y, -inf)
    M = _finite(others.amax(1, keepdim=True).detach())
    v = (torch.logsumexp(others - M, 1, keepdim=True) - (z.gather(1, y) - M)).squeeze(1)
    L = -F.logsigmoid(-v)
    if gamma:
        L = torch.exp(gamma * F.logsigmoid(v)) * L
    L = (1 - eps) * L
    if zeta:
        L = L + zeta * torch.logsumexp(z, 1) ** 2
    if not eps:
        return L
    M = _finite(z.amax(1, keepdim=True).detach())
    from_top = z - M
    spread = z.shape[1] * torch.logsumexp(from_top, 1) - from_top.sum(1)
    return L + eps / z.shape[1] * spread


def _sigmoid_loss(z: Tensor, y: Tensor, gamma: float, eps: float) -> Tensor:
    """sum_j L(z_j, t_j), L(z, t) = (1 - p_t)^gamma (-log p_t), p_t = sigma(z if t else -z)."""

    def L(s: Tensor) -> Tensor:  # noqa: N802
        nll = -F.logsigmoid(s)
        return torch.exp(gamma * F.logsigmoid(-s)) * nll if gamma else nll

    s = torch.neg(z).scatter(1, y, z.gather(1, y))
    if not eps:
        return L(s).sum(1)
    t = torch.full_like(z, eps / z.shape[1]).scatter(1, y, 1 - eps + eps / z.shape[1])
    return (t * L(z) + (1 - t) * L(-z)).sum(1)


# The explicit formulas


def softmax_row(
    d: Tensor,
    R: Tensor,
    r: Tensor,
    gamma: float,
    eps: float,
    D: Tensor | float,
    C: int,
    zeta: float,
    M: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, k, g_y, uniform) of a row.

    From M, d = z_y - M, R = sum_{j != y} e^{z_j - M}, D = sum_j (z_j - M):
    d loss/d z_j = k e^{z_j - M} - uniform for j != y, g_y for j = y.
    """
    e_y = d.exp()
    S = R + e_y
    p, q = e_y / S, R / S
    sure = q <= 0.5  # then -log p comes from q: exact as p -> 1
    nll = torch.where(sure, -torch.log1p(-q.clamp(max=0.5)), S.log() - d)
    u = torch.where(q > 0, nll / q, 1.0).clamp(max=torch.finfo(d.dtype).max)
    f = q**gamma
    a = (1 - eps) * f * (1 + gamma * p * u)
    loss = _weighted(r, (1 - eps) * f * nll)
    k, g_y, uniform = r * a / S, -r * a * q, torch.zeros_like(r)
    if eps:
        uniform = r * (eps / C)
        loss = loss + _weighted(r, eps / C * (C * torch.where(sure, nll + d, S.log()) - D))
        k, g_y = k + r * eps / S, g_y + r * eps * p - uniform
    if zeta:
        lse = M + S.log()
        loss = loss + _weighted(r, zeta * lse**2)
        k, g_y = k + r * (2 * zeta) * lse / S, g_y + r * (2 * zeta) * lse * p
    return loss, k, g_y, uniform


def sigmoid_element(z: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """(L, dL/dz) of an element with t = 0; t = 1: the same at -z, the gradient's sign turned."""
    s, sp = torch.sigmoid(z), -F.logsigmoid(-z)  # sp = log(1 + e^z)
    if not gamma:
        return sp, s
    f = torch.exp(gamma * F.logsigmoid(z))  # (1 - p_t)^gamma
    return f * sp, f * (gamma * torch.sigmoid(-z) * sp.clamp(max=1e3) + s)


def loss_and_grad(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | None = None,
    *,
    activation: str = "softmax",
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int | None = -100,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient of the sum of what reduction adds up, scale) by the explicit formulas.

    scale (rows) is r_i / denominator, negative where the row is ignored: what `gradient` takes.
    """
    y, keep, valid = _classes(target, logits.shape[1], ignore_index)
    dtype = compute_dtype(logits.dtype)
    r = _row_weights(y, weight, sample_weight, dtype)
    if r is None:
        r = torch.ones_like(y, dtype=dtype)
    scale = r
    if reduction not in ("none", "sum"):
        denominator = _denominator(r, keep, reduction, normalizer)
        scale = torch.where(denominator != 0, r / denominator, r)
    if keep is not None:
        scale = torch.where(keep, scale, -1.0)
    if valid is not None:
        scale = torch.where(valid, scale, nan)
    L, grad = _rows(logits, y, scale, scale < 0, activation, gamma, label_smoothing, z_loss)
    return L if reduction == "none" else L.sum(), grad, scale


def gradient(
    logits: Tensor,
    target: Tensor,
    scale: Tensor,
    grad_loss: Tensor,
    *,
    activation: str,
    gamma: float,
    label_smoothing: float,
    z_loss: float = 0.0,
) -> Tensor:
    """The gradient once more, for an incoming grad_loss: 0-d, or one a row."""
    ignored = scale < 0
    y = torch.where(ignored, 0, target)
    r = torch.where(ignored, 0.0, scale * grad_loss)
    return _rows(logits, y, r, ignored, activation, gamma, label_smoothing, z_loss)[1]


def _rows(
    logits: Tensor,
    y: Tensor,
    r: Tensor,
    ignored: Tensor,
    activation: str,
    gamma: float,
    eps: float,
    zeta: float,
) -> tuple[Tensor, Tensor]:
    """Losses (N, ...) and gradient of every row."""
    C = logits.shape[1]
    z = logits.to(r.dtype)
    y, r = y.clamp(0, C - 1).unsqueeze(1), r.unsqueeze(1)
    if activation == "softmax":
        z = _limit(z)
        others = z.scatter(1, y, -inf)
        M = torch.maximum(others.amax(1, keepdim=True), z.gather(1, y))
        M = M.clamp(min=torch.finfo(z.dtype).min)  # NaN stays; -inf - -inf would be NaN
        e = (others - M).exp()
        D = (z - M).sum(1, keepdim=True) if eps else 0.0
        d, R = z.gather(1, y) - M, e.sum(1, keepdim=True)
        L, k, g_y, uniform = softmax_row(d, R, r, gamma, eps, D, C, zeta, M)
        grad = (k * e - uniform).scatter(1, y, g_y)
    else:
        L, grad = sigmoid_element(z, gamma)
        z_y = z.gather(1, y)
        L_y, g_y = sigmoid_element(-z_y, gamma)
        if eps:
            L_1, g_1 = sigmoid_element(-z, gamma)
            t = torch.full_like(z, eps / C).scatter(1, y, 1 - eps + eps / C)
            L, grad = t * L_1 + (1 - t) * L, (1 - t) * grad - t * g_1
        else:
            L, grad = L.scatter(1, y, L_y), grad.scatter(1, y, -g_y)
        L, grad = _weighted(r, L.sum(1, keepdim=True)), r * grad
    L = torch.where(ignored, 0.0, L.squeeze(1))
    return L, torch.where(ignored.unsqueeze(1), 0.0, grad).to(logits.dtype)


def _limit(z: Tensor) -> Tensor:
    """A row whose largest logit is +inf, and alone, has a limit: that class takes all of p."""
    top = z == inf
    count = top.sum(1, keepdim=True)
    limit = torch.where(top, 0.0, -inf).masked_fill(count > 1, nan)
    return torch.where((count > 0) & ~z.isnan(), limit, z)


# Rows


def _classes(
    target: Tensor, C: int, ignore_index: int | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Targets in range, rows not ignored (None: all), rows in range (None: all).

    A CPU target out of range raises here. Nothing may synchronise on other devices, and no value
    is known while torch.compile or torch.func traces: there such a row becomes NaN.
    """
    y = target.long()  # first: -100 would wrap around in a uint8
    keep = None if ignore_index is None else y != ignore_index
    if keep is not None:
        y = torch.where(keep, y, 0)
    if target.device.type == "cpu" and not tracing():
        check_target(target, C, ignore_index)
        return y, keep, None
    valid = (y >= 0) & (y < C)
    return y.clamp(0, C - 1), keep, valid


def tracing() -> bool:
    """Whether values cannot be looked at: under torch.compile, torch.export or torch.func."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def check_target(target: Tensor, num_classes: int, ignore_index: int | None = -100) -> None:
    """Raise IndexError for the first target that is no class; see `functional.check_target`."""
    target = target.long()
    bad = (target < 0) | (target >= num_classes)
    if ignore_index is not None:
        bad &= target != ignore_index
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        ignored = "" if ignore_index is None else f" or ignore_index={ignore_index}"
        raise IndexError(
            f"target{list(first)} = {int(target[first])} is no class: expected 0 <= target < "
            f"{num_classes}{ignored} ({int(bad.sum())} of {target.numel()} are wrong)"
        )


def _row_weights(
    y: Tensor, weight: Tensor | None, sample_weight: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """r_i = w_{y_i} * sample_weight_i."""
    r = None if weight is None else weight.to(dtype)[y]
    if sample_weight is None:
        return r
    return sample_weight.to(dtype) if r is None else r * sample_weight.to(dtype)


def _weighted(r: Tensor, L: Tensor) -> Tensor:
    """r * L where an overflowed loss of a row without weight counts 0, not 0 * inf = NaN."""
    return r * torch.where((r == 0) & L.isposinf(), 0.0, L)


def _finite(M: Tensor) -> Tensor:
    return torch.where(M.isinf(), 0.0, M)


def _denominator(
    r: Tensor, keep: Tensor | None, reduction: str, normalizer: Tensor | None
) -> Tensor:
    if normalizer is not None:
        return normalizer.to(r.dtype)
    if reduction == "weighted_mean":
        return (r if keep is None else torch.where(keep, r, 0.0)).sum()
    return r.new_tensor(r.numel()) if keep is None else keep.sum().to(r.dtype)


def _reduce(
    L: Tensor,
    r: Tensor | None,
    keep: Tensor | None,
    reduction: str,
    normalizer: Tensor | None,
) -> Tensor:
    if keep is not None:
        L = torch.where(keep, L, 0.0)
    if reduction == "none":
        return L
    if reduction == "sum":
        return L.sum()
    denominator = _denominator(torch.ones_like(L) if r is None else r, keep, reduction, normalizer)
    return L.sum() / torch.where(denominator != 0, denominator, 1.0)  # nothing to average: 0
