"""The tables of options.py say the same; signatures and reprs follow them."""

from __future__ import annotations

import inspect
import re
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from cbloss_fused import ClassBalancedLoss, class_balanced_loss
from cbloss_fused.module_state import ModuleOptions
from cbloss_fused.options import REDUCTIONS, RULES, LossOptions, Options

TYPES = get_type_hints(Options)
DEFAULTS = Options()._asdict()
EACH = pytest.mark.parametrize("name", TYPES)
OTHERS: dict[str, Any] = {  # a value of every option that is not its default
    "activation": "sigmoid",
    "gamma": 0.5,
    "gamma_neg": 2.0,
    "alpha": 0.25,
    "clip": 0.05,
    "label_smoothing": 0.1,
    "z_loss": 1e-4,
    "logit_scale": 30.0,
    "class_weighting": "class",
    "ignore_index": None,
    "background_index": 2,
    "reduction": "sum",
    "inplace": True,
    "recompute": False,
    "backend": "reference",
}


def test_the_tables_have_the_same_options_in_the_same_order():
    assert get_type_hints(LossOptions) == TYPES
    assert list(LossOptions.__annotations__) == list(Options._fields)
    assert list(RULES) == list(Options._fields)


@EACH
def test_a_default_keeps_its_rule(name):
    assert RULES[name].valid(DEFAULTS[name])


@EACH
def test_a_rule_allows_the_choices_of_the_type(name):
    hints = (TYPES[name], *get_args(TYPES[name]))  # of a union its members, too
    choices = [get_args(hint) for hint in hints if get_origin(hint) is Literal]
    if choices:
        assert tuple(re.findall(r"'(\w+)'", RULES[name].expected)) == choices[0]
        assert all(map(RULES[name].valid, choices[0]))
        assert not RULES[name].valid("another")


def test_the_operators_count_the_reductions_in_the_order_of_the_type():
    assert get_args(TYPES["reduction"]) == REDUCTIONS


@pytest.mark.parametrize("function", (class_balanced_loss, ClassBalancedLoss))
def test_signatures_list_every_option(function):
    parameters = list(inspect.signature(function).parameters.values())[-len(DEFAULTS) :]
    assert {p.name: p.default for p in parameters} == DEFAULTS
    assert [p.name for p in parameters] == list(DEFAULTS)
    assert {p.kind for p in parameters} == {inspect.Parameter.KEYWORD_ONLY}
    assert [p.annotation for p in parameters] == [
        getattr(hint, "__forward_arg__", hint) for hint in Options.__annotations__.values()
    ]


def test_other_constructors_take_the_keywords_of_the_first():
    parameters = inspect.signature(ClassBalancedLoss).parameters.values()
    keywords = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert get_type_hints(ModuleOptions).keys() == keywords


@EACH
def test_a_repr_shows_what_is_not_the_default(name):
    assert OTHERS[name] != DEFAULTS[name]
    given = {name: OTHERS[name]}
    of_sigmoid = ("gamma_neg", "alpha", "clip", "class_weighting", "background_index")
    if name in of_sigmoid:
        given = {"activation": "sigmoid", **given}
    shown = ClassBalancedLoss([5, 1], 0.9, **given).extra_repr().split(", ")
    assert shown[2:] == [f"{name}={value!r}" for name, value in given.items()]
