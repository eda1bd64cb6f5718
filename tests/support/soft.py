"""Soft targets that tests share, and how they lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def soft(logits: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator(logits.device).manual_seed(seed)
    t = torch.rand(logits.shape, generator=generator, dtype=torch.float64).pow(4)
    return t / t.sum(1, keepdim=True)


LAYOUTS = {
    "vector": ((5,), None),
    "rows": ((6, 5), None),
    "many-classes": ((3, 131), None),
    "transposed": ((6, 5), (1, 0)),
    "many-classes-apart": ((131, 9), (1, 0)),
    "image": ((2, 5, 5, 7), None),
    "channels-last": ((2, 3, 4, 5), (0, 3, 1, 2)),
}
