"""Both loss families in eager PyTorch, to be read beside the paper.

`loss` is differentiated by autograd: the oracle of the tests and the baseline of the benchmarks.
`loss_and_grad` and `gradient` hold the explicit formulas that the kernels compute too, with the
same names: what the operators fall back to where there is no kernel.

Logits are (N, C, ...), targets (N, ...) of class indices or like the logits: the classes are
dimension 1.
"""

from __future__ import annotations

from math import inf, nan
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import Inputs, compute_dtype, is_soft, weights_classes
from .options import Formula, Options
from .row_weights import (
    Targets,
    along_classes,
    at_target,
    reduced,
    row_scales,
    row_weights,
    sample_weights,
    targets_of,
    weighted,
)


def loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | None = None,
    *,
    logit_bias: Tensor | None = None,
    margin: Tensor | None = None,
    pos_weight: Tensor | None = None,
    ignore_index: int | None = -100,
    background_index: int | None = None,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    """`eager_loss` of the options of `class_balanced_loss`, unchecked."""
    inputs = Inputs(target, weight, sample_weight, normalizer, logit_bias, margin, pos_weight)
    f = Formula.of(Options(**options))
    return eager_loss(logits, inputs, f, ignore_index, background_index, reduction)


def eager_loss(
    logits: Tensor,
    inputs: Inputs,
    f: Formula,
    ignore_index: int | None,
    background_index: int | None,
    reduction: str,
) -> Tensor:
    """The class-balanced loss as a differentiable eager expression."""
    z = logits.to(compute_dtype(logits.dtype))
    targets = targets_of(inputs.target, z.shape[1], ignore_index, background_index)
    y, keep, valid, known = targets
    if keep is not None:  # selected away, never multiplied by 0
        z = torch.where(keep.unsqueeze(1), z, 0.0)
    if known is not None:
        z = torch.where(known, z, 0.0)
    z = _adjusted(z, y, inputs, f.logit_scale)
    r = row_weights(y, inputs, f, z.dtype)
    w = _class_weights(z, inputs, f)
    if is_soft(y) and not f.sigmoid:
        hard, rest = _soft_loss(z, y.to(z.dtype), w, f)
        L = weighted(sample_weights(inputs, z.dtype), hard) + weighted(r, rest)
    else:
        if f.sigmoid:
            L_j = _sigmoid_losses(z, _targets(z, y, f.label_smoothing), f, w, inputs.pos_weight)
            L = (L_j if known is None else torch.where(known, L_j, 0.0)).sum(1)
        else:
            L = _softmax_loss(z, y.unsqueeze(1), f)
        L = weighted(r, L if valid is None else torch.where(valid, L, nan))
    return reduced(L, r, keep, reduction, inputs.normalizer)


def _adjusted(z: Tensor, y: Tensor, inputs: Inputs, logit_scale: float) -> Tensor:
    """logit_scale (z_j + bias_j - margin_y [j = y])."""
    if inputs.logit_bias is not None:
        z = z + along_classes(inputs.logit_bias, z)
    if inputs.margin is not None:
        margin = at_target(inputs.margin.to(z.dtype), y, 0.0)
        z = z.scatter_add(1, y.clamp(max=z.shape[1] - 1).unsqueeze(1), -margin.unsqueeze(1))
    return z if logit_scale == 1 else z * logit_scale


def _targets(z: Tensor, y: Tensor, eps: float) -> Tensor:
    """One target per class: (1-eps) t + eps/C, t soft as given or the one-hot of a class index."""
    C = z.shape[1]
    if is_soft(y):
        t = y.to(z.dtype)
    else:
        one = (y < C).to(z.dtype)  # 0 in a background row
        t = torch.zeros_like(z).scatter(1, y.clamp(max=C - 1).unsqueeze(1), one.unsqueeze(1))
    return (1 - eps) * t + eps / C if eps else t


def _class_weights(z: Tensor, inputs: Inputs, f: Formula) -> Tensor | None:
    if inputs.weight is None or not weights_classes(f, inputs.target):
        return None
    return along_classes(inputs.weight, z)


def _softmax_loss(z: Tensor, y: Tensor, f: Formula) -> Tensor:
    """(1-eps) q^gamma (-log p) + eps/C sum_j (lse - z_j) + zeta lse^2.

    With v = log sum_{j != y} e^{z_j} - z_y: p = sigma(-v), q = 1 - p = sigma(v),
    -log p = softplus(v).
    The target is left out of the sum, never subtracted, so v is exact at both ends.
    """
    eps = f.label_smoothing
    v = _log_odds_against(z, y)
    L = -F.logsigmoid(-v)
    if f.gamma:
        L = torch.exp(f.gamma * F.logsigmoid(v)) * L
    L = (1 - eps) * L
    if f.z_loss:
        L = L + f.z_loss * torch.logsumexp(z, 1) ** 2
    if not eps:
        return L
    M = _finite(z.amax(1, keepdim=True).detach())
    from_top = z - M
    spread = z.shape[1] * torch.logsumexp(from_top, 1) - from_top.sum(1)
    return L + eps / z.shape[1] * spread


def _soft_loss(z: Tensor, t: Tensor, w: Tensor | None, f: Formula) -> tuple[Tensor, Tensor]:
    """(1-eps) sum_j t_j w_j (-log p_j); eps/C sum_j (-log p_j) + zeta lse^2.

    -log p_j = (lse - z_top) + (z_top - z_j), the first exact as p_top -> 1.
    """
    eps, C = f.label_smoothing, z.shape[1]
    top = z.argmax(1, keepdim=True)
    nll, below = -F.logsigmoid(-_log_odds_against(z, top)), z.gather(1, top) - z
    a = t if w is None else t * w
    hard = (1 - eps) * (a.sum(1) * nll + torch.where(a == 0, 0.0, a * below).sum(1))
    rest = torch.zeros_like(hard)
    if eps:
        rest = eps / C * (C * nll + below.sum(1))
    if f.z_loss:
        rest = rest + f.z_loss * torch.logsumexp(z, 1) ** 2
    return hard, rest


def _log_odds_against(z: Tensor, y: Tensor) -> Tensor:
    """log (1 - p_y) / p_y."""
    others = z.scatter(1, y, -inf)
    M = _finite(others.amax(1, keepdim=True).detach())
    return (torch.logsumexp(others - M, 1, keepdim=True) - (z.gather(1, y) - M)).squeeze(1)


def _sigmoid_losses(
    z: Tensor, t: Tensor, f: Formula, w: Tensor | None, pos_weight: Tensor | None
) -> Tensor:
    """w_j [v_j alpha t L(z_j, 1) + (1 - alpha) (1 - t) L(z_j, 0)] of every class, v the pos_weight.

    L(z, 1) = (1-p)^gamma (-log p), L(z, 0) = p^gamma (-log(1-p)), p = sigma(z); for t = 0 gamma is
    gamma_neg and p is max(p - clip, 0).
    """

    def focal(s: Tensor, gamma: float) -> Tensor:
        nll = -F.logsigmoid(s)
        return torch.exp(gamma * F.logsigmoid(-s)) * nll if gamma else nll

    if f.clip:
        p = torch.exp(F.logsigmoid(z)) - f.clip  # whose derivative is exact at both ends
        inside = p > 0
        p = torch.where(inside, p, 0.5)  # whose derivatives are finite
        L_0 = torch.where(inside, p**f.gamma_neg * -torch.log1p(-p), 0.0)
    else:
        L_0 = focal(-z, f.gamma_neg)
    L_1 = f.alpha * t * focal(z, f.gamma)
    if pos_weight is not None:
        L_1 = weighted(along_classes(pos_weight, z), L_1)
    L = torch.where(t == 0, 0.0, L_1) + torch.where(t == 1, 0.0, f.alpha_neg * (1 - t) * L_0)
    return L if w is None else w * L


# The explicit formulas


def softmax_row(
    d: Tensor, R: Tensor, r: Tensor, D: Tensor | float, C: int, M: Tensor, f: Formula
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, k, g_y, uniform) of a row.

    From M, d = z_y - M, R = sum_{j != y} e^{z_j - M}, D = sum_j (z_j - M):
    d loss/d z_j = k e^{z_j - M} - uniform for j != y, g_y for j = y.
    """
    gamma, eps, zeta = f.gamma, f.label_smoothing, f.z_loss
    e_y = d.exp()
    S = R + e_y
    p, q = e_y / S, R / S
    sure = q <= 0.5  # then -log p comes from q: exact as p -> 1
    nll = torch.where(sure, -torch.log1p(-q.clamp(max=0.5)), S.log() - d)
    u = torch.where(q > 0, nll / q, 1.0).clamp(max=torch.finfo(d.dtype).max)
    focus = q**gamma
    a = (1 - eps) * focus * (1 + gamma * p * u)
    loss = weighted(r, (1 - eps) * focus * nll)
    k, g_y, uniform = r * a / S, -r * a * q, torch.zeros_like(r)
    if eps:
        uniform = r * (eps / C)
        loss = loss + weighted(r, eps / C * (C * torch.where(sure, nll + d, S.log()) - D))
        k, g_y = k + r * eps / S, g_y + r * eps * p - uniform
    if zeta:
        lse = M + S.log()
        loss, steep = loss + weighted(r, zeta * lse**2), _bounded(r * (2 * zeta), lse)
        k, g_y = k + steep / S, g_y + steep * p
    return loss, k, g_y, uniform


def soft_row(
    R: Tensor, s: Tensor, r: Tensor, W: Tensor, W_others: Tensor, B: Tensor, D: Tensor | float,
    C: int, M: Tensor, f: Formula,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, k, g_top, uniform, hard) of a row with soft targets t: s weighs them, r the rest.

    From M = z_top, R = sum_{j != top} e^{z_j - M}, W = sum_j t_j w_j, W_others without the top's,
    B = sum_j t_j w_j (z_j - M), D = sum_j (z_j - M):
    d loss/d z_j = k e^{z_j - M} - uniform - hard t_j w_j for j != top, g_top for j = top.
    """
    eps, zeta = f.label_smoothing, f.z_loss
    S = 1 + R
    q, nll = R / S, torch.log1p(R)  # of the top: exact as p -> 1
    loss = weighted(s, (1 - eps) * (W * nll - B))
    hard, uniform = s * (1 - eps), r * (eps / C)
    k, g_top = hard * W / S, hard * (W_others - W * q)
    if eps:
        loss = loss + weighted(r, eps / C * (C * nll - D))
        k, g_top = k + r * eps / S, g_top + r * eps / S - uniform
    if zeta:
        lse = M + nll
        loss, steep = loss + weighted(r, zeta * lse**2), _bounded(r * (2 * zeta), lse)
        k, g_top = k + steep / S, g_top + steep / S
    return loss, k, g_top, uniform, hard


def _bounded(factor: Tensor, lse: Tensor) -> Tensor:
    """Their product, finite: it is multiplied by probabilities that may be 0."""
    largest = torch.finfo(lse.dtype).max
    return (factor * lse.clamp(max=largest)).clamp(-largest, largest)


def sigmoid_element(z: Tensor, gamma: float, clip: float = 0.0) -> tuple[Tensor, Tensor]:
    """(L, dL/dz) of an element with t = 0; t = 1: the same at -z, the gradient's sign turned."""
    s, sp = torch.sigmoid(z), -F.logsigmoid(-z)  # sp = log(1 + e^z)
    c = torch.sigmoid(-z)
    if clip:  # p = max(s - clip, 0) in the place of s; no power gamma - 1
        p = (s - clip).clamp(min=0)
        nll, focus = -torch.log1p(-p), p**gamma
        u = torch.where(p > 0, nll / p, 1.0)
        g = focus * (gamma * u + 1 / (c + clip)) * s * c
        return focus * nll, torch.where(p == 0, 0.0, g)
    if not gamma:
        return sp, s
    focus = torch.exp(gamma * F.logsigmoid(z))  # (1 - p_t)^gamma
    return focus * sp, focus * (gamma * c * sp.clamp(max=1e3) + s)


def loss_and_grad(
    logits: Tensor,
    inputs: Inputs,
    f: Formula,
    ignore_index: int | None = -100,
    background_index: int | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(row losses that reduction adds up, gradient of their sum, s, r) by the explicit formulas.

    s and r (rows) are `row_scales`'s: what `gradient` takes.
    """
    targets, s, r = row_scales(logits, inputs, f, ignore_index, background_index, reduction)
    L, grad = _rows(logits, targets, s, r, inputs, f, r < 0)
    return L, grad, s, r


def gradient(
    logits: Tensor,
    inputs: Inputs,
    s: Tensor,
    r: Tensor,
    grad_loss: Tensor,
    f: Formula,
    ignore_index: int | None,
    background_index: int | None,
    sums: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The gradient once more, for an incoming grad_loss: 0-d, or one per row.

    sums: softmax's M and R of class indices, if they are known.
    """
    ignored = r < 0
    targets = targets_of(inputs.target, logits.shape[1], ignore_index, background_index)
    s, r = (torch.where(ignored, v, v * grad_loss) for v in (s, r))
    return _rows(logits, targets, s, r, inputs, f, ignored, sums)[1]


def _rows(
    logits: Tensor,
    targets: Targets,
    s: Tensor,
    r: Tensor,
    inputs: Inputs,
    f: Formula,
    ignored: Tensor,
    sums: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Losses (N, ...) and gradient of every row; sums: M and R, if they are known."""
    y, known = targets.y, targets.known
    C, soft, eps = logits.shape[1], is_soft(y), f.label_smoothing
    z = logits.to(r.dtype)
    s, r = (torch.where(ignored, 0.0, v).unsqueeze(1) for v in (s, r))
    if known is not None:
        z = torch.where(known, z, 0.0)
    z, w = _adjusted(z, y, inputs, f.logit_scale), _class_weights(z, inputs, f)
    if f.sigmoid:
        t = _targets(z, y, eps)
        L_0, g_0 = sigmoid_element(z, f.gamma_neg, f.clip)
        L_1, g_1 = sigmoid_element(-z, f.gamma)
        t_0, t_1 = f.alpha_neg * (1 - t), f.alpha * t
        if inputs.pos_weight is not None:
            t_1 = along_classes(inputs.pos_weight, z) * t_1
        L, grad = weighted(t_0, L_0) + weighted(t_1, L_1), t_0 * g_0 - t_1 * g_1
        if w is not None:
            L, grad = weighted(w, L), w * grad
        if known is not None:
            L, grad = (torch.where(known, v, 0.0) for v in (L, grad))
        L, grad = weighted(r, L.sum(1, keepdim=True)), r * grad
    else:
        unlimited, z = z, _limit(z)
        top = z.argmax(1, keepdim=True) if soft else y.unsqueeze(1)
        others = z.scatter(1, top, -inf)
        M = torch.maximum(others.amax(1, keepdim=True), z.gather(1, top))
        M = M.clamp(min=torch.finfo(z.dtype).min)  # NaN stays; -inf - -inf would be NaN
        largest = M  # of the logits as given, which the z-loss alone asks for
        if sums is not None or f.z_loss:
            infinite = (unlimited == inf).any(1, keepdim=True)  # then M is the limit's, 0
            M = M if sums is None else torch.where(infinite, M, sums[0].unsqueeze(1))
            largest = torch.where(infinite, inf, M)
        e = (others - M).exp()
        D = (z - M).sum(1, keepdim=True) if eps else 0.0
        R = e.sum(1, keepdim=True) if sums is None else sums[1].unsqueeze(1)
        if soft:
            a = y.to(z.dtype) if w is None else y.to(z.dtype) * w
            R = torch.where(z.gather(1, top) == -inf, nan, R)  # no class has a probability
            B = torch.where(a == 0, 0.0, a * (z - M)).sum(1, keepdim=True)
            W, W_others = (v.sum(1, keepdim=True) for v in (a, a.scatter(1, top, 0.0)))
            L, k, g_top, uniform, hard = soft_row(R, s, r, W, W_others, B, D, C, largest, f)
            grad = (k * e - uniform - hard * a).scatter(1, top, g_top)
        else:
            d = z.gather(1, top) - M
            L, k, g_top, uniform = softmax_row(d, R, r, D, C, largest, f)
            grad = (k * e - uniform).scatter(1, top, g_top)
    L = torch.where(ignored, 0.0, L.squeeze(1))
    grad = torch.where(ignored.unsqueeze(1), 0.0, f.logit_scale * grad)
    return L, grad.to(logits.dtype)


def max_and_sum(
    logits: Tensor, inputs: Inputs, ignored: Tensor, logit_scale: float
) -> tuple[Tensor, Tensor]:
    """M = max_j z_j and R = sum_{j != y} e^{z_j - M} of every row."""
    y = torch.where(ignored, 0, inputs.target).clamp(0, logits.shape[1] - 1)
    z = _adjusted(logits.to(compute_dtype(logits.dtype)), y, inputs, logit_scale)
    lowest, limit = torch.finfo(z.dtype).min, _limit(z)
    others = limit.scatter(1, y.unsqueeze(1), -inf)
    R = (others - limit.amax(1, keepdim=True).clamp(min=lowest)).exp().sum(1)
    return z.amax(1).clamp(min=lowest), R


def _limit(z: Tensor) -> Tensor:
    """A row whose largest logit is +inf, and alone, has a limit: that class takes all of p."""
    top = z == inf
    count = top.sum(1, keepdim=True)
    limit = torch.where(top, 0.0, -inf).masked_fill(count > 1, nan)
    return torch.where((count > 0) & ~z.isnan(), limit, z)


def _finite(M: Tensor) -> Tensor:
    return torch.where(M.isinf(), 0.0, M)
