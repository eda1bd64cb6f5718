"""The operators under opcheck, torch.compile and torch.export; backends(); no library."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from support.backends import gradient_arguments, operator_arguments
from support.marks import FAMILIES, name_of
from support.oracle import oracle, sample
from support.tolerances import assert_grad
from torch.autograd import forward_ad

from cbloss_fused import (
    ClassBalancedLoss,
    ClassShards,
    LinearClassBalancedLoss,
    backends,
    class_balanced_loss,
    linear_class_balanced_loss,
    ops,
)
from cbloss_fused.backends import REGISTRY, set_isa
from cbloss_fused.buffers import new_saved
from cbloss_fused.inputs import Inputs

OPERATORS = torch.ops.cbloss_fused
FAMILY = pytest.mark.parametrize("family", FAMILIES)
TORCH_WARNS = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def arguments(shape, dtype, family, reduction, vectors):
    """Of both operators, none of which needs a gradient."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    logits = torch.linspace(-3, 3, torch.Size(shape).numel()).reshape(shape).to(dtype)
    rows = shape[:1] + shape[2:]
    target = torch.arange(torch.Size(rows).numel()).reshape(rows) % shape[1]
    weight = torch.ones(shape[1], dtype=compute) if vectors else None
    sample_weight = torch.ones(rows, dtype=compute) if vectors else None
    normalizer = torch.tensor(3, dtype=compute) if vectors and reduction == "mean" else None
    vectors = (weight, sample_weight, normalizer)
    return operator_arguments(logits, target, family, 0.5, 0.1, reduction, vectors)


@TORCH_WARNS
@pytest.mark.sampled
@pytest.mark.parametrize("vectors", (False, True), ids=("", "vectors"))
@pytest.mark.parametrize("reduction", ("none", "mean"))
@pytest.mark.parametrize("shape", ((5, 3), (2, 70, 4)), ids=str)
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=name_of)
@FAMILY
def test_opcheck(family, dtype, shape, reduction, vectors):
    inputs, loss, formula = arguments(shape, dtype, family, reduction, vectors)
    logits, target = inputs[:2]
    grad, saved = torch.empty_like(logits), new_saved(logits, family == "sigmoid")
    for buffers in ((None, None), (grad, None), (None, saved)):
        torch.library.opcheck(OPERATORS.loss.default, (*inputs, loss, *buffers))
    OPERATORS.loss(*inputs, loss, None, saved)
    incoming = torch.ones_like(loss)
    torch.library.opcheck(
        OPERATORS.gradient.default,
        gradient_arguments(logits, Inputs(target), saved, incoming, formula, grad),
    )


# torch.compile ------------------------------------------------------------------------------------

COMPILED: dict[str, tuple[tuple[int, ...], torch.dtype, dict[str, Any]]] = {
    "stored": ((6, 10), torch.float32, {}),
    "sigmoid-focal": ((6, 10), torch.float32, {"activation": "sigmoid", "gamma": 0.5}),
    "weighted-mean": ((6, 10), torch.float64, {"reduction": "weighted_mean"}),
    "bfloat16": ((6, 130), torch.bfloat16, {"gamma": 2.0}),
    "float16": ((6, 10), torch.float16, {}),  # recomputes
    "none": ((6, 10), torch.float32, {"reduction": "none", "label_smoothing": 0.1}),
    "inplace": ((6, 10), torch.float32, {"inplace": True}),
    "inplace-recompute": ((6, 10), torch.float32, {"inplace": True, "recompute": True}),
    "normalizer": ((6, 10), torch.float32, {"normalizer": torch.tensor(3.0)}),
    "no-ignore": ((6, 10), torch.float32, {"ignore_index": None}),
    "image": ((6, 5, 3, 4), torch.float32, {}),
    "image-none": ((6, 5, 3, 4), torch.float32, {"reduction": "none", "activation": "sigmoid"}),
    "reference": ((6, 10), torch.float32, {"backend": "reference", "gamma": 2.0}),
    "background": (
        (6, 3), torch.float32, {"activation": "sigmoid", "background_index": 2**40, "alpha": 0.25},
    ),
    "pos-weight": (
        (6, 3), torch.float32, {"activation": "sigmoid", "pos_weight": torch.arange(3.0)},
    ),
}  # fmt: skip


def batch(shape, dtype, n):
    shape = (n, *shape[1:])
    logits = (torch.linspace(-3, 3, torch.Size(shape).numel()).reshape(shape) * 1.7).sin().to(dtype)
    rows = shape[:1] + shape[2:]
    return logits, torch.arange(torch.Size(rows).numel()).reshape(rows) % shape[1]


@TORCH_WARNS
@pytest.mark.parametrize(
    "compiler, name",
    [
        *(("aot_eager", name) for name in COMPILED),
        *(("inductor", name) for name in ("stored", "float16", "inplace", "image-none")),
    ],
)
def test_compile(name, compiler):
    shape, dtype, options = COMPILED[name]
    weight = torch.rand(shape[1]) + 0.5
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)

    def step(x, y, weight):
        return class_balanced_loss(x * 1.5, y, weight, **options) * 2

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for n in (6, 6, 9, 33):
        logits, target = batch(shape, dtype, n)
        results = []
        for function in (step, compiled):
            leaf = logits.clone().requires_grad_()
            y = target.clone()
            if n > 6 or function is compiled:
                torch._dynamo.mark_dynamic(leaf, 0)
                torch._dynamo.mark_dynamic(y, 0)
            loss = function(leaf, y, weight)
            loss.backward(torch.linspace(0.5, 2, loss.numel()).to(loss).reshape(loss.shape))
            results.append((loss.detach(), leaf.grad))
        rtol = 0.02 if dtype.itemsize == 2 else 1e-5
        torch.testing.assert_close(results[1][0], results[0][0])
        torch.testing.assert_close(results[1][1], results[0][1], rtol=rtol, atol=1e-5)
    assert counter.frame_count <= 2


@TORCH_WARNS
@pytest.mark.parametrize("numbers", ((1.0, 2.0, 3.5, 4.25), (1, 2, 3, 5)), ids=("float", "int"))
def test_compile_with_a_normalizer_that_changes(numbers):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(x, y, normalizer):
        return class_balanced_loss(x * 1.5, y, normalizer=normalizer)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    logits, target = batch((6, 10), torch.float32, 6)
    for number in numbers:
        results = []
        for function in (step, compiled):
            leaf = logits.clone().requires_grad_()
            loss = function(leaf, target, number)
            loss.backward()
            results.append((loss.detach(), leaf.grad))
        torch.testing.assert_close(*results)
    assert counter.frame_count <= 2


@TORCH_WARNS
def test_compile_with_numbers_of_the_graph():
    """A count of positives, sizes of what is dynamic."""
    torch._dynamo.reset()

    def step(x, y):
        C = x.shape[1]
        t = torch.where(y == 0, C, y)
        count = ((t < C) & (t != 1)).sum().clamp(min=1)
        options = {"background_index": C, "ignore_index": 1, "activation": "sigmoid"}
        by_count = class_balanced_loss(x, t, normalizer=count, **options)
        return by_count + class_balanced_loss(x, y, normalizer=2 * x.shape[0])

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, C in ((6, 10), (9, 7), (33, 12)):
        logits, target = batch((n, C), torch.float32, n)
        torch.testing.assert_close(compiled(logits, target), step(logits, target))


@TORCH_WARNS
@FAMILY
def test_compile_a_model_with_its_loss(family):
    torch._dynamo.reset()
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 10)
    loss_fn = ClassBalancedLoss(range(1, 11), 0.9, activation=family, gamma=0.5)
    features, target = torch.randn(8, 6), torch.arange(8)
    want = loss_fn(head(features), target)
    want.backward()
    expected, head.weight.grad = head.weight.grad, None

    compiled = torch.compile(lambda x, y: loss_fn(head(x), y), fullgraph=True, backend="aot_eager")
    loss = compiled(features, target)
    loss.backward()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(head.weight.grad, expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(features, target), want.detach())


class Model(torch.nn.Module):
    def __init__(self, reduction):
        super().__init__()
        self.head = torch.nn.Linear(6, 10)
        self.loss = ClassBalancedLoss(range(1, 11), 0.9, gamma=0.5, reduction=reduction)

    def forward(self, features, target):
        return self.loss(self.head(features), target)


@TORCH_WARNS
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # of torch 2.11's own load
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_export(tmp_path, reduction):
    model, features, target = Model(reduction).eval(), torch.randn(8, 6), torch.arange(8)
    n = torch.export.Dim("n", min=2)
    with torch.no_grad():
        program = torch.export.export(
            model, (features, target), dynamic_shapes={"features": {0: n}, "target": {0: n}}
        )
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        for rows in (8, 3):
            got = loaded(features[:rows], target[:rows])
            torch.testing.assert_close(got, model(features[:rows], target[:rows]))


class WithPenalty(torch.nn.Module):
    """A parameter of the loss's logits is used elsewhere, too."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.loss = torch.nn.Linear(6, 10), ClassBalancedLoss(range(10, 0, -1))

    def forward(self, features, target):
        return self.loss(self.head(features), target) + self.head.weight.square().sum()


@TORCH_WARNS
@pytest.mark.parametrize("strict", (False, True), ids=("", "strict"))
@pytest.mark.parametrize(
    "make", (WithPenalty, lambda: LinearClassBalancedLoss(6, range(10, 0, -1))),
    ids=("loss", "linear"),
)  # fmt: skip
def test_an_exported_training_step_has_its_gradient(make, strict):
    """The formula is exported: the operators of a graph have no gradient."""
    model, features, target = make(), torch.randn(8, 6), torch.arange(8)
    n = torch.export.Dim("n", min=2)
    shapes = ({0: n}, {0: n})
    program = torch.export.export(model, (features, target), dynamic_shapes=shapes, strict=strict)
    exported = program.module()
    want = torch.autograd.grad(model(features[:5], target[:5]), list(model.parameters()))
    got = torch.autograd.grad(exported(features[:5], target[:5]), list(exported.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@TORCH_WARNS
@pytest.mark.parametrize("strict", (False, True), ids=("", "strict"))
def test_an_exported_linear_loss_is_the_operator(strict):
    model = LinearClassBalancedLoss(6, range(10, 0, -1))
    features, target = torch.randn(8, 6), torch.arange(8)
    n = torch.export.Dim("n", min=2)
    shapes = ({0: n}, {0: n})
    with torch.no_grad():
        program = torch.export.export(
            model, (features, target), dynamic_shapes=shapes, strict=strict
        )
        assert "_linear_loss" in str(program.graph)
        got = program.module()(features[:3], target[:3])
        torch.testing.assert_close(got, model(features[:3], target[:3]))


@TORCH_WARNS
def test_statistics_and_shards_are_not_exported_with_a_gradient():
    class Loss(torch.nn.Module):
        def __init__(self, options: dict[str, Any]) -> None:
            super().__init__()
            self.options = options

        def forward(self, x, y):
            return class_balanced_loss(2 * x, y, **self.options)

    class Head(Loss):
        def forward(self, x, y):
            return linear_class_balanced_loss(x, torch.eye(6), y, **self.options)

    x, y = torch.randn(8, 6, requires_grad=True), torch.arange(8) % 6
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"return_stats": True}, "return_stats cannot be exported"),
        ({"shards": ClassShards(6)}, "neither traced by torch.jit.trace nor exported"),
    )
    for options, text in refused:
        for make in (Loss, Head):
            with pytest.raises(NotImplementedError, match=text):
                torch.export.export(make(options), (x, y), strict=False)


@TORCH_WARNS
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # asked for by the compiler
@pytest.mark.parametrize("compiler", ("eager", "inductor"))
def test_compiled_in_place_writes_over_no_parameter(compiler):
    """Nor where elements share memory."""
    torch.compiler.reset()
    parameter, target = torch.nn.Parameter(torch.randn(12)), torch.tensor([0, 1, 2, 0])
    before = parameter.detach().clone()

    @torch.compile(backend=compiler)
    def of_parameter():
        return class_balanced_loss(parameter.view(4, 3), target, inplace=True)

    @torch.compile(backend=compiler)
    def expanded(x):
        return class_balanced_loss((x * 1).expand(4, 3), target, inplace=True)

    with pytest.raises(ValueError, match="inplace=True"):
        of_parameter().backward()
    with pytest.raises(ValueError, match="inplace=True"):
        expanded(torch.randn(1, 3, requires_grad=True))
    assert torch.equal(parameter, before)


@TORCH_WARNS
def test_compiled_tangents_are_refused():
    """As those of a call that is not compiled."""
    torch.compiler.reset()
    step = torch.compile(lambda x: class_balanced_loss(x, torch.arange(4)), backend="eager")
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.randn(4, 5), torch.ones(4, 5))
        with pytest.raises(NotImplementedError, match="backend='reference'"):
            step(x)


# What runs where ----------------------------------------------------------------------------------


def test_backends_tells_what_cpu_tensors_get():
    found = backends()
    assert all(isinstance(text, str) and text for text in found.values())
    if REGISTRY["cpu"].missing is not None:
        assert found["cpu"] == f"reference: {REGISTRY['cpu'].missing}"
        return
    names = set_isa()
    assert names[-1] == "baseline"
    assert "fused" in found["cpu"]
    assert names[0] in found["cpu"]
    assert "reference" in found["other"]


@pytest.mark.skipif(REGISTRY["cpu"].missing is not None, reason="no library")
def test_instruction_sets_can_be_chosen_and_a_wrong_name_is_refused():
    for name in set_isa():
        assert name in set_isa(name)
    with pytest.raises(ValueError, match=r"'sse9'.*baseline"):
        set_isa("sse9")
    set_isa(set_isa()[0])


@pytest.mark.skipif(REGISTRY["cpu"].missing is not None, reason="no library")
def test_asking_for_the_backends_changes_none():
    """Variants differ in last bits: whoever answers is seen in them."""
    logits, target = torch.randn(64, 1000), torch.arange(64)
    best = set_isa("baseline")[0]
    before = class_balanced_loss(logits, target, activation="sigmoid", reduction="none")
    backends()
    after = class_balanced_loss(logits, target, activation="sigmoid", reduction="none")
    set_isa(best)
    assert torch.equal(before, after)


WITHOUT_LIBRARY = """
import json, sys, warnings
sys.modules["cbloss_fused._C"] = None
import torch, cbloss_fused
results = []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for family, recompute in json.loads(sys.argv[1]):
        x = torch.linspace(-3, 3, 40, dtype=torch.float64).reshape(4, 10).sin().requires_grad_()
        loss = cbloss_fused.class_balanced_loss(
            x, torch.tensor([0, 3, -100, 9]), activation=family, gamma=0.5, recompute=recompute
        )
        loss.backward()
        results.append([loss.item(), x.grad.tolist()])
texts = [str(w.message) for w in caught]
print(json.dumps([results, texts, cbloss_fused.backends(), caught[0].filename if caught else ""]))
"""


def test_without_the_library_the_reference_serves_and_says_so_once():
    cases = list(product(FAMILIES, (False, True)))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBRARY, json.dumps(cases)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    results, warned, found, file = json.loads(done.stdout)
    x = torch.linspace(-3, 3, 40, dtype=torch.float64).reshape(4, 10).sin()
    for (family, _), (loss, grad) in zip(cases, results, strict=True):
        want = oracle(x, torch.tensor([0, 3, -100, 9]), activation=family, gamma=0.5)
        assert loss == pytest.approx(want[0].item(), rel=1e-12)
        assert_grad(torch.tensor(grad, dtype=torch.float64), want[1], torch.float64)
    assert len(warned) == 1
    assert file == "<string>"
    assert "cbloss_fused" in warned[0]
    reason = found["cpu"].removeprefix("reference: ")
    assert reason != found["cpu"]
    assert reason in warned[0]
    assert "uv pip install --reinstall-package cbloss_fused" in reason


ROUTES = ("function", "module", "backward", "none", "linear", "aot_eager", "inductor")


def route_of_a_call(route):
    """A call as users make it, and what is on its line; of a compiled function, on its first."""
    loss_fn, head = ClassBalancedLoss([5, 3, 2], 0.9), LinearClassBalancedLoss(4, [5, 3, 2], 0.9)
    x, y = torch.ones(2, 3, requires_grad=True), torch.tensor([0, 1])

    def function():
        return class_balanced_loss(x * 2, y)

    calls: dict[str, Any] = {
        "function": (function, "class_balanced_loss(x * 2"),
        "module": (lambda: loss_fn(x, y), "lambda: loss_fn(x, y),"),
        "backward": (lambda: loss_fn(x, y).backward(), "lambda: loss_fn(x, y).backward()"),
        "none": (lambda: class_balanced_loss(x, y, reduction="none"), 'reduction="none"'),
        "linear": (lambda: head(torch.ones(2, 4), y), "head(torch.ones"),
        "aot_eager": (torch.compile(function, backend="aot_eager"), "def function():"),
        "inductor": (torch.compile(function), "def function():"),
    }
    return calls[route]


@TORCH_WARNS
@pytest.mark.parametrize("route", ROUTES)
def test_the_warning_of_the_fallback_names_the_callers_line(route, monkeypatch):
    loss, gradient = ops.overloads("reference")
    fallback = REGISTRY["cpu"]._replace(loss=loss, gradient=gradient)
    monkeypatch.setitem(REGISTRY, "cpu", fallback)
    monkeypatch.setitem(ops.why_eager, "cpu", "no compiler")
    monkeypatch.setattr(ops, "_warned", False)
    torch._dynamo.reset()
    call, text = route_of_a_call(route)
    with pytest.warns(UserWarning, match="not in its fused kernels: no compiler") as found:
        call()
    (warning,) = [each for each in found if "fused kernels" in str(each.message)]
    assert warning.filename == __file__
    assert text in Path(__file__).read_text().splitlines()[warning.lineno - 1]


def test_the_fallback_operators_are_what_is_registered():
    """On a device without kernels the dispatcher finds the Python implementation."""
    logits, target, _, _ = sample(10, torch.float32)
    keys = torch._C._dispatch_dump("cbloss_fused::loss")
    assert "CompositeExplicitAutograd" in keys
    arguments, loss, _ = operator_arguments(logits.to("meta"), target.to("meta"), "softmax")
    OPERATORS.loss(*arguments, loss, None, None)
    assert loss.device.type == "meta"
