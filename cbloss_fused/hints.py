"""What was probably meant: the ends of messages, looked for only after a check has failed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

ORDER = "; the order is (input, target): logits first"
BINARY = "pass 0/1 labels as floats of shape (N, 1) and activation='sigmoid'"
PER_CLASS = ("weight", "logit_bias", "margin", "pos_weight")
MADE_OF_COUNTS = {
    "weight": "class_balanced_weights",
    "logit_bias": "logit_adjustment",
    "margin": "ldam_margin",
}
NO_CLASS = (255, 65535)  # what masks have for it, beside negative numbers


def of_swapped(input: Tensor, target: Tensor) -> str:
    """For an input that is no logits."""
    swapped = target.is_floating_point() and not input.is_floating_point()
    return ORDER if swapped else ""


def of_target_shape(input: Tensor, target: Tensor, rows: tuple[int, ...]) -> str:
    """For a target that has neither the shape of rows, of class indices, nor input's, of the rest.

    Of integers the second is wrong too.
    """
    shape, given = tuple(input.shape), tuple(target.shape)
    C = shape[min(1, len(shape) - 1)]
    if len(shape) == 1 and given == shape:
        return (
            f"; a 1-d input is one row of {C} classes: give a binary batch the shape (N, 1), "
            "input.unsqueeze(1) and target.unsqueeze(1).float(), and activation='sigmoid'"
        )
    if given == shape:
        return f"; {_of_one_hot(C)}"
    if len(shape) > 2 and given in (shape[:-1], (input[..., 0].numel(),)):
        return (
            "; classes are dimension 1 of input: pass input.movedim(-1, 1) and target (N, d1, …), "
            "or rows of classes, input.flatten(0, -2) and target.flatten()"
        )
    if len(shape) > 2 and given == (*rows, C):
        return "; classes are dimension 1 of target, too: pass target.movedim(-1, 1)"
    if given == rows:  # of floats or bools
        return "; pass target.unsqueeze(1)" if C == 1 else "; for class indices pass target.long()"
    if [n for n in given if n != 1] == [n for n in rows if n != 1]:
        wanted = f"({rows[0]},)" if len(rows) == 1 else str(rows)
        return f"; pass target.reshape{wanted}" if rows else "; pass target.squeeze()"
    return ""


def _of_one_hot(C: int) -> str:
    if C == 1:
        return BINARY
    return "of one-hot labels pass target.argmax(1); for a number per class target.float()"


def of_target_values(target: Tensor, bad: Tensor, num_classes: int) -> str:
    """For class indices of which some are out of range."""
    wrong = target[bad]
    value = int(wrong[0])
    if not bool((wrong == value).all()):
        return ""
    if num_classes == 1 and value == 1:
        return f"; for a binary head with one logit {BINARY}, or give it two logits"
    if value == num_classes and int(target.min()) >= 1:
        return "; if labels begin at 1 pass target - 1"
    if value < 0 or value in NO_CLASS:
        return f"; if {value} means that there is no label pass ignore_index={value}"
    return ""


def of_option(name: str, value: Any) -> str:
    """For an option out of its range, or of another type."""
    if name == "activation" and isinstance(value, str) and "focal" in value.lower():
        return "; the focal loss is gamma > 0 of either"
    if name == "alpha" and hasattr(value, "__len__") and not isinstance(value, str):
        return "; numbers per class are weight's"
    return ""


def meaning(name: str) -> str:
    """What a vector has its numbers for."""
    if name in PER_CLASS:
        return ", one number per class"
    return ", one factor per row" if name == "sample_weight" else ""


def of_vector_type(name: str, given: Any) -> str:
    """For what is no tensor in the place of a vector."""
    if name == "weight" and isinstance(given, int | float | str):
        return "; pass options by their names"
    if isinstance(given, int | float):
        return f"; it has{meaning(name)[1:]}"
    vector = hasattr(given, "__array__") or isinstance(given, list | tuple)
    return f"; pass torch.tensor({name})" if vector else ""


def of_vector_dtype(name: str, vector: Tensor) -> str:
    """For numbers that are not floats."""
    if name in MADE_OF_COUNTS and not vector.is_complex():
        return f"; of class counts pass {MADE_OF_COUNTS[name]}(counts)"
    return "" if vector.is_complex() else f"; pass {name}.float()"


def of_vector_shape(name: str, vector: Tensor, shape: tuple[int, ...]) -> str:
    """For a vector of another shape."""
    binary = name == "weight" and shape == (1,) and vector.shape == (2,)
    return "; for a binary head with one logit pass sample_weight=weight[target]" if binary else ""


def of_rank(rank: int) -> str:
    """For counts that are no vector."""
    if rank == 0:
        return ", the samples of each class"
    return "" if rank == 1 else "; logits and targets go to the call, loss_fn(input, target)"


def of_layer(name: str, given: Any) -> str:
    """For what is no tensor in the place of a linear head's weight."""
    linear = name == "linear_weight" and isinstance(given, nn.Module)
    return "; pass its .weight, and linear_bias=its .bias" if linear else ""


def of_head_dtype(name: str, tensor: Tensor) -> str:
    """For a linear head's weight of another type than the input."""
    swapped = name == "linear_weight" and not tensor.is_floating_point()
    return "; the order is (input, linear_weight, target)" if swapped else ""


def of_head_shape(weight: Tensor, D: int) -> str:
    """For a linear head's weight that does not fit inputs of D features."""
    return "; pass linear_weight.T" if weight.dim() == 2 and len(weight) == D else ""


def of_head_target(target: Tensor, C: int) -> str:
    """For a linear head's target of another shape."""
    bias = target.is_floating_point() and target.shape == (C,)
    return "; a bias is passed by its name, linear_bias" if bias else ""


def of_counts(counts: Tensor, C: int) -> str:
    """For counts (another number) of a loss whose logits have C classes."""
    if C == 1 and len(counts) == 2:
        return (
            "; for a binary head with one logit call class_balanced_loss with "
            "sample_weight=class_balanced_weights(counts)[target]"
        )
    labels = len(counts) > C and bool(((counts < C) & (counts == counts.round())).all())
    return "; labels are counted by ClassBalancedLoss.from_labels(labels, C)" if labels else ""


def of_empty(counts: Tensor) -> str:
    """For counts of which some are 0."""
    labels = bool(((counts < len(counts) - 1) & (counts == counts.round())).all())
    return "; if these are labels, class_counts(labels) counts them" if labels else ""
