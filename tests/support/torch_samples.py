"""PyTorch's own sample inputs of a loss, from its OpInfo: `python torch_samples.py FILE`.

A process of its own, because importing PyTorch's tests changes settings of the whole process.
"""

from __future__ import annotations

import random
import sys

NAMES = ("cross_entropy", "binary_cross_entropy_with_logits", "nll_loss")


def main(file: str) -> None:
    """Writes {name: [(input, target, keywords), ...]}."""
    import torch
    from torch.testing._internal.common_methods_invocations import op_db

    torch.manual_seed(0)
    random.seed(0)
    samples = {}
    for op in op_db:
        name = op.name.removeprefix("nn.functional.")
        if op.name != name and name in NAMES and not op.variant_test_name:
            found = op.sample_inputs("cpu", torch.float64, requires_grad=False)
            samples[name] = [(s.input, *s.args, s.kwargs) for s in found]
    torch.save(samples, file)


if __name__ == "__main__":
    main(sys.argv[1])
