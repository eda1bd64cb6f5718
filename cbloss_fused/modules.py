"""ClassBalancedLoss as an nn.Module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import Self, Unpack

from .arguments import check_background, check_class_vector, check_inputs, check_pos_weight
from .arrays import Array, Vector, copied, reals
from .counts import class_counts
from .dispatch import dispatch
from .distributed import loss_over_ranks
from .dtensor import is_dtensor, loss_of_dtensor
from .groups import Kept, ProcessGroup, agreed, check_group, device_of, number_of_ranks
from .module_state import (
    ModuleOptions,
    check_fit,
    further_samples,
    kept_vector,
    no_classes,
    weights_on_the_way,
)
from .options import (
    MEANS,
    LossOptions,
    LossSpec,
    Options,
    check_options,
    lists_options,
    options_of,
)
from .saved import GIVEN, KEPT, VECTORS, SavedLoss
from .sharded import sharded_loss
from .shards import ClassShards
from .stats import ClassStats
from .weights import Empty, checked_counts, class_balanced_weights

FIXED = {  # what the weights are made of, and how it is changed
    "counts": "update_counts(new) adds samples and renews the weights; for others make a new loss",
    "beta": "set_beta(beta) renews the weights too",
}


class ClassBalancedLoss(SavedLoss):
    """`class_balanced_loss` with the weights of given class counts.

    Args:
        counts: (C,) samples of each class in the training set; a tensor, an array, a sequence or a
            mapping class -> count. Copied.
        beta: in [0, 1]; 0 weighs all classes alike, 1 by inverse frequency.
        empty: what a class without samples gets, see `class_balanced_weights`.
        group: a torch.distributed.ProcessGroup, such as `torch.distributed.group.WORLD` once
            torch.distributed is initialised: in training mode the denominator of "mean" and
            "weighted_mean" is that of all ranks' rows over the number of ranks, as of
            `global_normalizer`, so that the gradient that DistributedDataParallel and FSDP average
            is that of a single process. Every rank of the group must then call the loss, with its
            own rows or none. None: no communication.
        options: all others as in `class_balanced_loss`; logit_bias, margin and pos_weight, here of
            any form that counts may have, are copied into buffers.

    Shape: input (C,), (N, C) or (N, C, d1, ..., dk); target (), (N,) or (N, d1, ..., dk), or for
        soft and multi-hot labels input's.
    Attributes: weight, a (C,) float32 buffer, which moves with .to(). It stays float32 through
        .half() and .bfloat16(), as logit_bias, margin and pos_weight do; .double() makes it
        float64. counts, beta and schedule (what is deferred), float64 on the CPU, which `set_beta`,
        `update_counts` and a `DeferredReweighting` change, and no assignment. Every option,
        checked when assigned and used from then on. group, which may be assigned too.
        `set_beta` and `update_counts` change the weights in place: a compiled model uses the new
        weights without recompiling; another gamma or logit_scale compiles it anew.
    State: weight, logit_bias, margin, pos_weight and, as the extra state, one tensor of counts,
        beta and how far a `DeferredReweighting` is. A checkpoint of
        `nn.CrossEntropyLoss(weight=...)` loads too: counts and beta then stay as they are. A state
        that does not fit raises and changes nothing. (One of a whole model that lacks an entry is
        loaded as far as it goes, as torch does it.) A group is in no state: copies share it, and
        what is unpickled, or loaded as a whole module, has group None until one is assigned.
    Raises: ValueError or TypeError for bad counts, beta or options, here and not in forward.
    Source: Cui et al., CVPR 2019 (arXiv 1901.05555).

    >>> loss_fn = ClassBalancedLoss([500, 50, 5], beta=0.99, activation="sigmoid", gamma=0.5)
    >>> loss = loss_fn(torch.zeros(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 2]))
    >>> loss.backward()
    """

    if TYPE_CHECKING:  # fastai evaluates a loss's annotations, with names of its own
        weight: Tensor
        logit_bias: Tensor | None
        margin: Tensor | None
        pos_weight: Tensor | None
        spec: LossSpec
        _group: Kept | None
        _options: Options
    _group = None

    @lists_options
    def __init__(
        self,
        counts: Vector,
        beta: float | Vector = 0.999,
        *,
        empty: Empty = "error",
        logit_bias: Vector | None = None,
        margin: Vector | None = None,
        pos_weight: Vector | None = None,
        group: ProcessGroup | None = None,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__()
        self.group = group
        self.counts, self.beta = checked_counts(counts), copied(reals(beta, "beta"))
        self.options = options_of("ClassBalancedLoss", options)
        if pos_weight is not None:
            check_pos_weight(self.spec)
        self.empty = empty
        weight = class_balanced_weights(counts, beta, empty=empty)
        default = torch.get_default_device()
        if not isinstance(counts, Tensor) or default.type == "meta":
            weight = weight.to(default)  # meta, too: reset_parameters follows
        self._given: dict[str, Tensor] = {}  # for reset_parameters
        for name, vector in zip(GIVEN, (logit_bias, margin, pos_weight), strict=True):
            buffer = None if vector is None else kept_vector(name, vector, len(weight))
            if buffer is not None:
                self._given[name] = buffer.cpu().clone()
                buffer = buffer.to("meta") if weight.is_meta else buffer
            self.register_buffer(name, buffer)
        self.register_buffer("weight", weight)
        self._epoch, self._share = 0, 1.0  # of a DeferredReweighting, see _defer

    @overload
    def forward(
        self,
        input: Tensor,
        target: Tensor,
        sample_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        return_stats: Literal[False] = False,
        shards: ClassShards | None = None,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        input: Tensor,
        target: Tensor,
        sample_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        *,
        return_stats: Literal[True],
        shards: ClassShards | None = None,
    ) -> tuple[Tensor, ClassStats]: ...
    @overload
    def forward(
        self,
        input: Tensor,
        target: Tensor,
        sample_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        return_stats: bool = False,
        shards: ClassShards | None = None,
    ) -> Tensor | tuple[Tensor, ClassStats]: ...
    def forward(
        self,
        input: Tensor,
        target: Tensor,
        sample_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        return_stats: bool = False,
        shards: ClassShards | None = None,
    ) -> Tensor | tuple[Tensor, ClassStats]:
        """The loss, or (loss, ClassStats); what changes from batch to batch comes here.

        With a group the loss's mean over ranks is that of all rows, and the statistics are those of
        a rank's own rows. No rank communicates in evaluation mode, nor with a normalizer given.
        A mean over a group's ranks cannot go with shards in training: pass a normalizer.
        """
        buffers = self._buffers  # Module.__getattr__ would take half a microsecond for each
        weight, bias = buffers["weight"], buffers["logit_bias"]
        margin, pos_weight = buffers["margin"], buffers["pos_weight"]
        given = target, weight, sample_weight, normalizer, bias, margin, pos_weight
        if shards is not None:
            if self._group is not None and self.averages_over_ranks(normalizer):
                raise ValueError("a group and shards: pass normalizer=global_normalizer(...)")
            return sharded_loss(input, given, self.spec, return_stats, shards)
        try:
            if self._group is not None and self.averages_over_ranks(normalizer):
                group = self._group.group
                return loss_over_ranks(input, given, self.spec, return_stats, group)
            if type(input) is not Tensor and is_dtensor(input):
                return loss_of_dtensor(input, given, self.spec, return_stats)
            inputs = check_inputs(input, *given, self.spec, return_stats)
        except ValueError:
            check_fit(self.counts, weight, input)  # what is not the fault of these arguments
            raise
        return dispatch(input, inputs, self.spec, return_stats)

    if TYPE_CHECKING:
        __call__ = forward

    def averages_over_ranks(self, normalizer: float | Tensor | None) -> bool:
        """Whether a mean of this call, if there is a group, is over the rows of all its ranks."""
        return self.training and normalizer is None and self.spec.reduction in MEANS

    @classmethod
    def from_labels(
        cls,
        labels: Tensor | Array | Sequence[int],
        num_classes: int | None = None,
        beta: float | Vector = 0.999,
        **options: Unpack[ModuleOptions],
    ) -> Self:
        """The loss for the counts of these class indices that are not ignored, see `class_counts`.

        With a group they are a rank's part, and the counts those of all ranks.

        >>> ClassBalancedLoss.from_labels([0, 0, 1, 2], beta=0.9).counts
        tensor([2., 1., 1.], dtype=torch.float64)
        """
        group = options.get("group")
        counts = class_counts(labels, num_classes, **no_classes(options), group=group)
        return cls(counts, beta, **options)

    @classmethod
    def from_dataset(
        cls,
        dataset: Dataset[Any] | DataLoader[Any],
        num_classes: int | None = None,
        beta: float | Vector = 0.999,
        **options: Unpack[ModuleOptions],
    ) -> Self:
        """The loss for the counts of a dataset or of what a loader samples, see `class_counts`.

        With a group they are a rank's part, as a DistributedSampler takes, and the counts those of
        all ranks.
        """
        group = options.get("group")
        counts = class_counts(dataset, num_classes, **no_classes(options), group=group)
        return cls(counts, beta, **options)

    @property
    def options(self) -> Options:
        """All options; assigning raises, and changes nothing, unless they are right."""
        return self._options

    @options.setter
    def options(self, options: Options) -> None:
        if not isinstance(options, Options):
            raise TypeError(f"options must be Options, got {type(options).__name__}")
        spec = check_options(options)
        check_background(spec, len(self.counts))
        self.spec, self._options = spec, options.plain()

    @property
    def group(self) -> ProcessGroup | None:
        """The ranks whose rows have one mean in training, or None; may be assigned."""
        return None if self._group is None else self._group.group

    @group.setter
    def group(self, group: ProcessGroup | None) -> None:
        check_group(group)
        self._group = None if group is None else Kept(group)

    @property
    def schedule(self) -> Tensor:
        """(2,) float64, a `DeferredReweighting`'s epoch and how far the weights have gone."""
        return torch.tensor([self._epoch, self._share], dtype=torch.float64, device="cpu")

    def set_beta(self, beta: float | Vector) -> None:
        """Recompute the weights in place for a new beta, as far as they are re-weighted by now.

        Raises and warns as `class_balanced_weights` does; an error changes nothing.
        """
        self._reweight(self.counts, copied(reals(beta, "beta")), self._share)

    def update_counts(self, new: Vector) -> None:
        """Count (C,) further samples of each class, as they stream in; the weights follow in place.

        logit_bias, margin and pos_weight stay as they are, whatever counts they were made of:
        `loss_fn.logit_bias.copy_(logit_adjustment(loss_fn.counts))` renews them.
        While a `DeferredReweighting` defers the weights, they stay deferred. With a group every
        rank calls it with its own samples, which are summed over the ranks. (Without one, under
        DistributedDataParallel, pass every rank the samples of all: DDP broadcasts the weights of
        rank 0, but not the counts.)

        Raises: ValueError for another number of classes, or as `class_balanced_weights`. With a
            group all ranks raise what one finds wrong.

        >>> loss_fn = ClassBalancedLoss([8, 1], beta=0.9)
        >>> loss_fn.update_counts(class_counts([1, 1, 0], num_classes=2))
        >>> loss_fn.counts
        tensor([9., 3.], dtype=torch.float64)
        """
        if self._group is None:
            more = further_samples(new, self.counts, self.beta)
        else:
            group = self._group.group
            further = partial(further_samples, new, self.counts, self.beta)
            more = agreed(further, len(self.counts), group, device_of(group)).cpu()
        self._reweight(self.counts + more, self.beta, self._share)

    def reset_parameters(self) -> None:
        """Rebuild the buffers from what the module was made of, after `to_empty` for example."""
        for name, vector in self._given.items():
            buffer = self._buffers[name]
            if buffer is not None:
                buffer.copy_(vector)
        self._reweight(self.counts, self.beta, self._share)

    def _reweight(self, counts: Tensor, beta: Tensor, share: float) -> None:
        """The weights of these, in place; share: see weights_on_the_way."""
        self.weight.copy_(weights_on_the_way(counts, beta, self.empty, share))
        self.__dict__.update(counts=counts, beta=beta, _share=share)

    def _defer(self, epoch: int, share: float) -> None:
        """What a schedule says: it is in this epoch, and the weights are re-weighted so far."""
        self._reweight(self.counts, self.beta, share)
        self._epoch = epoch

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts, but no vector to a half type: small weights would be lost for good."""
        before = {name: self._buffers[name] for name in VECTORS}
        torch.nn.Module._apply(self, fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype not in KEPT:
                self._buffers[name] = old.to(new.device)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FIXED and name in self.__dict__:
            raise AttributeError(f"{name} cannot be assigned: {FIXED[name]}")
        if name in VECTORS and name in self.__dict__.get("_buffers", ()):
            self._check_assigned(name, value)
        if name in Options._fields:  # nn.Module would register a Parameter of this name
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _check_assigned(self, name: str, value: Any) -> None:
        if value is None and name != "weight":
            return
        if not isinstance(value, Tensor) or isinstance(value, torch.nn.Parameter):
            raise TypeError(
                f"{name} is a buffer: it must be a Tensor that is no Parameter, got "
                f"{type(value).__name__}"
            )
        old = self._buffers[name]
        late = old is not None and old.is_meta  # memory for it, whose values are still to come
        check_class_vector(name, value.to("meta") if late else value, len(self.counts))

    def extra_repr(self) -> str:
        """num_classes and beta, then whatever is not the default."""
        beta = f"beta={self.beta.item()}" if self.beta.dim() == 0 else "beta per class"
        changed = self.options.changed()
        changed += [name for name in GIVEN if getattr(self, name) is not None]
        if self.group is not None:
            changed.append(f"group of {number_of_ranks(self.group)}")
        return ", ".join([f"num_classes={len(self.counts)}", beta, *changed])


def _property(name: str) -> property:
    def assign(module: ClassBalancedLoss, value: Any) -> None:
        module.options = module.options._replace(**{name: value})

    return property(lambda module: getattr(module.options, name), assign)


for _name in Options._fields:
    setattr(ClassBalancedLoss, _name, _property(_name))
