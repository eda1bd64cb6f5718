"""skorch, grid search: python examples/train_skorch.py (run by `make frameworks-test`)"""

import argparse

import torch
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetClassifier
from torch import nn

from cbloss_fused import ClassBalancedLoss


class Net(nn.Sequential):
    def __init__(self, hidden: int = 64) -> None:
        super().__init__(nn.Linear(16, hidden), nn.ReLU(), nn.Linear(hidden, 10))


parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=10)
args = parser.parse_args()
torch.manual_seed(0)
counts, centers = (500 * 0.6 ** torch.arange(10)).long(), torch.randn(10, 16)  # 500 ... 5 samples
y, test_y = (torch.arange(10).repeat_interleave(n) for n in (counts, torch.tensor(100)))
x, test_x = (centers[labels] + torch.randn(len(labels), 16) for labels in (y, test_y))
net = NeuralNetClassifier(
    Net, criterion=ClassBalancedLoss, criterion__counts=counts.numpy(),
    optimizer=torch.optim.AdamW, lr=3e-3, batch_size=64, max_epochs=args.epochs,
    train_split=None, verbose=0, iterator_train__shuffle=True,
)  # fmt: skip
grid = {"criterion__beta": [0, 0.9, 0.99, 0.999]}
search = GridSearchCV(net, grid, scoring="balanced_accuracy", cv=3).fit(x.numpy(), y.numpy())
for beta, score in zip(grid["criterion__beta"], search.cv_results_["mean_test_score"], strict=True):
    print(f"beta {beta}: {score:.3f}")
accuracy = balanced_accuracy_score(test_y, search.predict(test_x.numpy()))
print(f"mean per-class accuracy {accuracy:.3f}")
