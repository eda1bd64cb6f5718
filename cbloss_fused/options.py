"""The options of the losses: names, types, defaults and rules, each once.

A new option is one line in `LossOptions`, `Options` and `RULES`, and, if a formula uses it, one in
`Formula`: signatures, modules and their repr follow.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import inf
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict, TypeVar, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import hints
from .arrays import integer_or_none
from .keywords import KNOWN, check_keywords

Activation: TypeAlias = Literal["softmax", "sigmoid"]
ClassWeighting: TypeAlias = Literal["sample", "class"]
Reduction: TypeAlias = Literal["none", "mean", "weighted_mean", "sum"]
BackendName: TypeAlias = Literal["cpu", "triton", "cuda", "reference"]
F = TypeVar("F", bound=Callable[..., Any])

REDUCTIONS = ("none", "mean", "weighted_mean", "sum")  # the operators take the index
MEAN = REDUCTIONS.index("mean")
MEANS = (MEAN, REDUCTIONS.index("weighted_mean"))


class LossOptions(TypedDict, total=False):
    """What callers may pass as keywords, for type checkers."""

    activation: Activation
    gamma: float
    gamma_neg: float | None
    alpha: float | None
    clip: float
    label_smoothing: float
    z_loss: float
    logit_scale: float
    class_weighting: ClassWeighting
    ignore_index: int | None
    background_index: int | None
    reduction: Reduction
    inplace: bool
    recompute: bool | None
    backend: BackendName | None


class Options(NamedTuple):
    """All options, with their defaults; see `class_balanced_loss` for what they mean."""

    activation: Activation = "softmax"
    gamma: float = 0.0
    gamma_neg: float | None = None
    alpha: float | None = None
    clip: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    logit_scale: float = 1.0
    class_weighting: ClassWeighting = "sample"
    ignore_index: int | None = -100
    background_index: int | None = None
    reduction: Reduction = "mean"
    inplace: bool = False
    recompute: bool | None = None
    backend: BackendName | None = None

    def plain(self) -> Options:
        """With Python's own numbers in the place of NumPy's and of tensors, once checked."""
        values: list[Any] = list(self)
        return Options(*(v.item() if hasattr(v, "item") else v for v in values))

    def changed(self) -> list[str]:
        """name=value of every option that is not the default."""
        named = zip(self._fields, self, Options(), strict=True)
        return [f"{name}={value!r}" for name, value, default in named if value != default]


torch.serialization.add_safe_globals([Options])  # beside a state in a checkpoint


class Rule(NamedTuple):
    """What an option may be."""

    expected: str
    valid: Callable[[Any], bool]
    error: type[Exception] = ValueError  # of a value that valid() can compare but refuses


def _choice(*valid: str | None) -> Rule:
    def is_valid(value: Any) -> bool:
        plain = value is None or isinstance(value, str)  # == of arrays is no bool
        return plain and value in valid

    return Rule(f"one of {', '.join(map(repr, valid))}", is_valid)


def is_bool(value: Any) -> bool:
    try:
        return bool(value in (True, False))
    except (ValueError, RuntimeError):  # an array or a tensor of several
        return False


def _is_int(value: Any) -> bool:
    """Of any type: np.int64 and a 0-d integer tensor too."""
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _or_none(rule: Rule) -> Rule:
    expected = f"None or {rule.expected}"
    return rule._replace(expected=expected, valid=lambda v: v is None or rule.valid(v))


RULES = {
    "activation": _choice("softmax", "sigmoid"),
    "gamma": Rule("finite and >= 0", lambda v: 0 <= v < inf),
    "gamma_neg": _or_none(Rule("finite and >= 0", lambda v: 0 <= v < inf)),
    "alpha": _or_none(Rule("in [0, 1]", lambda v: 0 <= v <= 1)),
    "clip": Rule("in [0, 1)", lambda v: 0 <= v < 1),
    "label_smoothing": Rule("in [0, 1)", lambda v: 0 <= v < 1),
    "z_loss": Rule("finite and >= 0", lambda v: 0 <= v < inf),
    "logit_scale": Rule("positive and <= 1e30", lambda v: 0 < v <= 1e30),
    "class_weighting": _choice("sample", "class"),
    "ignore_index": _or_none(Rule("an int", _is_int, TypeError)),
    "background_index": _or_none(Rule("an int", _is_int, TypeError)),
    "reduction": _choice(*REDUCTIONS),
    "inplace": Rule("True or False", is_bool, TypeError),
    "recompute": _or_none(Rule("True or False", is_bool, TypeError)),
    "backend": _choice(None, "cpu", "triton", "cuda", "reference"),
}


def _check_each(options: Options) -> None:
    for name, value in zip(Options._fields, options, strict=True):
        rule = RULES[name]
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(
                f"{name} requires grad, but only input is differentiated: pass float({name}), or "
                "learn it outside of the loss"
            )
        try:
            valid = rule.valid(value)
        except (TypeError, ValueError, RuntimeError):  # of an array or a tensor of several numbers
            raise TypeError(
                f"{name} must be a number, {rule.expected}, got {value!r}"
                f"{hints.of_option(name, value)}"
            ) from None
        if not valid:
            hint = hints.of_option(name, value)
            raise rule.error(f"{name} must be {rule.expected}, got {value!r}{hint}")


def _check_together(options: Options) -> None:
    """Raise for options that have no meaning together, and for indices of no target's type."""
    for name in ("ignore_index", "background_index"):
        integer_or_none(name, getattr(options, name))
    if options.inplace and options.backend == "reference":
        raise ValueError("inplace=True needs a kernel: backend='reference' never writes its input")
    if options.activation == "sigmoid":
        if options.z_loss:
            raise ValueError(
                "z_loss keeps softmax's log-sum-exp near 0: activation='sigmoid' has none"
            )
        if options.class_weighting == "class" and options.reduction == "weighted_mean":
            raise ValueError(
                "reduction='weighted_mean' divides by the rows' weights: with "
                "class_weighting='class' weight belongs to no row"
            )
    elif options.gamma_neg is not None or options.alpha is not None or options.clip:
        of_sigmoid = ("gamma_neg", "alpha", "clip")
        given = [text for text in options.changed() if text.split("=")[0] in of_sigmoid]
        raise ValueError(
            f"{' and '.join(given)} would tell positives from negatives: activation='softmax' has "
            "one target, expected activation='sigmoid'"
        )
    elif options.class_weighting == "class":
        raise ValueError(
            "class_weighting='class' weights each class's term: activation='softmax' has only one"
        )
    elif options.background_index is not None:
        raise ValueError(
            "background_index marks rows without a positive class: in activation='softmax' every "
            f"row has one, got background_index={options.background_index}"
        )
    if options.background_index is not None and options.background_index == options.ignore_index:
        raise ValueError(
            f"background_index and ignore_index are both {options.ignore_index}: a row is either "
            "background or ignored"
        )


class Formula(NamedTuple):
    """The numbers of a loss: what the operators take as float[], in this order."""

    sigmoid: bool
    gamma: float
    label_smoothing: float
    z_loss: float
    gamma_neg: float  # of t = 0; gamma if none is given
    alpha: float  # factor of t = 1; 1 if none is given
    alpha_neg: float  # of t = 0: 1 - alpha, or 1
    clip: float
    logit_scale: float
    per_class: bool  # class_weighting="class"

    @classmethod
    def of(cls, options: Options) -> Formula:
        """From checked options."""
        gamma, gamma_neg, alpha = options.gamma, options.gamma_neg, options.alpha
        return cls(
            options.activation == "sigmoid",
            _in_float32(gamma),
            float(options.label_smoothing),
            float(options.z_loss),
            _in_float32(gamma if gamma_neg is None else gamma_neg),
            1.0 if alpha is None else float(alpha),
            1.0 if alpha is None else 1.0 - float(alpha),
            _in_float32(options.clip),
            float(options.logit_scale),
            options.class_weighting == "class",
        )

    def numbers(self) -> tuple[float, ...]:
        """What the operators take: the first four where the others are the defaults.

        Each number costs 0.2 us of host time.
        """
        return self[:4] if self[4:] == (self.gamma, *DEFAULT_REST) else self

    @classmethod
    def of_numbers(cls, numbers: Sequence[float]) -> Formula:
        """From what an operator was given."""
        if len(numbers) == 4:
            numbers = (*numbers, numbers[1], *DEFAULT_REST)
        sigmoid, *rest, per_class = numbers
        return cls._make((bool(sigmoid), *rest, bool(per_class)))


DEFAULT_REST = (1.0, 1.0, 0.0, 1.0, False)  # alpha to per_class
SMALLEST_NORMAL, LARGEST = 1.2e-38, 3.4e38  # float32's, rounded up and down


def _in_float32(number: float) -> float:
    """0 below its normal numbers: these change no loss, and kernels have code for 0."""
    return float(min(number, LARGEST)) if number > SMALLEST_NORMAL else 0.0


class LossSpec(NamedTuple):
    """Checked options, as autograd and the operators take them."""

    formula: Formula
    numbers: tuple[float, ...]  # the formula, as the operators take it, with the next three
    ignore_index: int | None
    background_index: int | None
    reduction: int  # index of REDUCTIONS
    inplace: bool
    recompute: bool | None
    backend: str | None  # the one asked for

    def recomputes(self, dtype: torch.dtype) -> bool:
        """Whether the gradient of logits of this type is left to the backward."""
        if self.recompute is None:
            return not self.reduction or dtype is torch.float16
        return self.recompute or not self.reduction


def check_options(options: Options) -> LossSpec:
    """The options, checked as far as no tensor decides.

    Raises:
        ValueError: a value out of its range, or options that have no meaning together.
        TypeError: a value of another type.
    """
    _check_each(options)
    _check_together(options)
    formula = Formula.of(options)
    return LossSpec(
        formula, formula.numbers(),
        _index(options.ignore_index), _index(options.background_index),
        REDUCTIONS.index(options.reduction),
        bool(options.inplace), options.recompute, options.backend,
    )  # fmt: skip


def _index(value: Any) -> int | None:
    """Of any integer type, as Python's."""
    return None if value is None else operator.index(value)


def options_of(caller: str, options: LossOptions) -> Options:
    """Options from keywords; raises TypeError for an unknown keyword, as Python does."""
    check_keywords(caller, options, RULES)
    return Options(**options)


def spec_of(caller: str, options: LossOptions) -> LossSpec:
    """`check_options`, once for each set of options: it costs a tenth of a small loss's time."""
    if not is_compiling():
        try:
            return _cached(caller, **options)
        except TypeError:
            pass  # not constant, not hashable, or an error that comes once more
    return check_options(options_of(caller, options))


@lru_cache(maxsize=256, typed=True)
def _cached(caller: str, **options: Any) -> LossSpec:
    if not all(isinstance(v, (str, int, float, type(None))) for v in options.values()):
        raise TypeError("the value of a tensor may change")
    return check_options(options_of(caller, cast(LossOptions, options)))


def lists_options(function: F) -> F:
    """Let help() and inspect.signature list every option in the place of **options; errors too."""
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    for name, default in Options._field_defaults.items():
        annotation = Options.__annotations__[name]
        annotation = getattr(annotation, "__forward_arg__", annotation)
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(name, kind, default=default, annotation=annotation))
    vars(function)["__signature__"] = signature.replace(parameters=parameters)
    caller = function.__qualname__.removesuffix(".__init__")
    KNOWN[caller] = [parameter.name for parameter in parameters if parameter.name != "self"]
    return function
