"""Accelerate: accelerate launch examples/train_accelerate.py (run by `make frameworks-test`)

Over several processes the loss is the mean of all their rows.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cbloss_fused import ClassBalancedLoss

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=10)
args = parser.parse_args()

set_seed(0)
counts, centers = (500 * 0.6 ** torch.arange(10)).long(), torch.randn(10, 16)  # 500 ... 5 samples
labels = [torch.arange(10).repeat_interleave(n) for n in (counts, torch.tensor(100))]
train, test = (TensorDataset(centers[y] + torch.randn(len(y), 16), y) for y in labels)
model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 10))

accelerator = Accelerator()
model, optimizer, train_loader, test_loader = accelerator.prepare(
    model, torch.optim.AdamW(model.parameters(), lr=3e-3),
    DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=64),
)  # fmt: skip
loss_fn = ClassBalancedLoss(counts, beta=0.99, group=torch.distributed.group.WORLD)
loss_fn.to(accelerator.device)
for _ in range(args.epochs):
    for x, y in train_loader:
        optimizer.zero_grad()
        accelerator.backward(loss_fn(model(x), y))
        optimizer.step()
with torch.inference_mode():
    right = [accelerator.gather_for_metrics(model(x).argmax(1) == y) for x, y in test_loader]
accelerator.print(f"mean per-class accuracy {torch.cat(right).float().mean():.3f}")
