"""save_pretrained and from_pretrained of a model that holds the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.frameworks import MARKS, deferred, framework
from torch import Tensor, nn

from cbloss_fused import ClassBalancedLoss

framework("transformers")
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig, PreTrainedModel

pytestmark = MARKS


class Config(PretrainedConfig):
    model_type = "with-a-loss"

    def __init__(self, counts: Any = (90, 9, 1), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.counts = list(counts)


class Model(PreTrainedModel):
    """As in docs/recipes.md."""

    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.head = nn.Linear(4, len(config.counts))
        self.loss_fn = ClassBalancedLoss(config.counts, 0.99, margin=[0.1] * len(config.counts))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ClassBalancedLoss):
            module.reset_parameters()

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.loss_fn(self.head(x), labels)


def trained() -> Model:
    """One that is re-weighted half of the way, with further samples and a margin of its own."""
    model = Model(Config())
    deferred(model.loss_fn).step(2)
    model.loss_fn.update_counts([1, 1, 1])
    model.loss_fn.margin = torch.tensor([0.1, 0.2, 0.3])
    return model


def load(folder: Path, **options: Any) -> tuple[Model, dict[str, Any]]:
    return Model.from_pretrained(str(folder), output_loading_info=True, **options)


@pytest.mark.parametrize("size", ("5GB", 1), ids=("whole", "in-parts"))
@pytest.mark.parametrize("dtype", (None, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("device_map", (None, "cpu"))
def test_pretrained(device_map: Any, dtype: Any, size: Any, tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(str(tmp_path), max_shard_size=size)
    loaded, report = load(tmp_path, dtype=dtype, device_map=device_map)
    assert not any(report.values())
    for name, value in model.loss_fn.state_dict().items():
        assert torch.equal(loaded.loss_fn.state_dict()[name], value), name
    assert not list(loaded.loss_fn.parameters())
    schedule = deferred(loaded.loss_fn)
    assert schedule.epoch == 2
    schedule.step()
    deferred(model.loss_fn).step()
    assert torch.equal(loaded.loss_fn.weight, model.loss_fn.weight)


def test_pretrained_without_a_loss(tmp_path: Path) -> None:
    """The body is another's, and the loss as it is made."""
    model, made = trained(), Model(Config()).loss_fn.state_dict()
    model.save_pretrained(str(tmp_path))
    file = tmp_path / "model.safetensors"
    head = {k: v for k, v in load_file(file).items() if k.startswith("head.")}
    save_file(head, file, metadata={"format": "pt"})
    loaded, report = load(tmp_path)
    assert report["missing_keys"] == {f"loss_fn.{name}" for name in made}
    assert torch.equal(loaded.head.weight, model.head.weight)
    for name, value in made.items():
        assert torch.equal(loaded.loss_fn.state_dict()[name], value), name


def test_pretrained_with_other_classes(tmp_path: Path) -> None:
    """A new head has a new loss, where that is asked for."""
    trained().save_pretrained(str(tmp_path))
    config = Config([5, 4, 3, 2])
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(tmp_path, config=config)
    loaded, _ = load(tmp_path, config=config, ignore_mismatched_sizes=True)
    for name, value in Model(config).loss_fn.state_dict().items():
        assert torch.equal(loaded.loss_fn.state_dict()[name], value), name
