"""Classes over ranks: torchrun --nproc-per-node 2 examples/train_tensor_parallel.py

Every rank has the whole batch, the layers before the head, and some of its classes.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist

from cbloss_fused import ClassBalancedLoss, ClassShards, linear_class_balanced_loss
from cbloss_fused.demo import long_tailed_split, make_model

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--out", type=Path, help="for the losses of all steps, as JSON")
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
split = long_tailed_split(imbalance=50, seed=0)
x, y = split.train_x.to(device), split.train_y.to(device)
model = make_model().to(device)
layers, head = model[:-1], dict(model[-1].named_parameters())
own = {name: t.detach().tensor_split(ranks)[rank].clone() for name, t in head.items()}
weight, bias = own["weight"].requires_grad_(), own["bias"].requires_grad_()
shards, class_weight = (
    ClassShards(len(weight)),
    ClassBalancedLoss(split.counts, 0.99).weight.to(device),
)
optimizer = torch.optim.Adam([*layers.parameters(), weight, bias], lr=3e-3)
losses = []
for epoch in range(args.epochs):
    for batch in (batches := torch.randperm(len(y)).split(32)):
        loss = linear_class_balanced_loss(
            layers(x[batch]), weight, y[batch], class_weight, linear_bias=bias, shards=shards
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if rank == 0:
        print(f"epoch {epoch + 1}: loss {sum(losses[-len(batches) :]) / len(batches):.4f}")
if rank == 0 and args.out:
    args.out.write_text(json.dumps(losses))
dist.destroy_process_group()
