"""Losses and class weights of other packages, written to rivals.json for tests/test_rivals.py.

Their wheels need another torch than the one we are built against, so this is run by hand, in an
environment of its own, on a CPU:

    pip install torch==2.14.1 torchvision==0.29.1 timm==1.0.31 kornia==0.9.0 \
        pytorch-metric-learning==2.9.0 segmentation-models-pytorch==0.6.0 liger-kernel==0.8.5
    TRITON_INTERPRET=1 python tests/data/make.py

Each case is the call as a user writes it, which is evaluated; its loss and gradient; and `ours`:
the arguments of class_balanced_loss whose loss, times `scale`, is the same. A string that is the
name of an input stands for that input, there too.

Left out, because no options of ours give the same: of timm, terms that are weighted by more than a
row's and a class's factor (DistributionBalancedLoss with its map) or compared with other terms
(TwoWayLoss, ZlprLoss), Poly-1's own term, asymmetric losses with smoothed labels; losses of regions
(kornia, segmentation-models-pytorch); pytorch-metric-learning but CosFaceLoss, because it compares
embeddings. Liger's kernels of weights and softcap do not run in Triton's interpreter.
"""

from __future__ import annotations

import json
import platform
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import kornia
import liger_kernel.transformers
import pytorch_metric_learning.losses
import pytorch_metric_learning.reducers
import segmentation_models_pytorch as smp
import timm.loss
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

PACKAGES = (
    *("torch", "torchvision", "timm", "kornia", "pytorch-metric-learning"),
    *("segmentation-models-pytorch", "liger-kernel"),
)
N, C, SAMPLES = 6, 5, 1500


def inputs() -> dict[str, Tensor]:
    """Mostly fractions of 64: exact in float32, which some packages compute in, and short."""
    torch.manual_seed(0)

    def fractions(*shape: int, low: float, high: float) -> Tensor:
        return (64 * (low + (high - low) * torch.rand(shape, dtype=torch.float64))).round() / 64

    def multi_hot(*shape: int) -> Tensor:
        return (torch.rand(shape) > 0.6).double()

    t = multi_hot(N, C)
    t[4] = 0  # no label
    unknown = t.clone()
    unknown[0, 1:4] = unknown[2, 0] = unknown[3] = -100
    background = C
    anchors = torch.tensor([background, background, 2, background, 0, background])
    image_y = torch.randint(C, (2, 3, 2))
    image_y[0, 1, 0] = image_y[1, 2, 1] = 255
    counts = torch.tensor([1000, 300, 50, 7, 2])
    return {
        "x": fractions(N, C, low=-5, high=5),
        "image": fractions(2, C, 3, 2, low=-5, high=5),
        "cosine": fractions(N, C, low=-1, high=1),
        "y": torch.tensor([0, 3, 2, 0, 4, 1]),
        "image_y": image_y,
        "anchors": anchors,
        "anchors_unsure": torch.where(torch.arange(N) == 1, -100, anchors),
        "boxes": F.one_hot(anchors, C + 1)[:, :C].double(),
        "t": t,
        "image_t": multi_hot(2, C, 3, 2),
        "soft": F.one_hot(torch.randint(C, (N, 16)), C).sum(1).double() / 16,
        "towards_half": 0.9 * t + 0.05,
        "unknown": unknown,
        "unknown_1": torch.where(unknown == -100, -1.0, unknown),
        "w": fractions(C, low=0.25, high=3),
        "v": fractions(C, low=0.25, high=9),
        "threes": torch.full((C,), 3.0, dtype=torch.float64),
        "negatives": ((SAMPLES - counts) / counts).double(),  # for each positive
        "quarters": torch.tensor([0.75, *[0.25] * (C - 1)], dtype=torch.float64),
        "margins": torch.full((C,), 0.25, dtype=torch.float64),
        "prior": -0.5 * (SAMPLES / counts.double() - 1).log(),
        "counts": counts,
        "counts_0": torch.tensor([1000, 300, 50, 7, 0]),
        "roots": counts.double().sqrt(),
        "upstream": fractions(N, low=-2, high=2),  # the gradient of a loss per row
    }


class Case(NamedTuple):
    theirs: str
    scale: float
    ours: dict[str, Any]


def case(theirs: str, scale: float = 1.0, input: str = "x", **ours: Any) -> Case:
    return Case(theirs, scale, {"input": input, **ours})


sigmoid = partial(case, activation="sigmoid")
by_class = partial(sigmoid, class_weighting="class")


def torch_cases() -> list[Case]:
    ce, bce = "F.cross_entropy", "F.binary_cross_entropy_with_logits"
    soft, weighted = partial(case, target="soft", weight="w"), partial(sigmoid, pos_weight="v")
    found = [
        case(f"{ce}(x, y, w)", target="y", weight="w", reduction="weighted_mean"),
        case(f"{ce}(x, y, label_smoothing=0.1)", target="y", label_smoothing=0.1),
        case(f"{ce}(x, soft)", target="soft"),
        case(f"{ce}(x, t)", target="t"),
        soft(f"{ce}(x, soft, w)"),
        soft(f"{ce}(x, soft, w, reduction='sum')", reduction="sum"),
        soft(f"{ce}(x, soft, w, reduction='none')", reduction="none"),
        by_class(f"{bce}(x, t, w)", 1 / C, target="t", weight="w"),
        by_class(f"{bce}(x, t, w, pos_weight=v)", 1 / C, target="t", weight="w", pos_weight="v"),
        weighted(f"{bce}(x, 0.9 * t + 0.1 / 5, pos_weight=v)", 1 / C, target="t",
                 label_smoothing=0.1),
    ]  # fmt: skip
    for t in ("t", "soft", "towards_half"):
        call, ours = f"{bce}(x, {t}, pos_weight=v", partial(weighted, target=t)
        found += [
            ours(f"{call})", 1 / C),
            ours(f"{call}, reduction='sum')", reduction="sum"),
            ours(f"{call}, reduction='none').sum(1)", reduction="none"),
        ]
    return found


def torchvision_cases() -> list[Case]:
    call = "torchvision.ops.sigmoid_focal_loss"
    focal = partial(sigmoid, gamma=2.0, alpha=0.25)
    sure = "anchors_unsure != -100"
    found = [
        focal(f"{call}(x, t, reduction='sum')", target="t", reduction="sum"),
        focal(f"{call}(x[{sure}], boxes[{sure}], reduction='sum') / 2", normalizer=2.0,
              target="anchors_unsure", background_index=C),
    ]  # fmt: skip
    for target in ({"target": "boxes"}, {"target": "anchors", "background_index": C}):
        ours = partial(focal, **target)
        found += [
            ours(f"{call}(x, boxes).sum(1)", reduction="none"),
            ours(f"{call}(x, boxes, reduction='mean')", 1 / C),
            ours(f"{call}(x, boxes, 0.25, 2, 'sum')", reduction="sum"),
            ours(f"{call}(x, boxes, -1, 2, 'sum')", alpha=None, reduction="sum"),
            ours(f"{call}(x, boxes, -1, 0, 'sum')", alpha=None, gamma=0.0, reduction="sum"),
            ours(f"{call}(x, boxes, reduction='sum') / (anchors != 5).sum()", normalizer=2.0),
        ]
    return found


def timm_bce_cases() -> list[Case]:
    call = "timm.loss.BinaryCrossEntropy"
    smooth, multi = partial(sigmoid, target="y", label_smoothing=0.1), partial(sigmoid, target="t")
    balanced = "timm.loss.compute_class_weights(counts, 1500, 'neg_pos')[1]"
    return [
        smooth(f"{call}()(x, y)", 1 / C),
        smooth(f"{call}(sum_classes=True)(x, y)"),
        smooth(f"{call}(reduction='sum')(x, y)", reduction="sum"),
        smooth(f"{call}(reduction='none')(x, y).sum(1)", reduction="none"),
        smooth(f"{call}(weight=w)(x, y)", 1 / C, weight="w", class_weighting="class"),
        smooth(f"{call}(pos_weight=v)(x, y)", 1 / C, pos_weight="v"),
        sigmoid(f"{call}(smoothing=0, pos_weight=v)(x, y)", 1 / C, target="y", pos_weight="v"),
        multi(f"{call}(pos_weight=3.0)(x, t)", 4 / C, alpha=0.75),
        multi(f"{call}(pos_weight=3.0)(x, t)", 1 / C, pos_weight="threes"),
        multi(f"{call}(pos_weight=v, sum_classes=True)(x, t)", pos_weight="v"),
        multi(f"{call}(pos_weight={balanced})(x, t)", 1 / C, pos_weight="negatives"),
        multi(f"{call}(weight=w, pos_weight=v)(x, t)", 1 / C, weight="w", pos_weight="v",
              class_weighting="class"),
        sigmoid(f"{call}(smooth_dense=True)(x, t)", 1 / C, target="towards_half"),
    ]  # fmt: skip


def timm_asymmetric_cases() -> list[Case]:
    """Of many labels: in float32, unless a float64 weight widens the result."""
    call = "timm.loss.AsymmetricLossMultiLabel"
    paper = partial(sigmoid, gamma=1.0, gamma_neg=4.0, clip=0.05)
    multi, one = partial(paper, target="t"), "timm.loss.AsymmetricLossSingleLabel"
    return [
        multi(f"{call}()(x, t)"),
        multi(f"{call}(4, 1, 0.05, reduction='sum')(x, t)", reduction="sum"),
        multi(f"{call}(reduction='mean')(x, t)", 1 / C),
        multi(f"{call}(reduction='none')(x, t).sum(1)", reduction="none"),
        multi(f"{call}(2, 0.5, clip=0)(x, t)", gamma=0.5, gamma_neg=2.0, clip=0.0),
        multi(f"{call}(weight=w.float())(x, t)", weight="w", class_weighting="class"),
        multi(f"{call}(pos_weight=3.0)(x, t)", pos_weight="threes"),
        multi(f"{call}(weight=w.float(), pos_weight=v.float())(x, t)", weight="w", pos_weight="v",
              class_weighting="class"),
        paper(f"{call}()(x, F.one_hot(y, 5))", target="y"),
        paper(f"{call}()(x, boxes)", target="anchors", background_index=C),
        case(f"{one}(eps=0)(x, y)", target="y", gamma=1.0),
        case(f"{one}(2, eps=0, reduction='none')(x, y)", target="y", gamma=2.0, reduction="none"),
        case(f"{one}(0, 0, eps=0.1)(x, y)", target="y", label_smoothing=0.1),
    ]  # fmt: skip


def other_timm_cases() -> list[Case]:
    """The last three are parts of their losses: their own terms, or weights, are switched off."""
    smooth = partial(case, target="y", label_smoothing=0.1)
    focal = partial(sigmoid, target="t", gamma=2.0)
    return [
        smooth("timm.loss.LabelSmoothingCrossEntropy(0.1)(x, y)"),
        case("timm.loss.SoftTargetCrossEntropy()(x, soft)", target="soft"),
        case("timm.loss.SoftTargetCrossEntropy()(x, t)", target="t"),
        smooth("timm.loss.PolyCrossEntropy(epsilon=0, smoothing=0.1)(x, y)"),
        focal("timm.loss.PolyBinaryCrossEntropy(epsilon=0, gamma=2, alpha=0.25)(x, t)", 1 / C,
              alpha=0.25),
        focal("timm.loss.DistributionBalancedLoss(counts, 1500, map_alpha=0.5, map_beta=0, "
              "neg_scale=1, init_bias=0.5)(x, t)", 2 / C, logit_bias="prior"),
        focal("timm.loss.DistributionBalancedLoss(counts, 1500, map_alpha=0.5, map_beta=0, "
              "neg_scale=1, init_bias=0.5, reduction='batchmean')(x, t)", 2, logit_bias="prior"),
    ]  # fmt: skip


def kornia_cases() -> list[Case]:
    """Their means divide by every element, ignored or not."""
    one, many = "kornia.losses.focal_loss", "kornia.losses.binary_focal_loss_with_logits"
    index, focal = partial(case, gamma=2.0), partial(sigmoid, gamma=2.0, alpha=0.25)
    multi = partial(focal, target="t")
    everything = partial(focal, weight="w", pos_weight="v", class_weighting="class")
    return [
        index(f"{one}(x, y, None, reduction='mean')", 1 / C, target="y"),
        index(f"{one}(x, y, None, 0.5).sum(1)", target="y", gamma=0.5, reduction="none"),
        index(f"{one}(x, y, 0.25, reduction='sum')", target="y", weight="quarters",
              reduction="sum"),
        index(f"{one}(x, y, None, reduction='mean', weight=w)", 1 / C, target="y", weight="w"),
        index(f"{one}(image, image_y, None, reduction='mean', ignore_index=255)", 1 / C,
              input="image", target="image_y", ignore_index=255, normalizer=12.0),
        multi(f"{many}(x, t).sum(1)", reduction="none"),
        multi(f"{many}(x, t, reduction='mean')", 1 / C),
        multi(f"{many}(x, t, None, 0.5, 'mean')", 1 / C, gamma=0.5, alpha=None),
        focal(f"{many}(x, soft, reduction='sum')", target="soft", reduction="sum"),
        focal(f"{many}(image, image_t, reduction='mean')", 1 / C, input="image",
              target="image_t"),
        multi(f"{many}(x, t, reduction='mean', weight=w)", 1 / C, weight="w",
              class_weighting="class"),
        multi(f"{many}(x, t, reduction='mean', pos_weight=v)", 1 / C, pos_weight="v"),
        everything(f"{many}(x, soft, reduction='sum', pos_weight=v, weight=w)", target="soft",
                   reduction="sum"),
        focal(f"{many}(x, unknown, reduction='mean')", 1 / C, target="unknown"),
        everything(f"{many}(x, unknown, pos_weight=v, weight=w).sum(1)", target="unknown",
                   reduction="none"),
        focal(f"{many}(x, unknown_1, reduction='sum', ignore_index=-1)", target="unknown_1",
              ignore_index=-1, reduction="sum"),
    ]  # fmt: skip


def segmentation_cases() -> list[Case]:
    focal, bce = "smp.losses.FocalLoss", "smp.losses.SoftBCEWithLogitsLoss"
    smooth = "smp.losses.SoftCrossEntropyLoss(smooth_factor=0.1"
    index, multi = partial(sigmoid, target="y", gamma=2.0), partial(sigmoid, target="t")
    image: dict[str, Any] = {"input": "image", "target": "image_y", "ignore_index": 255}
    return [
        index(f"{focal}('multiclass', alpha=0.25)(x, y)", 1 / C, alpha=0.25),
        index(f"{focal}('multiclass', class_weights=w)(x, y) * w.sum()", weight="w",
              class_weighting="class"),
        sigmoid(f"{focal}('multiclass', ignore_index=255)(image, image_y)", 1 / C, gamma=2.0,
                **image),
        multi(f"{focal}('multilabel', gamma=0.5)(x, t)", 1 / C, gamma=0.5),
        multi(f"{focal}('binary', alpha=0.25)(x, t)", 1 / C, gamma=2.0, alpha=0.25),
        case(f"{smooth})(x, y)", target="y", label_smoothing=0.1),
        case(f"{smooth}, ignore_index=255)(image, image_y)", label_smoothing=0.1, normalizer=12.0,
             **image),
        multi(f"{bce}(pos_weight=v)(x, t)", 1 / C, pos_weight="v"),
        sigmoid(f"{bce}(smooth_factor=0.05)(x, t)", 1 / C, target="towards_half"),
        sigmoid(f"{bce}(weight=w)(x, unknown)", 1 / C, target="unknown", weight="w",
                class_weighting="class"),
    ]  # fmt: skip


def liger_cases() -> list[Case]:
    """In float32, whatever the logits are."""
    call = "liger_kernel.transformers.LigerCrossEntropyLoss"
    z = partial(case, target="y", z_loss=0.25)
    return [
        z(f"{call}(lse_square_scale=0.25)(x.float(), y)"),
        z(f"{call}(lse_square_scale=0.25, label_smoothing=0.1)(x.float(), y)",
          label_smoothing=0.1),
        z(f"{call}(lse_square_scale=0.25, reduction='sum')(x.float(), y)", reduction="sum"),
        case(f"{call}(ignore_index=0, label_smoothing=0.1)(x.float(), y)", target="y",
             ignore_index=0, label_smoothing=0.1),
    ]  # fmt: skip


def metric_learning_cases() -> list[Case]:
    call = "pytorch_metric_learning.losses.CosFaceLoss(5, 5, margin=0.25, scale=30"
    reducer = "pytorch_metric_learning.reducers.ClassWeightedReducer(w)"
    ours = partial(case, input="cosine", target="y", margin="margins", logit_scale=30.0)
    return [
        ours(f"of_cosines({call}))(cosine, y)"),
        ours(f"of_cosines({call}, reducer={reducer}))(cosine, y)", weight="w"),
    ]


def class_weights() -> list[tuple[str, dict[str, Any]]]:
    """Calls, and the arguments of class_balanced_weights."""
    call = "timm.loss.compute_class_weights"
    return [
        (f"{call}(counts, 1500, 'effective_num')[1]", {"counts": "counts"}),
        (f"{call}(counts, 1500, 'effective_num', beta=0.9)[1]", {"counts": "counts", "beta": 0.9}),
        (f"{call}(counts_0, 1500, 'effective_num')[1]", {"counts": "counts_0", "empty": "one"}),
        (f"{call}(counts, 1500, 'inv_freq')[1]", {"counts": "counts", "beta": 1.0}),
        (f"{call}(counts, 1500, 'inv_freq', power=0.5)[1]", {"counts": "roots", "beta": 1.0}),
    ]


def of_cosines(loss: nn.Module) -> nn.Module:
    """The same loss of cosines instead of embeddings."""
    vars(loss)["get_cosine"] = lambda cosine: cosine
    return loss


NAMES = {
    "F": F,
    "kornia": kornia,
    "liger_kernel": liger_kernel,
    "of_cosines": of_cosines,
    "pytorch_metric_learning": pytorch_metric_learning,
    "smp": smp,
    "timm": timm,
    "torchvision": torchvision,
}


def evaluated(case: Case, tensors: dict[str, Tensor]) -> dict[str, Any]:
    name = case.ours["input"]
    leaf = tensors[name].clone().requires_grad_()
    loss = eval(case.theirs, NAMES, {**tensors, name: leaf})
    (grad,) = torch.autograd.grad(loss, leaf, tensors["upstream"] if loss.dim() else None)
    return {
        **case._asdict(),
        "computed_in": str(loss.dtype).removeprefix("torch."),
        "loss": loss.tolist(),
        "grad": grad.tolist(),
    }


def one_a_line(entries: dict[str, Any] | list[Any]) -> str:
    """JSON in which a difference between two versions can be read."""
    if isinstance(entries, list):
        return "[\n" + ",\n".join(map(json.dumps, entries)) + "\n]"
    return "{\n" + ",\n".join(f'"{name}": {json.dumps(v)}' for name, v in entries.items()) + "\n}"


def main() -> None:
    makers = (
        *(torch_cases, torchvision_cases, timm_bce_cases, timm_asymmetric_cases),
        *(other_timm_cases, kornia_cases, metric_learning_cases),
        *(segmentation_cases, liger_cases),
    )
    tensors = inputs()
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    versions = {name: version(name) for name in PACKAGES}
    stored: dict[str, Any] = {
        "versions": {"python": platform.python_version(), **versions},
        "floats": {name: tensor.tolist() for name, tensor in floats.items()},
        "integers": {n: tensor.tolist() for n, tensor in tensors.items() if n not in floats},
        "losses": [evaluated(case, tensors) for maker in makers for case in maker()],
        "weights": [
            {"theirs": call, "ours": ours, "weights": eval(call, NAMES, tensors).tolist()}
            for call, ours in class_weights()
        ],
    }
    parts = ",\n".join(f'"{name}": {one_a_line(entries)}' for name, entries in stored.items())
    Path(__file__).with_name("rivals.json").write_text(f"{{\n{parts}\n}}\n")


if __name__ == "__main__":
    main()
