"""The paper's setting for iNaturalist 2018 as code, and what its loss costs in a step of the head.

Nothing is trained: features are random, counts long-tailed as iNaturalist's, 2 to 1000 images of
8142 species.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from .. import ClassBalancedLoss, backends, init_head_bias_
from ..parser import Parser
from ..plain import softplus
from .long_tail import long_tailed_counts

MISSING = ""
try:
    from tabulate import tabulate
    from tqdm import tqdm
except ImportError as error:
    extra = 'pip install "cbloss_fused[experiments]"'
    MISSING = f"the timing needs more packages ({error}): {extra}"

FEATURES = 2048  # of ResNet-50, -101 and -152
WARM_UP = 5  # epochs


class Setting(NamedTuple):
    """How the paper trains on a large dataset.

    Source: Cui et al., CVPR 2019 (arXiv 1901.05555), section 5.3, and their public code for
    TensorFlow: ResNet v1 from scratch, focal loss on sigmoids with class-balanced weights.
    """

    C: int
    rate: float  # of a batch of 256: a focal loss is smaller than softmax's, whose rate is 0.1
    beta: float | None = 0.999  # None: plain softmax cross entropy
    gamma: float = 0.5
    batch: int = 1024
    epochs: int = 90
    falls: tuple[int, ...] = (30, 60, 80)  # epochs, where the learning rate falls to a tenth
    momentum: float = 0.9  # Nesterov's
    weight_decay: float = 1e-4

    def learning_rate(self, epoch: float) -> float:
        """After so many epochs, fractions allowed, to be set at each step."""
        falls = sum(epoch >= fall for fall in self.falls)
        return self.rate * self.batch / 256 * min(1.0, epoch / WARM_UP) * 0.1**falls

    def make_head(self, features: int = FEATURES) -> nn.Linear:
        """The last layer; every sigmoid starts at p = 1 / C, with a bias of -9.0 for C = 8142."""
        head = nn.Linear(features, self.C)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        return head if self.beta is None else init_head_bias_(head)

    def make_loss(self, counts: Sequence[int] | Tensor) -> nn.Module:
        """A mean over samples of the sum over classes."""
        if self.beta is None:
            return nn.CrossEntropyLoss()
        return ClassBalancedLoss(counts, self.beta, activation="sigmoid", gamma=self.gamma)

    def make_optimizer(self, model: nn.Module, head: nn.Linear) -> torch.optim.SGD:
        """Neither BatchNorm's parameters decay nor the head's bias. model: with its head."""
        groups = parameter_groups(model, head, self.weight_decay)
        return torch.optim.SGD(
            groups, self.learning_rate(WARM_UP), momentum=self.momentum, nesterov=True
        )


SETTINGS: dict[str, Setting] = {
    "inaturalist-2017": Setting(C=5089, rate=0.4),
    "inaturalist-2018": Setting(C=8142, rate=0.4),
    "ilsvrc-2012": Setting(C=1000, rate=0.2),
    "inaturalist-2018-softmax": Setting(C=8142, rate=0.1, beta=None),
}


def parameter_groups(model: nn.Module, head: nn.Linear, decay: float) -> list[dict[str, Any]]:
    """The parameters that decay, and those that do not."""
    kept = {id(head.bias)}
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            kept |= {id(p) for p in module.parameters()}
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if id(p) not in kept], "weight_decay": decay},
        {"params": [p for p in parameters if id(p) in kept], "weight_decay": 0.0},
    ]


class Problem(NamedTuple):
    """One step's tensors, and the loss by two ways."""

    features: Tensor
    target: Tensor
    head: nn.Linear
    optimizer: torch.optim.SGD
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]]


def make_problem(setting: Setting, N: int, device: str) -> Problem:
    """Random features (N, 2048) and labels as frequent as the counts are."""
    torch.manual_seed(0)
    counts = torch.tensor(long_tailed_counts(1000, 500, setting.C))
    head = setting.make_head().to(device)
    loss_fn = setting.make_loss(counts).to(device)
    weight = loss_fn.weight
    assert isinstance(weight, Tensor)
    target = torch.multinomial(counts.double(), N, replacement=True).to(device)
    features = torch.randn(N, FEATURES).relu().to(device).requires_grad_()  # after a ReLU
    optimizer = setting.make_optimizer(head, head)
    for group in optimizer.param_groups:
        group["lr"] = setting.learning_rate(0)  # 0: every timed step is the first one
    return Problem(
        features,
        target,
        head,
        optimizer,
        {
            "plain": lambda x, y: softplus(x, y, weight, setting.gamma),
            "fused": loss_fn,
        },
    )


def largest_difference(problem: Problem) -> float:
    """Between the two gradients of the logits, relative to the largest element."""
    logits = problem.head(problem.features).detach()
    gradients = []
    for loss_fn in problem.losses.values():
        leaf = logits.clone().requires_grad_()
        gradients.append(torch.autograd.grad(loss_fn(leaf, problem.target), leaf)[0])
    plain, fused = gradients
    return float((plain - fused).abs().max() / plain.abs().max())


def timers(problem: Problem, threads: int) -> dict[tuple[str, str], Timer]:
    """Of the loss alone and of a step of the head, each with both losses."""
    logits = problem.head(problem.features).detach().requires_grad_()
    alone = "logits.grad = None; loss_fn(logits, target).backward()"
    step = (
        "optimizer.zero_grad(); features.grad = None; "
        "loss_fn(head(features), target).backward(); optimizer.step()"
    )
    return {
        (what, name): Timer(
            statement,
            globals=problem._asdict() | {"logits": logits, "loss_fn": loss_fn},
            num_threads=threads,
        )
        for what, statement in (("loss alone", alone), ("step of the head", step))
        for name, loss_fn in problem.losses.items()
    }


def time_in_turns(
    timers: dict[tuple[str, str], Timer], rounds: int
) -> dict[tuple[str, str], float]:
    """Median milliseconds; all take turns, so that a slow moment hits none alone."""
    times: dict[tuple[str, str], list[float]] = {key: [] for key in timers}
    for timer in timers.values():
        timer.timeit(1)  # the first call may build kernels
    for _ in tqdm(range(rounds), desc="timing", unit="round"):
        for key, timer in timers.items():
            times[key].append(1e3 * timer.timeit(1).median)
    return {key: median(values) for key, values in times.items()}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked before the work."""
    parser = Parser(
        prog="python -m cbloss_fused.experiments.large_scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--batch", type=int, default=256, help="samples (default 256)")
    add("--rounds", type=int, default=15, help="calls of each, of which the median (default 15)")
    add("--threads", type=int, default=torch.get_num_threads(), help="(default: PyTorch's)")
    add("--device", default="cpu", help="(default cpu)")
    options = parser.parse_args(argv)
    parser.check_at_least_one(options, "batch", "rounds", "threads")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Compare the gradients, time both, print a table."""
    if MISSING:
        raise SystemExit(MISSING)
    options = parse(argv)
    setting = SETTINGS["inaturalist-2018"]
    problem = make_problem(setting, options.batch, options.device)
    difference = largest_difference(problem)
    if not difference < 1e-4:
        raise SystemExit(f"the two losses differ: their gradients by {difference:.1e}")
    times = time_in_turns(timers(problem, options.threads), options.rounds)
    rows = []
    for what in dict.fromkeys(what for what, _ in times):
        plain, fused = times[what, "plain"], times[what, "fused"]
        rows.append([what, fused, plain, plain / fused])
    device = torch.device(options.device)
    gpu = device.type == "cuda"
    machine = torch.cuda.get_device_name(device) if gpu else _processor()
    print(f"\n{machine}, {options.threads} threads, torch {torch.__version__}")
    print(f"fused: {backends()['cuda' if gpu else 'cpu']}")
    print(f"features ({options.batch}, {FEATURES}), C = {setting.C}, float32, median\n")
    header = ["forward and backward", "fused ms", "plain ms", "plain / fused"]
    print(tabulate(rows, header, tablefmt="github", floatfmt=("", ".2f", ".2f", ".2f")))


def _processor() -> str:
    """Its name, as far as it is known."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
