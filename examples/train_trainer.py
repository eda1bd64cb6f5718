"""Hugging Face's Trainer: python examples/train_trainer.py (run by `make frameworks-test`)"""

import argparse

import torch
import transformers
from torch import Tensor
from transformers.utils import ModelOutput

from cbloss_fused import ClassBalancedLoss


def loss_of(outputs: ModelOutput, labels: Tensor, num_items_in_batch: Tensor | None) -> Tensor:
    return loss_fn(outputs.logits, labels, normalizer=num_items_in_batch)


def sequences(counts: Tensor) -> list[dict[str, Tensor]]:
    """Half of the tokens of a sequence are of its class's own four."""
    labels = torch.arange(10).repeat_interleave(counts)
    own = 4 * labels.unsqueeze(1) + torch.randint(4, (len(labels), 16))
    tokens = torch.where(torch.rand(own.shape) < 0.5, own, torch.randint(40, own.shape))
    return [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]


parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=5)
args = transformers.TrainingArguments(learning_rate=1e-2, warmup_steps=50, save_strategy="no")
args.num_train_epochs = parser.parse_args().epochs
transformers.set_seed(0)
counts = (500 * 0.6 ** torch.arange(10)).long()  # 500 samples of the first class, 5 of the last
loss_fn = ClassBalancedLoss(counts, beta=0.99).to(args.device)
config = transformers.DistilBertConfig(vocab_size=40, dim=32, hidden_dim=64, n_heads=2, n_layers=1)
config.num_labels = 10
model = transformers.DistilBertForSequenceClassification(config)
train, test = sequences(counts), sequences(torch.tensor(100))
trainer = transformers.Trainer(model, args, train_dataset=train, compute_loss_func=loss_of)
trainer.train()
logits, labels, _ = trainer.predict(test)
print(f"mean per-class accuracy {(logits.argmax(1) == labels).mean():.3f}")
