"""timm, mixup, cutmix: python examples/train_timm.py (run by `make frameworks-test`)"""

import argparse

import timm
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from cbloss_fused import ClassBalancedLoss

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=5)
args = parser.parse_args()


def images(labels: Tensor) -> Tensor:
    """(N, 3, 32, 32): each label's pattern in noise."""
    return patterns[labels].repeat(1, 1, 8, 8) + 4 * torch.randn(len(labels), 3, 32, 32)


torch.manual_seed(0)
patterns = torch.randn(5, 3, 4, 4)
counts = torch.tensor([400, 150, 60, 20, 8])
y, test_y = (torch.arange(5).repeat_interleave(n) for n in (counts, torch.tensor(50)))
loader = DataLoader(TensorDataset(images(y), y), batch_size=32, shuffle=True, drop_last=True)
mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, label_smoothing=0.0, num_classes=5)
loss_fn = ClassBalancedLoss(counts, beta=0.99, label_smoothing=0.1)  # of soft targets too
model = timm.create_model("test_resnet", num_classes=5)
optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3)
for x, label in (batch for _ in range(args.epochs) for batch in loader):
    x, soft_target = mixup(x, label)
    optimizer.zero_grad()
    loss_fn(model(x), soft_target).backward()
    optimizer.step()
right = model.eval()(images(test_y)).argmax(1) == test_y
print(f"mean per-class accuracy {right.float().mean():.3f}")
