"""fastai: python examples/train_fastai.py (run by `make frameworks-test`)"""

import argparse
from typing import Any

import torch
from fastai.basics import DataLoaders, Learner
from fastai.losses import BaseLoss
from fastai.metrics import BalancedAccuracy
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from cbloss_fused import ClassBalancedLoss


class ClassBalancedLossFlat(BaseLoss):  # has what predictions need: activation, decodes
    def __init__(self, *args: Any, axis: int = -1, **kwargs: Any) -> None:
        super().__init__(ClassBalancedLoss, *args, axis=axis, **kwargs)

    def activation(self, x: Tensor) -> Tensor:
        return x.softmax(self.axis)

    def decodes(self, x: Tensor) -> Tensor:
        return x.argmax(self.axis)


parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=10)
args = parser.parse_args()
torch.manual_seed(0)
counts, centers = (500 * 0.6 ** torch.arange(10)).long(), torch.randn(10, 16)  # 500 ... 5 samples
labels = [torch.arange(10).repeat_interleave(n) for n in (counts, torch.tensor(100))]
sets = (TensorDataset(centers[y] + torch.randn(len(y), 16), y) for y in labels)
dls = DataLoaders.from_dsets(*sets, bs=64)
model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 10))
learn = Learner(dls, model, ClassBalancedLossFlat(counts, beta=0.99), metrics=BalancedAccuracy())
learn.fit(args.epochs, 3e-3)
_, accuracy = learn.validate()
print(f"mean per-class accuracy {accuracy:.3f}")
