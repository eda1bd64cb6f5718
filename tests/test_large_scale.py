"""The paper's setting for large datasets, and the table of its loss's cost."""

from __future__ import annotations

import math

import pytest
import torch
from support.backends import DEVICE, INTERPRETED

pytest.importorskip("tabulate")
pytest.importorskip("tqdm")

from cbloss_fused import class_balanced_loss, class_balanced_weights
from cbloss_fused.experiments import large_scale
from cbloss_fused.experiments.large_scale import SETTINGS
from cbloss_fused.plain import softplus

pytestmark = pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="an experiment on the CPU")
INATURALIST = SETTINGS["inaturalist-2018"]


@pytest.mark.parametrize(
    "name, peak",
    [
        ("inaturalist-2017", 1.6),
        ("inaturalist-2018", 1.6),
        ("ilsvrc-2012", 0.8),
        ("inaturalist-2018-softmax", 0.4),
    ],
)
def test_learning_rate(name: str, peak: float) -> None:
    """Of a batch of 1024: a warm-up of 5 epochs, a tenth at 30, 60 and 80."""
    rate = SETTINGS[name].learning_rate
    of_epoch = {0: 0, 2.5: 0.5, 5: 1, 29.9: 1, 30: 0.1, 59.9: 0.1, 60: 0.01, 79.9: 0.01, 80: 1e-3}
    for epoch, factor in of_epoch.items():
        assert rate(epoch) == pytest.approx(peak * factor, rel=1e-9)


def test_optimizer() -> None:
    """Neither BatchNorm nor the head's bias decays."""
    head = INATURALIST.make_head(4)
    norm = torch.nn.BatchNorm2d(4)
    convolution = torch.nn.Conv2d(3, 4, 3)
    model = torch.nn.Sequential(convolution, norm, torch.nn.Flatten(), head)
    optimizer = INATURALIST.make_optimizer(model, head)
    of_decay = {g["weight_decay"]: {id(p) for p in g["params"]} for g in optimizer.param_groups}
    assert of_decay[0.0] == {id(p) for p in (norm.weight, norm.bias, head.bias)}
    assert of_decay[1e-4] == {id(p) for p in (*convolution.parameters(), head.weight)}
    for group in optimizer.param_groups:
        assert (group["momentum"], group["nesterov"], group["lr"]) == (0.9, True, 1.6)


def test_head() -> None:
    head = INATURALIST.make_head(64)
    assert head.bias.shape == (8142,)
    torch.testing.assert_close(head.bias.detach(), torch.full((8142,), -math.log(8141)))
    assert float(head.weight.detach().std()) == pytest.approx(0.01, rel=0.01)
    assert not SETTINGS["inaturalist-2018-softmax"].make_head(4).bias.any()


def test_losses() -> None:
    """The focal loss's weights are those of beta = 0.999; the plain one is cross entropy."""
    counts = torch.tensor([1000, 100, 10, 2])
    logits, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 3])
    weight = class_balanced_weights(counts, 0.999)
    want = class_balanced_loss(logits, y, weight, activation="sigmoid", gamma=0.5)
    torch.testing.assert_close(INATURALIST.make_loss(counts)(logits, y), want)
    plain = SETTINGS["inaturalist-2018-softmax"].make_loss(counts)
    torch.testing.assert_close(plain(logits, y), torch.nn.functional.cross_entropy(logits, y))


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_plain_formula(gamma: float) -> None:
    logits = (8 * torch.randn(7, 11)).requires_grad_()
    y, weight = torch.randint(11, (7,)), torch.rand(11) + 0.1
    plain = softplus(logits, y, weight, gamma)
    fused = class_balanced_loss(logits, y, weight, activation="sigmoid", gamma=gamma)
    torch.testing.assert_close(plain, fused)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, logits)[0] for loss in (plain, fused)), rtol=1e-4, atol=1e-6
    )


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(SETTINGS, "inaturalist-2018", INATURALIST._replace(C=50))
    large_scale.main(["--batch", "4", "--rounds", "1", "--threads", "1"])
    printed = capsys.readouterr().out
    rows = [line.split("|") for line in printed.splitlines() if line.startswith("|")]
    assert [row[1].strip() for row in rows[2:]] == ["loss alone", "step of the head"]
    for row in rows[2:]:
        fused, plain, _quotient = map(float, row[2:5])
        assert min(fused, plain) > 0
    assert f"1 threads, torch {torch.__version__}" in printed
    assert "features (4, 2048), C = 50" in printed
    monkeypatch.setattr(large_scale, "softplus", lambda x, y, w, g: 1.1 * softplus(x, y, w, g))
    with pytest.raises(SystemExit, match=r"the two losses differ: their gradients by 9\.\de-02"):
        large_scale.main(["--batch", "4", "--rounds", "1"])


def test_wrong_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        large_scale.main(["--batch", "0"])
    assert "--batch 0: expected at least 1" in capsys.readouterr().err
