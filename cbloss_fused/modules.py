"""The nn.Modules."""

from __future__ import annotations

import inspect
from typing import Literal

import torch
from torch import Tensor

from .functional import class_balanced_loss
from .spec import check_options
from .values import Vector
from .weights import class_balanced_weights


class ClassBalancedLoss(torch.nn.Module):
    """`class_balanced_loss` with the weights of given class counts.

    Args:
        counts: (C,) samples of each class in the training set; a tensor, an array or a sequence.
        beta: in [0, 1]; 0 weighs all classes alike, 1 by inverse frequency.
        empty: what a class without samples gets, see `class_balanced_weights`.
        options: activation, gamma, label_smoothing, ignore_index, reduction, inplace, recompute,
            backend, as in `class_balanced_loss`.

    Shape: input (C,), (N, C) or (N, C, d1, ..., dk); target (), (N,) or (N, d1, ..., dk).
    Attributes: weight, a (C,) float32 buffer: moves with .to(), saved in state_dict.
    Raises: ValueError or TypeError for bad counts, beta or options, here and not in forward.
    Source: Cui et al., CVPR 2019 (arXiv 1901.05555).

    >>> loss_fn = ClassBalancedLoss([500, 50, 5], beta=0.99, activation="sigmoid", gamma=0.5)
    >>> loss = loss_fn(torch.zeros(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 2]))
    >>> loss.backward()
    """

    weight: Tensor

    def __init__(
        self,
        counts: Vector,
        beta: float | Vector = 0.999,
        *,
        empty: Literal["error", "zero", "one"] = "error",
        activation: str = "softmax",
        gamma: float = 0.0,
        label_smoothing: float = 0.0,
        ignore_index: int | None = -100,
        reduction: str = "mean",
        inplace: bool = False,
        recompute: bool | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_options(activation, gamma, label_smoothing, ignore_index, reduction, inplace, backend)
        self.register_buffer("weight", class_balanced_weights(counts, beta, empty=empty))
        self.beta = beta
        self.activation = activation
        self.gamma = gamma
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.inplace = inplace
        self.recompute = recompute
        self.backend = backend

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        sample_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        """The loss; sample_weight and normalizer change from batch to batch, so they come here."""
        return class_balanced_loss(
            input,
            target,
            self.weight,
            activation=self.activation,
            gamma=self.gamma,
            label_smoothing=self.label_smoothing,
            sample_weight=sample_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            normalizer=normalizer,
            inplace=self.inplace,
            recompute=self.recompute,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """num_classes and beta, then whatever is not the default."""
        beta = f"beta={self.beta}" if isinstance(self.beta, float | int) else "beta per class"
        changed = [
            f"{name}={getattr(self, name)!r}"
            for name, option in inspect.signature(class_balanced_loss).parameters.items()
            if hasattr(self, name) and name != "weight" and getattr(self, name) != option.default
        ]
        return ", ".join([f"num_classes={len(self.weight)}", beta, *changed])
