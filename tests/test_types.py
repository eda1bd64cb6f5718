"""What a type checker knows of the public functions: types of results, wrong options."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import cbloss_fused

api = pytest.importorskip("mypy.api")
NAMES = ", ".join(cbloss_fused.__all__)
GIVEN = f"""
import torch
from torch.utils.data import TensorDataset
from cbloss_fused import {NAMES}

class Numbers:
    def __array__(self) -> object: ...

class Subclass(ClassBalancedLoss): ...

logits, target, flag = torch.zeros(2, 3), torch.tensor([0, 1]), bool(input())
dataset, loss_fn = TensorDataset(logits, target), ClassBalancedLoss([5, 1, 1])
"""
STATS = "tuple[Tensor, ClassStats]"
REVEALED = {
    "class_balanced_loss(logits, target)": "Tensor",
    "class_balanced_loss(logits, target, gamma=1, reduction='sum', backend=None)": "Tensor",
    "class_balanced_loss(logits, target, return_stats=False)": "Tensor",
    "class_balanced_loss(logits, target, return_stats=True)": STATS,
    "class_balanced_loss(logits, target, return_stats=flag)": f"Tensor | {STATS}",
    "loss_fn": "ClassBalancedLoss",
    "loss_fn(logits, target)": "Tensor",
    "loss_fn(logits, target, return_stats=False)": "Tensor",
    "loss_fn(logits, target, return_stats=True)": STATS,
    "loss_fn(logits, target, return_stats=flag)": f"Tensor | {STATS}",
    "loss_fn.weight": "Tensor",
    "Subclass.from_labels([0, 1], empty='one', gamma=1)": "Subclass",
    "Subclass.from_dataset(dataset, 3, margin=logits[0])": "Subclass",
    "class_counts(target)": "Tensor",
    "class_counts(dataset)": "Tensor",
    "global_normalizer(target, loss_fn.weight)": "Tensor",
    "loss_fn.group": "ProcessGroup | None",
    "class_balanced_weights([5, 1, 1])": "Tensor",
    "effective_number((5, 1, 1), 0.9)": "Tensor",
    "beta_from_prototypes(1000)": "float",
    "beta_from_prototypes([10, 100])": "Tensor",
    "beta_from_prototypes(logits)": "Tensor",
    "beta_from_prototypes(Numbers())": "float | Tensor",  # of no dimension: float
    "init_head_bias_(torch.nn.Linear(2, 3))": "Linear",
    "backends()": "dict[str, str]",
}
WRONG = ("activation='softplus'", "gama=1", "reduction='avg'", "gamma='1'")
REFUSED = {
    **{f"class_balanced_loss(logits, target, {option})": "call-overload" for option in WRONG},
    **{
        f"{made}([5, 1], {option})": "call-arg" if "gama" in option else "arg-type"
        for made in ("ClassBalancedLoss", "ClassBalancedLoss.from_labels")
        for option in (*WRONG, "empty='two'")
    },
}


@pytest.fixture(scope="module")
def said(request, tmp_path_factory):
    """What mypy says of each expression, without the modules of types."""
    snippet = tmp_path_factory.mktemp("types") / "snippet.py"
    expressions = [*map("reveal_type({})".format, REVEALED), *REFUSED]
    snippet.write_text("\n".join([GIVEN, *expressions]))
    cache = getattr(request.config, "cache", None)  # without it torch is read for half a minute
    folder = cache.mkdir("mypy") if cache else snippet.parent / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(cbloss_fused.__file__).parents[1])  # there mypy finds the package
        out, err, _ = api.run(
            ["--config-file=", "--follow-imports=silent", "--no-pretty", "--no-color-output",
             "--no-error-summary", "--cache-dir", str(folder), str(snippet)]
        )  # fmt: skip
    assert not err
    lines = re.findall(rf"{snippet.name}:(\d+): (?:error|note): (.*)", out)
    first = GIVEN.count("\n") + 2
    assert all(int(line) >= first for line, _ in lines), out
    return {
        expression: [plain(text) for line, text in lines if int(line) == number]
        for number, expression in enumerate([*REVEALED, *REFUSED], first)
    }


def plain(text: str) -> str:
    """Without modules; a NamedTuple by its name."""
    text = re.sub(r"tuple\[[^][]*fallback=([\w.]+)\]", r"\1", text)
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=\w)", "", text)


@pytest.mark.parametrize("expression", REVEALED)
def test_types_of_results(said, expression):
    assert said[expression] == [f'Revealed type is "{REVEALED[expression]}"']


@pytest.mark.parametrize("expression", REFUSED)
def test_a_wrong_option_is_an_error(said, expression):
    assert said[expression][0].endswith(f"[{REFUSED[expression]}]")
