"""Gradients of any partition into windows and units equal full autograd."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from anabranch import adapters
from anabranch.errors import AdapterError
from anabranch.serving.batch import StepPlan
from anabranch.serving.coserving.pages import PagePool
from anabranch.serving.coserving.passes import Pass
from anabranch.serving.coserving.trainee import Trainee
from anabranch.serving.runner.fused import FusedRunner
from anabranch.serving.runner.transformers import TransformersRunner
from anabranch.training.example import Item
from anabranch.training.language import LanguageObjective
from anabranch.training.losses.causal import Causal
from tests import tiny
from tests.serving.coserving.helpers import job, rows
from tests.serving.test_fused_runner import rounded

PAGE = 16
POOL = 40


def randomise(model: PeftModel, seed: int = 0) -> None:
    """Weights that make every adapter do something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def served(kind: str, **options: Any) -> tuple[Any, Any]:
    """A runner with pages, and the same model for the reference computation."""
    model = rounded("LlamaConfig", {}) if kind == "fused" else tiny.llama()
    reference = copy.deepcopy(model)
    if kind == "fused":
        runner: Any = FusedRunner(model, 512, PAGE, **options)
    else:
        runner = TransformersRunner(model, 512, PAGE)
    runner.allocate(POOL)
    return runner, reference


def drive(work: Pass, runner: Any, windows: Any, units: Any) -> None:
    """Take a pass through the model in pieces of these sizes."""
    while not work.done:
        assert work.ready()
        while work.phase == "forward":
            segments = tuple(work.segments(next(windows)))
            runner.execute(StepPlan(segments, PAGE))
            for segment in segments:
                work.computed(segment)
        while not work.idle:
            work.unit(next(units))


def gradients(trainee: Trainee) -> dict[str, torch.Tensor]:
    found = {
        name: parameter.grad.clone()
        for name, parameter in trainee.model.named_parameters()
        if parameter.grad is not None
    }
    trainee.model.zero_grad(set_to_none=True)
    return found


def by_windows(
    runner: Any, trainee: Trainee, items: list[Item], windows: list[int], units: list[int]
) -> tuple[float, dict[str, torch.Tensor]]:
    pool = PagePool(0, POOL, PAGE)
    examples = [example for item in items for example in item]
    work = Pass(examples, trainee, runner, pool, gradients=True, prove=True)
    drive(work, runner, itertools.cycle(windows), itertools.cycle(units))
    assert work.nll > 0 and len(pool.take([PAGE] * POOL) or []) == POOL  # all pages are back
    return work.nll / work.trained, gradients(trainee)


def by_autograd(
    model: Any, trainee: Trainee, items: list[Item], spec: Any
) -> tuple[float, dict[str, torch.Tensor]]:
    """The plain trainer's objective on the plain model."""
    adapted = adapters.build(spec.method, copy.deepcopy(model), **spec.method_options)
    set_peft_model_state_dict(adapted, get_peft_model_state_dict(trainee.model))
    objective = LanguageObjective(Causal())
    objective.check(adapted)
    denominators = objective.denominators(items)
    loss = sum(objective.loss(adapted, batch, denominators).loss for batch in objective.plan(items))
    loss.backward()
    found = {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}
    return float(loss.detach()), found


def require_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """To 1e-4 of each tensor's largest value; one that is all rounding may be all rounding."""
    assert ours.keys() == theirs.keys() and ours
    largest = max(float(expected.abs().max()) for expected in theirs.values())
    for name, expected in theirs.items():
        tolerance = 1e-4 * float(expected.abs().max()) + 1e-6 * largest
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=tolerance, msg=name)


METHODS = {
    "all": ("lora", {"r": 4, "target_modules": "all-linear"}),
    "down": ("lora", {"r": 4, "target_modules": ["down_proj"]}),
    "top": ("lora", {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "ia3": ("ia3", {}),
    "houlsby": ("houlsby", {}),
}


def trainee_for(runner: Any, method: str, tmp_path: Path) -> tuple[Trainee, Any]:
    name, options = METHODS[method]
    spec = job(tmp_path, rows([4]), method=name, method_options=options)
    trainee = Trainee(runner, spec)
    randomise(trainee.model)
    trainee.refresh()
    return trainee, spec


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("windows", "units"),
    [([10**6], [10**6]), ([8], [8]), ([5, 9, 3], [4, 11, 1]), ([1], [16]), ([16], [1])],
)
def test_any_partition_equals_autograd(
    method: str, windows: list[int], units: list[int], tmp_path: Path
) -> None:
    runner, model = served("transformers")
    trainee, spec = trainee_for(runner, method, tmp_path)
    items = rows([37, 5, 21, 2])
    loss, ours = by_windows(runner, trainee, items, windows, units)
    expected, theirs = by_autograd(model, trainee, items, spec)
    assert loss == pytest.approx(expected, rel=1e-5)
    require_close(ours, theirs)


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=4),
    windows=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    units=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    kind=st.sampled_from(["transformers", "fused"]),
)
def test_random_partitions(
    lengths: list[int],
    windows: list[int],
    units: list[int],
    kind: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    runner, model = served(kind)
    trainee, spec = trainee_for(runner, "all", tmp_path_factory.mktemp("job"))
    items = rows(lengths)
    loss, ours = by_windows(runner, trainee, items, windows, units)
    expected, theirs = by_autograd(model, trainee, items, spec)
    assert loss == pytest.approx(expected, rel=1e-4)
    require_close(ours, theirs)


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_rounded_weights_and_caches_do_not_depend_on_the_partition(
    weights: Any, tmp_path: Path
) -> None:
    runner, _ = served("fused", weights=weights, kv_cache="bf16")
    trainee, _ = trainee_for(runner, "all", tmp_path)
    items = rows([37, 5, 21])
    loss, whole = by_windows(runner, trainee, items, [10**6], [10**6])
    for windows, units in (([7], [10**6]), ([10**6], [9]), ([5, 9], [4, 11])):
        other_loss, parts = by_windows(runner, trainee, items, windows, units)
        # A value on the edge between two rounded ones falls to either side, all else being equal.
        assert other_loss == pytest.approx(loss, rel=1e-3)
        for name, expected in whole.items():
            assert (parts[name] - expected).norm() <= 0.02 * expected.norm()


def test_kept_products_are_not_computed_again(tmp_path: Path) -> None:
    for kind in ("transformers", "fused"):
        runner, _ = served(kind)
        trainee, _ = trainee_for(runner, "all", tmp_path)
        items = rows([37, 5])
        _, expected = by_windows(runner, trainee, items, [7], [9])
        options = {"r": 4, "target_modules": "all-linear"}
        spec = job(tmp_path, rows([4]), method_options=options, activations="pruned")
        trainee = Trainee(runner, spec)
        randomise(trainee.model)
        trainee.refresh()
        linear = trainee.trunk.layers[1].mlp.up_proj.base_layer
        product, calls = linear.product, []

        def counted(x: torch.Tensor, product: Any = product, calls: Any = calls) -> torch.Tensor:
            calls.append(len(x))
            return product(x)

        linear.product = counted
        _, kept = by_windows(runner, trainee, items, [7], [9])
        require_close(kept, expected)
        # The forward windows of the transformers runner go through the same module.
        assert sum(calls) == (42 if kind == "transformers" else 0)


@pytest.mark.parametrize("kind", ["transformers", "fused"])
def test_dropout_is_the_same_in_every_window(kind: str, tmp_path: Path) -> None:
    runner, _ = served(kind)
    options = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.3}
    trainee = Trainee(runner, job(tmp_path, rows([4]), method_options=options))
    randomise(trainee.model)
    trainee.refresh()
    items = rows([37, 5, 21])
    loss, whole = by_windows(runner, trainee, items, [10**6], [10**6])
    other, parts = by_windows(runner, trainee, items, [5, 9, 3], [4, 11, 1])
    assert other == pytest.approx(loss, rel=1e-5)
    require_close(parts, whole)
    assert trainee.dropout is not None
    trainee.dropout.seed += 1
    changed, _ = by_windows(runner, trainee, items, [10**6], [10**6])
    assert changed != pytest.approx(loss, rel=1e-4)


def test_what_cannot_be_trained_by_windows_is_refused(tmp_path: Path) -> None:
    runner, _ = served("transformers")
    for method, options, why in (
        ("prompt_tuning", {"num_virtual_tokens": 4}, "virtual tokens"),
        ("lora", {"r": 4, "target_modules": ["lm_head"]}, "outside the decoder layers"),
    ):
        spec = job(tmp_path, rows([4]), method=method, method_options=options)
        with pytest.raises(AdapterError, match=why):
            Trainee(runner, spec)
    fused, _ = served("fused")
    spec = job(tmp_path, rows([4]), method="ia3", method_options={})
    with pytest.raises(AdapterError, match="cannot be trained on the fused runner"):
        Trainee(fused, spec)


def test_a_layer_that_computes_something_else_is_found_out(tmp_path: Path) -> None:
    runner, _ = served("transformers")
    trainee, _ = trainee_for(runner, "all", tmp_path)
    trainee.trunk.layers[0].self_attn.scaling *= 2
    handle = copy.deepcopy(trainee.handle)
    handle.base_model.layers[0].self_attn.scaling /= 2
    trainee.handle = handle  # what is served differs from what is computed again
    with pytest.raises(AdapterError, match="layer 0, called on its own, differs"):
        by_windows(runner, trainee, rows([20]), [10], [10])
