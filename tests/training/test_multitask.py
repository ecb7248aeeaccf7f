"""The multi-task loss against the formulas written out, and cut into any micro-batches."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.training.errors import DataError, TrainingError
from anabranch.training.example import Example, Item
from anabranch.training.losses import TokenScores
from anabranch.training.losses.balance import Static
from anabranch.training.losses.balance_hook import BalanceHook
from anabranch.training.losses.multitask import MultiTaskLoss, focal

TASKS = ("a", "b", "c")
WEIGHTED = Static(dict.fromkeys(TASKS, 1), {"a": 1, "b": 2, "c": 5})
MODES: list[dict[str, Any]] = [
    {"normalise": "token"},
    {"normalise": "sample"},
    {"normalise": "task-token"},
    {"normalise": "task-sample"},
    {"normalise": "sample", "focal": "sample"},
    {"normalise": "task-sample", "focal": "sample"},
    {"normalise": "task-sample", "focal": "task"},
    {"normalise": "task-sample", "focal": "task", "gamma": 0.0, "alpha": {"a": 1, "b": 2, "c": 3}},
    {"normalise": "task-token", "balancer": WEIGHTED},
]


def example(task: str, targets: int, untrained: int = 1) -> Example:
    return Example([0] * (targets + untrained), [False] * untrained + [True] * targets, task)


def scores_of(items: Sequence[Item], parameter: Tensor, start: int) -> TokenScores:
    """Every trained token of the step has its own function of two parameters."""
    places = [
        (i, e) for i, item in enumerate(items) for e, x in enumerate(item) for _ in range(x.targets)
    ]
    position = torch.arange(start, start + len(places), dtype=torch.float64)
    logit = parameter[0] * torch.sin(position * 1.7) + parameter[1] * torch.cos(position)
    item = torch.tensor([i for i, _ in places], dtype=torch.int64)
    part = torch.tensor([e for _, e in places], dtype=torch.int64)
    return TokenScores(torch.nn.functional.softplus(logit), item, part, items)


def step_loss(
    loss: MultiTaskLoss, items: Sequence[Item], cuts: Sequence[int]
) -> tuple[float, Tensor, dict[str, float]]:
    """Loss, gradient and sums of a step whose items are cut at these places."""
    parameter = torch.tensor([0.7, -0.4], dtype=torch.float64, requires_grad=True)
    bounds = [0, *sorted(cuts), len(items)]
    parts, start = [], 0
    for low, high in itertools.pairwise(bounds):
        micro_batch = items[low:high]
        parts.append((micro_batch, start))
        start += sum(x.targets for item in micro_batch for x in item)
    denominators = dict(loss.denominators(items))
    sums: dict[str, float] = {}
    if loss.two_pass:
        with torch.no_grad():
            for micro_batch, at in parts:
                add(denominators, loss.first_pass(scores_of(micro_batch, parameter, at)))
    value = 0.0
    for micro_batch, at in parts:
        output = loss(scores_of(micro_batch, parameter, at), denominators)
        output.loss.backward()
        value += output.loss.item()
        add(sums, output.sums)
    assert parameter.grad is not None
    return value, parameter.grad, sums


def add(totals: dict[str, float], more: Mapping[str, float]) -> None:
    for key, amount in more.items():
        totals[key] = totals.get(key, 0.0) + amount


def direct(options: Mapping[str, Any], items: Sequence[Item]) -> tuple[float, Tensor]:
    """The formulas of the paper, sample by sample."""
    parameter = torch.tensor([0.7, -0.4], dtype=torch.float64, requires_grad=True)
    nll = scores_of(items, parameter, 0).nll
    samples: dict[str, list[Tensor]] = {}
    start = 0
    for x in (x for item in items for x in item if x.targets):
        samples.setdefault(x.task, []).append(nll[start : start + x.targets])
        start += x.targets
    mode, gamma = options["normalise"], options.get("gamma", 2.0)
    alpha = options.get("alpha", dict.fromkeys(TASKS, 1.0))
    weights = dict.fromkeys(samples, 1.0)
    if "balancer" in options:
        weights = {task: options["balancer"].weights(0)[task] for task in samples}

    def certainty(sample: Tensor) -> Tensor:
        return torch.exp(-sample).mean()

    def per_sample(task: str) -> Tensor:
        if options.get("focal") == "sample":
            return torch.stack([focal(certainty(s), gamma) for s in samples[task]])
        return torch.stack([s.mean() for s in samples[task]])

    def of_task(task: str) -> Tensor:
        if options.get("focal") == "task":
            mean = torch.stack([certainty(s) for s in samples[task]]).mean()
            return alpha[task] * -((1 - mean) ** gamma) * mean.log()
        if mode == "task-token":
            return torch.cat(samples[task]).mean()
        return per_sample(task).mean()

    if mode == "token":
        value = nll.mean()
    elif mode == "sample":
        value = torch.cat([per_sample(task) for task in samples]).mean()
    else:
        value = sum(weights[t] * of_task(t) for t in samples) / sum(weights.values())  # type: ignore[assignment]
    value.backward()
    assert parameter.grad is not None
    return value.item(), parameter.grad


examples = st.builds(example, st.sampled_from(TASKS), st.integers(0, 5))
steps = st.lists(st.lists(examples, min_size=1, max_size=2).map(tuple), min_size=1, max_size=8)


@pytest.mark.parametrize("options", MODES, ids=lambda mode: "-".join(mode) + mode["normalise"])
@settings(max_examples=40, deadline=None)
@given(items=steps, data=st.data())
def test_equals_the_formula_however_the_step_is_cut(
    options: dict[str, Any], items: list[Item], data: st.DataObject
) -> None:
    if not any(x.targets for item in items for x in item):
        return
    cuts = data.draw(st.lists(st.integers(0, len(items)), max_size=4))
    value, gradient, sums = step_loss(MultiTaskLoss(**options), items, cuts)
    expected, expected_gradient = direct(options, items)
    assert value == pytest.approx(expected, abs=1e-10)
    assert torch.allclose(gradient, expected_gradient, rtol=0, atol=1e-10)
    metrics = MultiTaskLoss(**options).metrics(sums)
    present = [task for task in TASKS if f"loss/{task}" in metrics]
    terms = [metrics[f"weight/{task}"] * metrics[f"loss/{task}"] for task in present]
    assert sum(terms) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(("mode", "plain"), [("task-token", "token"), ("task-sample", "sample")])
def test_with_one_task_the_task_modes_are_the_plain_ones(mode: Any, plain: Any) -> None:
    items = [(example("a", n),) for n in (1, 4, 2)]
    value, gradient, _ = step_loss(MultiTaskLoss(mode), items, [1])
    expected, expected_gradient, _ = step_loss(MultiTaskLoss(plain), items, [])
    assert value == pytest.approx(expected, abs=1e-12)
    assert torch.allclose(gradient, expected_gradient, rtol=0, atol=1e-12)


def test_focal_without_gamma_on_single_tokens_is_task_sample() -> None:
    items = [(example("a", 1),), (example("b", 1),), (example("a", 1),)]
    value, *_ = step_loss(MultiTaskLoss("task-sample", "sample", gamma=0.0), items, [2])
    assert value == pytest.approx(step_loss(MultiTaskLoss("task-sample"), items, [])[0])


def test_focal_passes_gradient_through_both_factors_and_bounds_the_logarithm() -> None:
    at = torch.tensor([0.3, 0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: focal(p, 2.0), at)
    assert focal(torch.tensor([0.0, 1.0]), 2.0).tolist() == pytest.approx([18.42068, 0.0])


def test_the_small_task_counts_as_much_as_the_large_one() -> None:
    """With equal losses per token, the gradient of a task's tokens sums to its share."""
    items = [(example("a", 30),), (example("b", 1),)]
    nll = torch.ones(31, dtype=torch.float64, requires_grad=True)
    item = torch.tensor([0] * 30 + [1])
    loss = MultiTaskLoss("task-token")
    output = loss(
        TokenScores(nll, item, torch.zeros(31, dtype=torch.int64), items), loss.denominators(items)
    )
    output.loss.backward()
    assert nll.grad is not None
    assert nll.grad[:30].sum() == pytest.approx(0.5)
    assert nll.grad[30] == pytest.approx(0.5)


def test_metrics_leave_absent_tasks_out_and_say_so() -> None:
    loss = MultiTaskLoss(balancer=Static(dict.fromkeys(TASKS, 1), dict.fromkeys(TASKS, 1.0)))
    _, _, sums = step_loss(loss, [(example("a", 2),), (example("c", 3), example("c", 0))], [])
    metrics = loss.metrics(sums)
    assert {t: metrics[f"present/{t}"] for t in TASKS} == {"a": 1.0, "b": 0.0, "c": 1.0}
    assert "loss/b" not in metrics and "nll/b" not in metrics
    assert metrics["weight/a"] == pytest.approx(0.5)
    assert metrics["untrained"] == 1
    assert loss.metrics({}) == {}


def test_a_step_without_anything_to_train_on_is_an_error() -> None:
    for options in MODES:
        with pytest.raises(DataError, match="no item of the step has a token to train on"):
            step_loss(MultiTaskLoss(**options), [(example("a", 0),)], [])


def test_a_micro_batch_without_trained_tokens_adds_nothing() -> None:
    for options in MODES:
        items = [(example("a", 2),), (example("b", 0),)]
        value, *_ = step_loss(MultiTaskLoss(**options), items, [1])
        assert value == pytest.approx(step_loss(MultiTaskLoss(**options), items[:1], [])[0])


def test_a_task_that_was_not_announced_is_refused() -> None:
    loss = MultiTaskLoss(balancer=Static({"copy": 1}, {"copy": 1}))
    with pytest.raises(DataError, match=r"task 'cpoy' \(did you mean 'copy'\?\)"):
        loss.denominators([(example("cpoy", 1),)])
    zero = MultiTaskLoss(balancer=Static({"a": 1, "b": 1}, {"a": 1, "b": 0}))
    with pytest.raises(DataError, match="all have weight 0"):
        step_loss(zero, [(example("b", 1),)], [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalise": "tokens"}, "did you mean 'token'"),
        ({"normalise": "task-sample", "focal": "samples"}, "focal must be one of"),
        ({"focal": "sample"}, "set normalise to sample or task-sample"),
        ({"normalise": "sample", "focal": "task"}, "set normalise to task-sample"),
        ({"normalise": "token", "balancer": "coba"}, "no task weights"),
        ({"normalise": "sample", "focal": "sample", "gamma": -1}, "gamma"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        MultiTaskLoss(**options)


def test_task_focal_without_its_first_pass_is_refused() -> None:
    items = [(example("a", 1),)]
    loss = MultiTaskLoss("task-sample", "task")
    with pytest.raises(TrainingError, match="run first_pass"):
        loss(scores_of(items, torch.ones(2, dtype=torch.float64), 0), loss.denominators(items))


def test_a_balancer_by_name_takes_tasks_and_sizes_from_the_data() -> None:
    items = [(example("a", 1),)] * 4 + [(example("b", 2),), (example("b", 0),)]
    loss = MultiTaskLoss(balancer="size-inverse")
    assert not any(isinstance(hook, BalanceHook) for hook in loss.hooks(items, []))
    assert loss.balancer is not None
    assert loss.balancer.weights(0) == pytest.approx({"a": 0.2, "b": 0.8})
    following = MultiTaskLoss(balancer={"name": "coba", "warmup": 7}, interval=3)
    assert any(isinstance(hook, BalanceHook) for hook in following.hooks(items, items))
    with pytest.raises(DataError, match="no validation rows"):
        MultiTaskLoss(balancer="coba").hooks(items, items[:1])
    with pytest.raises(ConfigurationError, match="warm"):
        MultiTaskLoss(balancer={"name": "coba", "warm": 7}).hooks(items, items)
    with pytest.raises(ConfigurationError, match="lacks the key 'name'"):
        MultiTaskLoss(balancer={"warmup": 7}).hooks(items, items)
    assert MultiTaskLoss().hooks(items, []) == ()
