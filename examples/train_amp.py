"""Mixed precision in a plain loop: python examples/train_amp.py (run by `make test`)

On a GPU float16 with a GradScaler, else bfloat16.
"""

import argparse

import torch
from torch import nn

from cbloss_fused import ClassBalancedLoss

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=10)
args = parser.parse_args()

torch.manual_seed(0)
device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.bfloat16)
counts = (500 * 0.6 ** torch.arange(10)).long()  # 500 samples of the first class, 5 of the last
y, test_y = (torch.arange(10).repeat_interleave(n).to(device) for n in (counts, torch.tensor(100)))
centers = torch.randn(10, 16, device=device)
x, test_x = (centers[t] + torch.randn(len(t), 16, device=device) for t in (y, test_y))

model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
loss_fn = ClassBalancedLoss(counts, beta=0.99).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
for _ in range(args.epochs):
    for batch in torch.randperm(len(y)).split(64):
        with torch.autocast(device, dtype):
            loss = loss_fn(model(x[batch]), y[batch])  # reads the half logits, returns float32
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
with torch.inference_mode(), torch.autocast(device, dtype):
    right = model(test_x).argmax(1) == test_y  # as many of every class
print(f"mean per-class accuracy {right.float().mean():.3f}")
