"""Long-tailed digits by DDP: torchrun --nproc-per-node 2 examples/train_ddp.py

However many ranks share a batch, and however unevenly, the losses are those of one process.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cbloss_fused import ClassBalancedLoss
from cbloss_fused.demo import C, long_tailed_split, make_model

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--out", type=Path, help="a file for the losses of all steps, as JSON")
args = parser.parse_args()

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if device.type == "cuda":
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
if "RANK" in os.environ:  # by torchrun
    dist.init_process_group()
else:
    dist.init_process_group(init_method="tcp://localhost:0", rank=0, world_size=1)
rank, ranks = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)  # every rank makes the same model and draws the same batches
x, y, _, _ = long_tailed_split(imbalance=50, seed=0)
y[::7] = -100  # images without a label: ignored, and not counted
model = DistributedDataParallel(make_model().to(device))
own = y[rank::ranks]  # every rank counts a part
loss_fn = ClassBalancedLoss.from_labels(own, C, 0.99, gamma=0.5, group=dist.group.WORLD).to(device)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
losses = []
for epoch in range(args.epochs):
    batches = torch.randperm(len(y)).split(32)  # the last one is smaller
    for batch in batches:
        own = batch.tensor_split(ranks)[rank]
        loss = loss_fn(model(x[own].to(device)), y[own].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        dist.all_reduce(whole := loss.detach() / ranks)  # the mean of the ranks' losses
        losses.append(whole.item())
    if rank == 0:
        print(f"epoch {epoch + 1}: loss {sum(losses[-len(batches) :]) / len(batches):.4f}")
if rank == 0 and args.out:
    args.out.write_text(json.dumps(losses))
dist.destroy_process_group()
