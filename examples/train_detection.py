"""torchvision's RetinaNet: python examples/train_detection.py (run by `make frameworks-test`)"""

import argparse
from typing import Any

import torch
from torchvision.models.detection import retinanet

from cbloss_fused import ClassBalancedLoss


class Head(retinanet.RetinaNetClassificationHead):
    def compute_loss(self, targets: Any, out: Any, idx: list[torch.Tensor]) -> torch.Tensor:
        y = torch.stack(idx)  # each anchor's box; -1: background, -2: neither
        y[y >= 0] = torch.cat([t["labels"][i[i >= 0]] for t, i in zip(targets, idx, strict=True)])
        return loss_fn(out["cls_logits"].mT, y, normalizer=(y >= 0).sum().clamp(min=1))


parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=5)
torch.manual_seed(0)
labels = torch.tensor([0] * 150 + [1] * 40 + [2] * 10 + [0, 1, 2] * 20)  # the last 60 to test
images, corners = list(torch.rand(260, 3, 64, 64)), torch.randint(48, (260, 2))
for image, c, (j, i) in zip(images, labels, corners, strict=True):
    image[c, i : i + 16, j : j + 16] += 1
boxes = torch.cat([corners, corners + 16], 1).float()
targets = [{"boxes": boxes[i : i + 1], "labels": labels[i : i + 1]} for i in range(260)]
anchors = retinanet.AnchorGenerator(((16,),), ((1.0,),))
model = retinanet.RetinaNet(torch.nn.Conv2d(3, 32, 16, 8, 4), 3, 64, 64, anchor_generator=anchors)
model.head.classification_head = Head(32, 1, 3, norm_layer=lambda c: torch.nn.GroupNorm(8, c))
focal: Any = {"activation": "sigmoid", "gamma": 2, "alpha": 0.25}
loss_fn = ClassBalancedLoss([150, 40, 10], background_index=-1, ignore_index=-2, **focal)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for batch in torch.cat([torch.randperm(200) for _ in range(parser.parse_args().epochs)]).split(8):
    optimizer.zero_grad()
    sum(model([images[i] for i in batch], [targets[i] for i in batch]).values()).backward()
    optimizer.step()
boxes = model.eval()(images[200:])
found = sum(b["labels"][:1].equal(c) for b, c in zip(boxes, labels[200:].split(1), strict=True))
print(f"mean per-class accuracy {found / 60:.3f}")  # of the best box of each image
