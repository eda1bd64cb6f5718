"""The public functions: signatures and docstrings."""

from __future__ import annotations

import operator
from typing import Literal, overload

from torch import Tensor
from typing_extensions import Unpack

from . import values
from .arguments import INTEGERS, check_inputs
from .arrays import integer_or_none
from .dispatch import dispatch
from .dtensor import is_dtensor, loss_of_dtensor
from .options import LossOptions, lists_options, spec_of
from .sharded import sharded_loss
from .shards import ClassShards
from .stats import ClassStats


@overload
def class_balanced_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    logit_bias: Tensor | None = None,
    margin: Tensor | None = None,
    sample_weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    shards: ClassShards | None = None,
    return_stats: Literal[False] = False,
    **options: Unpack[LossOptions],
) -> Tensor: ...
@overload
def class_balanced_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    logit_bias: Tensor | None = None,
    margin: Tensor | None = None,
    sample_weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    shards: ClassShards | None = None,
    return_stats: Literal[True],
    **options: Unpack[LossOptions],
) -> tuple[Tensor, ClassStats]: ...
@overload
def class_balanced_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    logit_bias: Tensor | None = None,
    margin: Tensor | None = None,
    sample_weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    shards: ClassShards | None = None,
    return_stats: bool,
    **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, ClassStats]: ...
@lists_options
def class_balanced_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    logit_bias: Tensor | None = None,
    margin: Tensor | None = None,
    sample_weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    shards: ClassShards | None = None,
    return_stats: bool = False,
    **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, ClassStats]:
    """Class-balanced softmax, sigmoid or focal loss and its gradient, in one pass over the logits.

    Each row's loss is multiplied by r = weight[target] * sample_weight: the whole row, in the
    sigmoid family too. With p_j = softmax(z)_j, p = p_y, and p_t = sigmoid(z_j) at the target, else
    sigmoid(-z_j):

        softmax: r ((1-ε) (1-p)^γ (-log p) + ε/C Σ_j -log p_j + ζ (log Σ_j e^{z_j})²)
        sigmoid: r Σ_j α_t (1-p_t)^γ (-log p_t)

    where z_j = logit_scale (input_j + logit_bias_j - margin_j [j = target]).

    Args:
        input: logits, (C,), (N, C) or (N, C, d1, ..., dk), C >= 1, any strides; float32, bfloat16,
            float16 or float64. Half types are computed in float32.
        target: class indices in [0, C), ignore_index or background_index; any integer type; (),
            (N,) or (N, d1, ..., dk). A float target of 1-d logits is one row of C classes: give a
            binary batch of N logits and targets the shape (N, 1). With one logit, C = 1, the only
            index 0 is the positive class: give 0/1 labels as floats of shape (N, 1).
            Or soft or multi-hot labels: one float or bool per class, t_j, in
            input's shape; finite and >= 0, for "sigmoid" at most 1. Then r takes the mean weight of
            the labels, Σ_j t_j weight_j / Σ_j t_j (1 where there are none); gamma > 0 in "softmax"
            and a margin raise an error. "softmax" weights each class's term by that class's
            weight: sample_weight (1-ε) Σ_j t_j weight_j (-log p_j) + r times its other two terms.
            For t that sums to 1 this is the mean over t of the losses of the class indices, as in
            mixup. "sigmoid" is r Σ_j [t_j L(z_j, 1) + (1 - t_j) L(z_j, 0)].
        weight: (C,) of any floating type, finite and >= 0, as `class_balanced_weights` gives them;
            None weighs all classes 1. Used in float32 (float64 for float64 logits).
        activation: "softmax" or "sigmoid" (one against the rest, summed over the classes).
        gamma: focal exponent γ >= 0; 0 is the plain loss. torch.compile compiles anew for another
            value of it, as for any other number here. The paper's focal loss is "sigmoid" with
            0.5, 1 or 2.
        gamma_neg: γ of the classes that are not the target, "sigmoid" only; None: gamma.
        alpha: in [0, 1], "sigmoid" only: α_t is alpha for the target and 1 - alpha for the other
            classes; None: 1 for all.
        clip: in [0, 1), "sigmoid" only: the other classes' p counts as max(p - clip, 0), so that
            negatives with p below clip contribute nothing (asymmetric loss). There p is accurate to
            1e-7.
        label_smoothing: ε in [0, 1): the target becomes (1-ε) one-hot + ε/C. The row's weight
            multiplies the smoothing term; in F.cross_entropy the weight of class j multiplies j's.
        z_loss: ζ >= 0, softmax only: keeps the logits' log-sum-exp near 0; 1e-4 is common. Its
            square overflows where |z| is above 1e19.
        logit_bias: (C,), finite: added to every row, see `logit_adjustment`.
        margin: (C,), finite: taken off the target's own logit, see `ldam_margin`.
        logit_scale: positive, at most 1e30: an inverse temperature. A learnable one multiplies the
            logits instead, class_balanced_loss(scale * x, ...). With any of these three z is
            rounded to the compute type: in float32 p is off by 1e-7 |z|.
        sample_weight: one number per row, (), (N,) or (N, d1, ..., dk), finite and >= 0.
        class_weighting: "sample": weight[target] multiplies the row, as in the paper; "class":
            weight[j] multiplies class j's term, "sigmoid" only and not with "weighted_mean".
            This, soft targets and pos_weight with label_smoothing have fused kernels on the CPU and
            in Triton; backend="cuda" uses Triton's for them.
        pos_weight: (C,) of any floating type, finite and >= 0, "sigmoid" only: multiplies the term
            of class j where the target is class j, as in F.binary_cross_entropy_with_logits: t_j of
            multi-hot and smoothed targets. It is a part of no r and of no denominator.
        ignore_index: rows with this target are ignored, even if they hold NaN; None ignores none.
            A negative one marks elements of multi-hot float targets too, "sigmoid" only: labels
            that nobody knows (CheXpert's -1) have no loss, no gradient and no part in r.
        background_index: "sigmoid" only: rows with this target, neither a class nor ignore_index,
            have no positive class, as most anchors of a detector (C in mmdetection). Such a row's r
            is its sample_weight, where a row of a head class has a small weight: to scale
            background down, give these rows a sample_weight. It counts as a row in the mean, while
            detectors divide by the positives: normalizer=(target < C).sum().clamp(min=1).
        reduction: "none", "sum", "mean" (over the rows that are not ignored, as in the paper) or
            "weighted_mean" (divided by Σ r, what F.cross_entropy calls "mean").
        normalizer: positive number or 0-d tensor of any real type in place of the mean's
            denominator, to share one across ranks or accumulation steps; a tensor that is 0 means
            that there is nothing to average.
        inplace: write the gradient over input, which must not be a leaf or a view of one: no N×C
            memory at all. An earlier layer that saved input raises in its backward; code that
            reads input afterwards sees the gradient, and no error can be raised.
        recompute: compute the gradient in the backward, from input, not in the forward. None: for
            float16 (a stored gradient may underflow before a loss scaler acts). Always for "none".
        backend: None (choose, see `backends`), "cpu", "triton" or "cuda" (for CUDA tensors; "cuda"
            where the package was built with nvcc) or "reference" (eager PyTorch, which has second
            derivatives and torch.func).

        shards: a `ClassShards`: input has this rank's classes alone, target those of all of them.
            Every rank calls it, with the same rows, and gets the same loss. weight, logit_bias,
            margin and pos_weight are of all classes or of this rank's. Class indices alone.
            Softmax communicates 12 bytes per row and rank (16 with label_smoothing; twice that for
            float64), sigmoid one number (with "none" or return_stats one per row), the backward
            nothing; a weight of this rank's classes alone one number per row more. return_stats
            gives this rank's classes. There are no second derivatives.
        return_stats: return (loss, `ClassStats`) from the same pass: which classes drive training.
            Class indices alone; not with "none", inplace or "reference".

    input may be a DTensor that is replicated or has its rows sharded over ranks; the other tensors
    are then a rank's own rows, plain or placed as input is. A mean is that of all rows, the loss a
    partial sum, or sharded as the rows are for "none". Or its classes are sharded, as by shards.

    Returns:
        A scalar, or one loss per row for "none"; float64 for float64 logits, else float32. 0
        with zero gradients where there is nothing to average. NaN in, NaN out; finite for every
        logit with |z| * C * max r <= 1e37 (with z_loss: |z| <= 1e19) and every γ.

    Raises:
        IndexError: a target outside [0, C) on the CPU. On other devices nothing synchronises: the
            row's loss and gradient are NaN there; call `check_target` to raise instead.
        ValueError: a shape, device, range or choice that does not fit; a weight or soft target out
            of its range (on the CPU; elsewhere no value is looked at, and the result is undefined);
            options that have no meaning together, as clip with "softmax"; a tensor other than input
            requires grad.
        TypeError: a dtype or type that does not fit.
        NotImplementedError: torch.func transforms, forward-mode derivatives or torch.jit.trace of a
            fused kernel; return_stats or shards in a torch.export with a gradient; a DTensor with
            another placement.
        RuntimeError: a second derivative of a fused kernel (in backward).

    Source: Cui et al., Class-Balanced Loss Based on Effective Number of Samples, CVPR 2019
    (arXiv 1901.05555), equations 8, 11 and 13. Asymmetric loss: Ridnik et al., ICCV 2021
    (arXiv 2009.14119), equation 7.

    >>> import torch
    >>> from cbloss_fused import class_balanced_loss, class_balanced_weights
    >>> logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]], requires_grad=True)
    >>> target = torch.tensor([0, 2])
    >>> weight = class_balanced_weights(torch.tensor([100, 10, 1]), beta=0.9)
    >>> loss = class_balanced_loss(logits, target, weight, activation="sigmoid", gamma=0.5)
    >>> loss.backward()
    >>> loss
    tensor(2.6000, grad_fn=<StoredGradientBackward>)
    """
    spec = spec_of("class_balanced_loss", options)
    given = target, weight, sample_weight, normalizer, logit_bias, margin, pos_weight
    if shards is not None:
        return sharded_loss(input, given, spec, return_stats, shards)
    if type(input) is not Tensor and is_dtensor(input):
        return loss_of_dtensor(input, given, spec, return_stats)
    inputs = check_inputs(input, *given, spec, return_stats)
    return dispatch(input, inputs, spec, return_stats)


def check_target(
    target: Tensor,
    num_classes: int,
    ignore_index: int | None = -100,
    background_index: int | None = None,
) -> None:
    """Raise IndexError if any target is out of range; on a GPU this synchronises.

    Args:
        target: class indices, any shape, integer type and device.
        num_classes: C >= 1.
        ignore_index, background_index: the values outside [0, C) that are allowed; None: there is
            none.

    Raises:
        IndexError: names the first offending value, its index and how many there are.
        TypeError: target is no tensor of integers, or another argument no integer.
        ValueError: num_classes is below 1, or an index has more than 64 bits.

    >>> import torch
    >>> from cbloss_fused import check_target
    >>> check_target(torch.tensor([0, 7, 2]), num_classes=3)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    IndexError: target[1] = 7 is out of range: expected 0 <= target < 3 or ignore_index=-100 (1 ...
    """
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a Tensor, got {type(target).__name__}")
    if target.dtype not in INTEGERS:
        raise TypeError(f"target must hold class indices of an integer type, got {target.dtype}")
    try:
        C = operator.index(num_classes)
    except TypeError:
        raise TypeError(f"num_classes must be an int, got {num_classes!r}") from None
    if C < 1:
        raise ValueError(f"num_classes must be at least 1, got {C}")
    ignore_index = integer_or_none("ignore_index", ignore_index)
    background_index = integer_or_none("background_index", background_index)
    values.check_target(target, C, ignore_index, background_index)
