"""Class-balanced softmax, sigmoid and focal losses for PyTorch, loss and gradient in one pass."""

from .backends import backends
from .counts import class_counts
from .distributed import global_normalizer
from .functional import check_target, class_balanced_loss
from .linear import linear_class_balanced_loss
from .linear_module import LinearClassBalancedLoss
from .modules import ClassBalancedLoss
from .schedules import DeferredReweighting
from .shards import ClassShards
from .stats import ClassStats
from .weights import (
    beta_from_prototypes,
    class_balanced_weights,
    effective_number,
    init_head_bias_,
    ldam_margin,
    logit_adjustment,
)

__all__ = [
    "ClassBalancedLoss",
    "ClassShards",
    "ClassStats",
    "DeferredReweighting",
    "LinearClassBalancedLoss",
    "backends",
    "beta_from_prototypes",
    "check_target",
    "class_balanced_loss",
    "class_balanced_weights",
    "class_counts",
    "effective_number",
    "global_normalizer",
    "init_head_bias_",
    "ldam_margin",
    "linear_class_balanced_loss",
    "logit_adjustment",
]
__version__ = "0.1.0"
