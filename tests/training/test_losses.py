"""Causal and preference losses against closed forms and plain computations."""

import math
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from anabranch import registry
from anabranch.errors import ConfigurationError
from anabranch.training.errors import DataError, TrainingError
from anabranch.training.example import Example
from anabranch.training.language import LanguageObjective
from anabranch.training.losses.base import TokenScores
from anabranch.training.losses.causal import Causal
from anabranch.training.losses.preference import DPO, ORPO
from tests import tiny
from tests.training.helpers import pairs, sequences
from tests.training.test_language import plain_nll, step_gradients


def adapted(trained: bool):
    """A tiny Llama with a LoRA adapter: as initialised, or with random weights."""
    torch.manual_seed(0)
    model = tiny.llama()
    return get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=not trained)
    ).train()


def log_probabilities(model, items) -> torch.Tensor:
    """Of the answers ``[pairs, 2]``, by the plain forward."""
    return torch.stack([torch.stack([-plain_nll(model, e).sum() for e in pair]) for pair in items])


def margins(items) -> tuple[torch.Tensor, torch.Tensor]:
    """``lp - ref`` of chosen and rejected answers of a trained adapter."""
    with torch.no_grad():
        gain = log_probabilities(adapted(True), items) - log_probabilities(tiny.llama(), items)
    return gain[:, 0], gain[:, 1]


def test_all_are_registered():
    assert {"causal", "dpo", "orpo"} <= set(registry.available("losses"))


@pytest.mark.parametrize("budget", [80, 4096])
def test_causal_by_sample(budget):
    model, items = tiny.llama(), sequences(7)
    expected = torch.stack([plain_nll(model, e).mean() for (e,) in items]).mean()
    objective = LanguageObjective(Causal("sample"), micro_batch_tokens=budget)
    loss, _ = step_gradients(model, objective, items)
    assert loss == pytest.approx(expected.item(), abs=1e-6)


def test_causal_metrics():
    metrics = Causal().metrics({"nll": 6.0, "tokens": 3.0})
    assert metrics == {"nll": 2.0, "perplexity": pytest.approx(math.exp(2))}
    assert Causal().metrics({}) == {}


@pytest.mark.parametrize(
    ("loss", "at_start"),
    [
        (DPO(), math.log(2)),
        (DPO(label_smoothing=0.2), math.log(2)),
        (DPO(beta=0.5, variant="ipo"), 1.0),
        (DPO(variant="hinge"), 1.0),
    ],
)
def test_dpo_at_initialisation(loss, at_start):
    objective = LanguageObjective(loss)
    found, gradients = step_gradients(adapted(False), objective, pairs(4))
    assert found == pytest.approx(at_start, abs=1e-5)
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("budget", [64, 4096])
@pytest.mark.parametrize("variant", ["sigmoid", "ipo", "hinge", "smoothed"])
def test_dpo_equals_the_plain_computation(variant, budget):
    items, beta = pairs(5), 0.3
    chosen, rejected = margins(items)
    h = chosen - rejected
    expected = {
        "sigmoid": -torch.log(torch.sigmoid(beta * h)),
        "ipo": (h - 1 / (2 * beta)) ** 2,
        "hinge": (1 - beta * h).clamp(min=0),
        "smoothed": -0.9 * F.logsigmoid(beta * h) - 0.1 * F.logsigmoid(-beta * h),
    }[variant].mean()
    smoothing = 0.1 if variant == "smoothed" else 0.0
    loss = DPO(beta, "sigmoid" if variant == "smoothed" else variant, smoothing)
    objective = LanguageObjective(loss, micro_batch_tokens=budget)
    found, _ = step_gradients(adapted(True), objective, items)
    assert found == pytest.approx(expected.item(), rel=1e-4)


def test_dpo_metrics_and_gradient():
    items = pairs(5)
    chosen, rejected = margins(items)
    model, loss = adapted(True), DPO(0.1)
    objective = LanguageObjective(loss)
    (micro_batch,) = objective.plan(items)
    output = objective.loss(model, micro_batch, objective.denominators(items))
    metrics = objective.metrics(output.sums)
    assert metrics["accuracy"] == pytest.approx((chosen > rejected).float().mean().item())
    assert metrics["reward_margin"] == pytest.approx(0.1 * (chosen - rejected).mean().item(), 1e-4)
    output.loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    policy = log_probabilities(model, items)
    with torch.no_grad():
        reference = log_probabilities(tiny.llama(), items)
    gain = policy - reference
    (-F.logsigmoid(0.1 * (gain[:, 0] - gain[:, 1]))).mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_dpo_with_a_reference_model_of_its_own():
    items = pairs(3)
    model = tiny.llama().requires_grad_(True)
    with pytest.raises(TrainingError, match="pass a frozen copy as reference"):
        LanguageObjective(DPO()).check(model)
    objective = LanguageObjective(DPO(), reference=tiny.llama())
    objective.check(model)
    loss, _ = step_gradients(model, objective, items)
    assert loss == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("budget", [64, 4096])
def test_orpo_equals_the_plain_computation(budget):
    items = pairs(5)
    model = adapted(True)
    lengths = torch.tensor([[e.targets for e in pair] for pair in items])
    with torch.no_grad():
        sums = log_probabilities(model, items)
    p = torch.exp(sums.double() / lengths)
    odds = p / (1 - p)
    ratio = torch.log(odds[:, 0] / odds[:, 1])
    nll = -sums[:, 0].sum() / lengths[:, 0].sum()
    expected = nll + 0.4 * -F.logsigmoid(ratio).mean()
    objective = LanguageObjective(ORPO(0.4), micro_batch_tokens=budget)
    loss, _ = step_gradients(model, objective, items)
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_orpo_is_finite_for_certain_answers():
    nll = torch.tensor([0.0, 0.0, 40.0], requires_grad=True)
    example = Example([1, 2, 3], [False, True, True])
    scores = TokenScores(
        nll=nll,
        item=torch.zeros(3, dtype=torch.int64),
        example=torch.tensor([0, 0, 1]),
        items=[(example, Example([1, 2], [False, True]))],
    )
    output = ORPO()(scores, {"pairs": 1, "tokens": 2})
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert torch.isfinite(nll.grad).all()


@pytest.mark.parametrize("loss", [DPO(), ORPO()])
def test_items_must_be_pairs(loss):
    with pytest.raises(DataError, match=r"made:.* has 1 examples; a preference loss needs two"):
        loss.denominators(sequences(1))


@pytest.mark.parametrize(
    "values",
    [
        {"beta": 0.0},
        {"variant": "sigmoidal"},
        {"label_smoothing": 0.5},
        {"variant": "ipo", "label_smoothing": 0.1},
    ],
)
def test_impossible_dpo_options(values):
    with pytest.raises(ConfigurationError):
        DPO(**values)


def test_dpo_learns_to_prefer():
    items = pairs(6, seed=random.Random(3).randrange(100))
    model = adapted(False)
    objective = LanguageObjective(DPO(beta=0.5))
    objective.check(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(15):
        loss, _ = step_gradients(model, objective, items)
        optimizer.step()
    (micro_batch,) = objective.plan(items)
    with torch.no_grad():
        sums = objective.loss(model, micro_batch, objective.denominators(items)).sums
    assert objective.metrics(sums)["accuracy"] == 1.0
    assert loss < 0.2
