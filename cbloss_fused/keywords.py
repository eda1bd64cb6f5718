"""Keywords that a function does not have, and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

KNOWN: dict[str, list[str]] = {}  # the parameters of every caller, by `options.lists_options`

# Names that papers and other libraries have for the same.
SAME = {
    **dict.fromkeys(("class_weights", "class_weight", "weights"), "weight"),
    **dict.fromkeys(("samples_per_cls", "samples_per_class", "cls_num_list"), "counts"),
    **dict.fromkeys(("eps", "epsilon"), "label_smoothing"),
    "gamma_pos": "gamma",
    "loss_type": "activation",
    "out_features": "num_classes",
    "s": "logit_scale",
    "m": "margin",
    "size_average": "reduction",
}
# What some callers do not take, and what is done instead.
MADE_OF = "pass weight=class_balanced_weights(counts, beta)"
OF_THE_CALL = ("sample_weight", "normalizer", "return_stats", "shards")
INSTEAD = {
    "counts": MADE_OF,
    "beta": MADE_OF,
    "num_classes": "there are as many classes as counts, or as logits in a row",
    "weight": "the weights follow from counts and beta; class_balanced_loss takes others",
    **{name: f"pass it with the batch: loss_fn(input, target, {name}=…)" for name in OF_THE_CALL},
}


def check_keywords(caller: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise TypeError for an unknown keyword, as Python does."""
    for name in given:
        if name not in known:
            hint = _hint(name, [*KNOWN.get(caller, ()), *known])
            raise TypeError(f"{caller}() got an unexpected keyword argument {name!r}{hint}")


def _hint(name: str, known: list[str]) -> str:
    plain = name.strip("_")
    meant = SAME.get(plain, plain)
    if meant in known:
        return f"; did you mean {meant!r}?"
    if meant in INSTEAD:
        return f"; {INSTEAD[meant]}"
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]!r}?" if near else ""
