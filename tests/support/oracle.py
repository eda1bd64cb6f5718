"""What is right: the eager formula in float64; and the samples that it is asked about."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from cbloss_fused import reference
from cbloss_fused.inputs import compute_dtype

from .backends import DEVICE
from .marks import FAMILIES, GAMMAS, IGNORED, REDUCTIONS


def oracle(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    grad_output: Tensor | None = None,
    *,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | None = None,
    logit_bias: Tensor | None = None,
    margin: Tensor | None = None,
    pos_weight: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The eager formula, differentiated by autograd, in float64 of the same numbers."""
    compute = compute_dtype(logits.dtype)

    def exact(vector: Tensor | None) -> Tensor | None:
        return None if vector is None else vector.to(compute).double()

    leaf = logits.double().detach().clone().requires_grad_()
    loss = reference.loss(
        leaf, target, exact(weight), exact(sample_weight), exact(normalizer),
        logit_bias=exact(logit_bias), margin=exact(margin), pos_weight=exact(pos_weight), **options,
    )  # fmt: skip
    if grad_output is None:
        grad_output = torch.ones_like(loss)
    (grad,) = torch.autograd.grad(loss, leaf, grad_output.double())
    return loss.detach(), grad


@cache
def sample(C: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits, target, weight, sample_weight: rows flat to certain, right and wrong; one ignored."""
    N = 21 if C < 100 else 5  # few classes: more than a vector of rows
    g = torch.Generator(DEVICE).manual_seed(seed + C)
    spread = torch.logspace(-3, 1, N, dtype=torch.float64).unsqueeze(1)
    logits = torch.randn(N, C, generator=g, dtype=torch.float64) * spread
    target = torch.randint(C, (N,), generator=g)
    logits[0, target[0]] += 12
    logits[2, target[2]] -= 12
    target[1] = IGNORED
    weight = torch.rand(C, generator=g, dtype=torch.float64) + 0.2
    sample_weight = torch.rand(N, generator=g, dtype=torch.float64) + 0.2
    return logits.to(dtype), target, weight.float(), sample_weight.float()


@st.composite
def option_sets(draw: st.DrawFn) -> dict[str, Any]:
    """The options of a formula, and a reduction, in any combination that has a meaning."""
    any_gamma = st.sampled_from(GAMMAS) | st.floats(0, 6)
    options = {
        "activation": draw(st.sampled_from(FAMILIES)),
        "gamma": draw(any_gamma),
        "label_smoothing": draw(st.sampled_from((0.0, 0.1, 0.9))),
        "logit_scale": draw(st.sampled_from((1.0, 0.5, 3.0))),
        "reduction": draw(st.sampled_from(REDUCTIONS)),
    }
    if options["activation"] == "softmax":
        return options | {"z_loss": draw(st.sampled_from((0.0, 0.01)))}
    if options["reduction"] != "weighted_mean":
        options["class_weighting"] = draw(st.sampled_from(("sample", "class")))
    return options | {
        "gamma_neg": draw(st.none() | any_gamma),
        # A float32: of a smaller one nothing is left.
        "alpha": draw(st.none() | st.floats(0, 1, width=32, allow_subnormal=False)),
        "clip": draw(st.sampled_from((0.0, 0.05, 0.3))),
    }


def mark(draw: st.DrawFn, options: dict[str, Any], target: Tensor, C: int) -> None:
    """Puts background rows, or unknown labels, among the targets of the sigmoid family."""
    chosen = torch.rand(target.shape, generator=torch.Generator(DEVICE).manual_seed(C)) < 0.3
    if target.is_floating_point():
        options["ignore_index"] = draw(st.sampled_from((None, IGNORED, -1)))
        target[chosen] = options["ignore_index"] or 0.0
    elif target.dtype is not torch.bool:
        options["background_index"] = draw(st.sampled_from((None, C, -7)))
        if options["background_index"] is not None:
            target[chosen] = options["background_index"]


def soft_targets(draw: st.DrawFn, logits: Tensor, generator: torch.Generator) -> Tensor:
    """One-hot, soft, or multi-hot, as floats or bools, in the shape of the logits."""
    kind = draw(st.sampled_from(("one-hot", "soft", "multi-hot", "bool")))
    t = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
    if kind == "one-hot":
        return torch.zeros_like(t).scatter(1, t.argmax(1, keepdim=True), 1.0)
    if kind == "soft":
        return t.pow(4) / t.pow(4).sum(1, keepdim=True)
    if kind == "bool":
        return t > 0.7
    hot = (t > 0.7).double()
    return torch.where(t < 0.1, -hot, hot)  # some zeros are -0
