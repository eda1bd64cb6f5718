"""Lightning: python examples/train_lightning.py (run by `make frameworks-test`)"""

import argparse

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cbloss_fused import ClassBalancedLoss


class Classifier(lightning.LightningModule):
    def __init__(self, counts: Tensor) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, len(counts)))
        self.loss_fn = ClassBalancedLoss(counts, beta=0.99)  # moves and is saved with the module

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return self.loss_fn(self.model(batch[0]), batch[1])

    def test_step(self, batch: list[Tensor]) -> None:
        self.log("accuracy", (self.model(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=10)
args = parser.parse_args()
lightning.seed_everything(0)
counts, centers = (500 * 0.6 ** torch.arange(10)).long(), torch.randn(10, 16)  # 500 ... 5 samples
labels = [torch.arange(10).repeat_interleave(n) for n in (counts, torch.tensor(100))]
train, test = (TensorDataset(centers[y] + torch.randn(len(y), 16), y) for y in labels)
trainer = lightning.Trainer(max_epochs=args.epochs, logger=False, enable_checkpointing=False)
trainer.fit(model := Classifier(counts), DataLoader(train, batch_size=64, shuffle=True))
(result,) = trainer.test(model, DataLoader(test, batch_size=100))
print(f"mean per-class accuracy {result['accuracy']:.3f}")
