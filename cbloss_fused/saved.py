"""What a ClassBalancedLoss saves and loads: vectors as buffers, the rest as one extra state."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .arrays import copied

GIVEN = ("logit_bias", "margin", "pos_weight")  # by the caller, or None
VECTORS = ("weight", *GIVEN)  # buffers of (C,)
OWN_STATE = ("counts", "beta", "schedule")  # entries of states that had no extra state
KEPT = (torch.float32, torch.float64)  # dtypes that hold a weight


class SavedLoss(torch.nn.Module):
    """The state of a `ClassBalancedLoss`."""

    if TYPE_CHECKING:
        counts: Tensor
        beta: Tensor
        _epoch: int
        _share: float
        _whole: bool
    _whole = False  # while a state is loaded all or not at all

    def get_extra_state(self) -> Tensor:
        """Counts, beta and schedule: what a state has besides the vectors."""
        return packed(self.counts, self.beta, self._epoch, self._share)

    def set_extra_state(self, state: Any) -> None:
        """Take them over; the weights are an entry of their own, and stay.

        Those of another number of classes are left, with a warning: transformers hands them over
        where mismatched sizes are to be ignored, as for a new head.
        Raises: ValueError, and changes nothing, for what is no such state.
        """
        C = len(self.counts)
        parts = unpacked(state, C, self.beta)
        problems = misfits(parts, "", C)
        if "_extra_state" in parts and isinstance(state, Tensor) and state.dim() == 1:
            warnings.warn(f"{problems[0]}: not loaded", stacklevel=2)
        elif problems:
            raise ValueError("; ".join(problems))
        else:
            self._set_own_state(parts)

    def _set_own_state(self, state: Mapping[str, Tensor]) -> None:
        if "counts" in state:
            self.__dict__.update({name: copied(state[name]) for name in ("counts", "beta")})
        if "schedule" in state:
            epoch, self._share = state["schedule"].tolist()
            self._epoch = int(epoch)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As of any module; strict, a state that lacks an entry or has another changes nothing but
        the modules that a subclass has."""
        self._whole = strict
        try:
            return super().load_state_dict(state_dict, strict, assign)
        finally:
            self._whole = False

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """What fits, of older states and of nn.CrossEntropyLoss too; nothing if a value does not.

        A model's checkpoint may come in parts, each loaded with strict=False, of which this method
        is not told. Parameters, buffers and modules of a subclass are loaded as any module's.
        """
        arguments = local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        for hook in self._load_state_dict_pre_hooks.values():  # they may rename entries
            hook(state_dict, prefix, *arguments)
        self._load_entries(state_dict, prefix, *arguments)

    def _load_entries(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        given = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        state = {name: given[name] for name in (*VECTORS, *OWN_STATE) if name in given}
        C = len(self.counts)
        state |= unpacked(given.get("_extra_state", {}), C, self.beta)
        problems = misfits(state, prefix, C)
        tensors = {**self._parameters, **self._buffers}
        own = {
            name for name, tensor in tensors.items()
            if tensor is not None and name not in self._non_persistent_buffers_set
        }  # fmt: skip
        missing = [prefix + name for name in tensors if name in own and name not in given]

        def expected(name: str) -> bool:
            module, dot, _ = name.partition(".")
            return module in self._modules if dot else name in {*own, *OWN_STATE, "_extra_state"}

        unexpected = [prefix + name for name in given if not expected(name)]
        error_msgs += problems
        if strict:
            missing_keys += missing
            unexpected_keys += unexpected
        if problems or (self._whole and (missing or unexpected)):
            return
        wide = {
            name: given[name] if given[name].dtype in KEPT else given[name].float()
            for name in VECTORS
            if name in own and name in given
        }
        others = {name: given[name] for name in own if name in given and name not in wide}
        errors: list[str] = []
        for part in (others, wide):  # what a subclass has may not fit: then nothing else is loaded
            if not errors:
                self._load_tensors(part, prefix, local_metadata, errors)
        error_msgs += errors
        if not errors:
            self._set_own_state(state)

    def _load_tensors(
        self, tensors: Mapping[str, Tensor], prefix: str, local_metadata: Any, errors: list[str]
    ) -> None:
        """As any module loads its own, but for the hooks before it, which have run."""
        entries = {prefix + name: tensor for name, tensor in tensors.items()}
        hooks, self._load_state_dict_pre_hooks = self._load_state_dict_pre_hooks, OrderedDict()
        try:
            super()._load_from_state_dict(entries, prefix, local_metadata, False, [], [], errors)
        finally:
            self._load_state_dict_pre_hooks = hooks


def packed(counts: Tensor, beta: Tensor, epoch: int, share: float) -> Tensor:
    """What a loss keeps besides its vectors, in one tensor: nn.Module's extra state.

    No move or cast of a model touches an extra state, and torch.distributed.checkpoint and
    transformers hand it to its module as they do parameters and buffers.

    Returns: (3 + C,), or (2 + 2C,) for a beta per class, float64 on the CPU: epoch, share, beta,
        counts.
    """
    schedule = torch.tensor([epoch, share], dtype=torch.float64, device="cpu")
    return torch.cat([schedule, beta.reshape(-1), counts])


def unpacked(extra: Any, C: int, beta: Tensor) -> dict[str, Any]:
    """Counts, beta and schedule of an extra state, or, if it is none, itself for `misfits`.

    beta: the loss's own, whose shape tells one number from one per class where C is 1.
    """
    if isinstance(extra, dict):  # of 0.1
        return extra
    if type(extra).__name__ == "_EXTRA_STATE":  # torch.distributed.checkpoint's, where it has none
        return {}
    tensor = isinstance(extra, Tensor) and not extra.is_meta
    if not tensor or tuple(extra.shape) not in extra_shapes(C):
        return {"_extra_state": extra}
    schedule, betas, counts = copied(extra).split([2, len(extra) - 2 - C, C])
    one = len(betas) == 1 and (C > 1 or beta.dim() == 0)
    return {"counts": counts, "beta": betas[0] if one else betas, "schedule": schedule}


def extra_shapes(C: int) -> list[tuple[int, ...]]:
    return [(3 + C,), (2 + 2 * C,)]


def misfits(state: dict[str, Any], prefix: str, C: int) -> list[str]:
    """What of a state cannot be loaded into a loss of C classes."""
    shapes: dict[str, list[Any]] = {"beta": [(), (C,)], "schedule": [(2,)]}
    shapes["_extra_state"] = extra_shapes(C)
    found = []
    for name, value in state.items():
        allowed = shapes.get(name, [(C,)])
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if isinstance(value, Tensor) and value.is_meta and name not in VECTORS:
            found.append(f"{prefix}{name} is on the meta device, without values")
        elif shape not in allowed:
            found.append(
                f"size mismatch for {prefix}{name}: the checkpoint has {shape}, expected "
                f"{' or '.join(map(str, allowed))}"
            )
    if ("counts" in state) != ("beta" in state):
        found.append(f"{prefix}counts and {prefix}beta come together, got one of them")
    largest = torch.finfo(torch.float64).max
    for name, most in (("counts", largest), ("beta", 1), ("schedule", largest)):
        values = state.get(name)
        if values is not None and not found and not ((values >= 0) & (values <= most)).all():
            found.append(f"{prefix}{name} has values outside [0, {most:g}]")
    return found
