"""Segmentation: python examples/train_segmentation.py (run by `make test`)

Logits are (N, C, H, W), masks (N, H, W); 255 marks a pixel without a label.
"""

import argparse

import torch
from torch import Tensor, nn

from cbloss_fused import ClassBalancedLoss

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=10)
args = parser.parse_args()


def squares(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy images (N, 3, 32, 32) with a square of each label's colour on class 0; their masks."""
    mask = torch.zeros(len(labels), 32, 32, dtype=torch.long)
    for m, label, (i, j) in zip(mask, labels, torch.randint(22, (len(labels), 2)), strict=True):
        m[i : i + 10, j : j + 10] = label
    images = colours[mask].movedim(3, 1) + torch.randn(len(labels), 3, 32, 32)
    mask[:, ::8] = 255
    return images, mask


torch.manual_seed(0)
colours = torch.randn(5, 3)
x, y = squares(torch.arange(1, 5).repeat_interleave(torch.tensor([200, 50, 20, 5])))
model = nn.Sequential(nn.Conv2d(3, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, 5, 5, padding=2))
loss_fn = ClassBalancedLoss.from_labels(y, 5, beta=0.9999, ignore_index=255)  # counts pixels
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for batch in (batch for _ in range(args.epochs) for batch in torch.randperm(len(x)).split(16)):
    optimizer.zero_grad()
    loss_fn(model(x[batch]), y[batch]).backward()
    optimizer.step()
x, y = squares(torch.arange(1, 5).repeat_interleave(20))
recalls = [(model(x).argmax(1) == y)[y == c].float().mean() for c in range(5)]
print(f"mean per-class accuracy {sum(recalls) / 5:.3f}")
