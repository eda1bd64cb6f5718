"""Stand-ins for torchvision's compiled operators, where its package cannot load them.

The torchvision of PyPI is linked with CUDA. Beside a torch for CPUs its library does not load, and
importing it fails: it describes operators that nobody has declared. So does importing whatever
imports torchvision if it is there: Lightning, transformers, timm, fastai.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def stand_in() -> None:
    """Let torchvision be imported, and its detectors run, if it is installed."""
    found = find_spec("torchvision")
    if found is None or found.origin is None:
        return
    try:
        torch.ops.load_library(next(Path(found.origin).parent.glob("_C*.so")))
    except OSError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", NMS)
        from torchvision.ops import boxes

        boxes.nms = nms


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes (N, 4) that overlap no kept one of a higher score too much."""
    from torchvision.ops import box_iou

    left, kept = scores.argsort(descending=True), []
    overlap = box_iou(boxes, boxes)
    while len(left):
        kept.append(left[0])
        left = left[1:][overlap[left[0], left[1:]] <= iou_threshold]
    return torch.stack(kept) if kept else left
