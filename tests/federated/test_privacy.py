"""Private steps against explicit loops and Opacus, and what happens when the budget is out."""

from __future__ import annotations

import copy
import math
import sys

import pytest
import torch
from opacus.accountants import RDPAccountant
from opacus.optimizers import DPOptimizer

from anabranch import adapters
from anabranch.errors import ConfigurationError, MissingExtra
from anabranch.evaluation.testbeds import digits
from anabranch.federated import Federation, Simulation, Site, Sync
from anabranch.federated.errors import AggregationError
from anabranch.federated.local import LocalTraining
from anabranch.federated.shared import shared_tensors
from anabranch.federated.strategies import FedAvg, FedKSeed, FedProx, Scaffold
from anabranch.federated.strategies.fed_sb import FedSB
from anabranch.federated.strategies.fedit import FedIT
from anabranch.training import private_gradients
from anabranch.training.example import Example
from anabranch.training.privacy import (
    Privacy,
    PrivacyAccount,
    PrivacyBudgetExceeded,
    noise_for,
)
from anabranch.training.private_gradients import clipped_gradients, private_steps
from anabranch.training.trainer import Trainer
from tests import tiny
from tests.federated.adapted import items, local, lora, same, sites
from tests.federated.helpers import assert_killed_ends_the_same


def perturbed(model):
    """B is not zero, so that A has gradients, too."""
    with torch.no_grad():
        for index, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            generator = torch.Generator().manual_seed(index)
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def networks():
    yield "lora", perturbed(lora(target_modules="all-linear"))
    sb = adapters.build("lora_sb", tiny.llama(), r=6, target_modules=["q_proj", "v_proj"])
    yield "lora_sb", perturbed(sb)


def trainer_of(model, data, **options):
    training = local(**options)
    return Trainer(model, training.objective, training.options, data)


def mixed_items():
    """Sequences of different lengths, packed in other ways without privacy."""
    return items(5, 1, length=8) + items(3, 2, length=14) + items(3, 3, length=6)


@pytest.mark.parametrize("name", ["lora", "lora_sb"])
def test_gradients_in_one_pass_are_those_of_one_example_at_a_time(name, monkeypatch):
    trainer = trainer_of(dict(networks())[name], mixed_items())
    assert private_gradients._batched(trainer, trainer.items) is not None
    at_once = clipped_gradients(trainer, trainer.items, 0.7)
    monkeypatch.setattr(private_gradients, "_batched", lambda trainer, items: None)
    loop = clipped_gradients(trainer, trainer.items, 0.7)
    assert at_once.clipped == loop.clipped
    for key, tensor in at_once.sums.items():
        torch.testing.assert_close(tensor, loop.sums[key], rtol=1e-4, atol=1e-6)
    assert not any(hasattr(p, "grad_sample") for p in trainer.model.parameters())


def test_gradients_are_clipped_one_by_one():
    """Against autograd on each example, written out."""
    model = perturbed(lora())
    data = mixed_items()
    trainer = trainer_of(model, data)
    found = clipped_gradients(trainer, data, 0.05)
    expected = {name: torch.zeros_like(p) for name, p in trainer.trainable.items()}
    for (example,) in data:
        tokens = torch.tensor([example.tokens])
        logits = model(input_ids=tokens).logits[0, :-1]
        picked = [i for i, trained in enumerate(example.trained[1:]) if trained]
        loss = torch.nn.functional.cross_entropy(logits[picked], tokens[0, 1:][picked])
        gradients = torch.autograd.grad(loss, list(trainer.trainable.values()))
        norm = torch.sqrt(sum(g.square().sum() for g in gradients))
        for name, gradient in zip(trainer.trainable, gradients, strict=True):
            expected[name] += gradient * min(1.0, 0.05 / float(norm))
    for name, tensor in expected.items():
        torch.testing.assert_close(found.sums[name], tensor, rtol=1e-3, atol=1e-6)


def test_a_weight_that_no_hook_knows_falls_back_to_the_loop():
    model = tiny.llama().requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    trainer = trainer_of(model, items(3))
    assert private_gradients._batched(trainer, trainer.items) is None
    assert clipped_gradients(trainer, trainer.items, 1e-3).clipped == 3


def test_an_example_without_a_finite_gradient_is_left_out(monkeypatch):
    model, data = perturbed(lora()), items(6, 1)
    tokens = data[0][0].tokens
    unused = next(i for i in range(256) if not any(i in item[0].tokens for item in data))
    spoilt = (Example((unused, *tokens[1:]), data[0][0].trained, "noise"),)
    with torch.no_grad():
        model.get_input_embeddings().weight[unused] = math.nan
    trainer = trainer_of(model, [spoilt, *data])
    for batched in (True, False):
        if not batched:
            monkeypatch.setattr(private_gradients, "_batched", lambda trainer, items: None)
        found = clipped_gradients(trainer, [spoilt, *data], 0.5)
        clean = clipped_gradients(trainer, data, 0.5)
        for name, tensor in found.sums.items():
            torch.testing.assert_close(tensor, clean.sums[name], rtol=1e-4, atol=1e-6)
            assert tensor.isfinite().all()


def test_the_extra_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus", None)
    account = PrivacyAccount(Privacy(1e-4, 1.0, noise=7.77), {}, 500)
    with pytest.raises(MissingExtra, match=r"anabranch\[privacy\]"):
        account.charge(7.77, 1 / 16, 10)


def test_without_noise_and_with_a_wide_clip_it_is_ordinary_training():
    data = items(8)
    plain = trainer_of(lora(), data, batch=8, steps=3, optimizer="sgd", lr=0.5)
    for _ in range(3):
        plain.step(plain.next_items())
    private = trainer_of(lora(), data, batch=8, steps=3, optimizer="sgd", lr=0.5)
    account = PrivacyAccount(Privacy(1e-3, 1e6, noise=0.0, seed=0), {}, 8)
    assert private_steps(private, account, "task") == math.inf
    for name, tensor in shared_tensors(plain.model).items():
        torch.testing.assert_close(
            shared_tensors(private.model)[name], tensor, rtol=1e-4, atol=1e-6
        )


def test_the_step_is_opacus_step():
    """Opacus' own optimiser on the same gradients, without noise."""
    data = items(6)
    trainer = trainer_of(perturbed(lora()), data, batch=6, steps=1, optimizer="sgd", lr=0.1)
    twin = copy.deepcopy(trainer.model)
    account = PrivacyAccount(Privacy(1e-3, 0.05, noise=0.0, seed=0), {}, 6)
    private_steps(trainer, account, "task")
    theirs = trainer_of(twin, data, batch=6, steps=1, optimizer="sgd", lr=0.1)
    rows = []
    for item in data:
        theirs.optimizer.zero_grad(set_to_none=True)
        theirs._accumulate_gradients([item])
        rows.append({n: p.grad.clone() for n, p in theirs.trainable.items()})
    optimizer = DPOptimizer(
        torch.optim.SGD(theirs.trainable.values(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=0.05,
        expected_batch_size=6,
    )
    for name, parameter in theirs.trainable.items():
        parameter.grad_sample = torch.stack([row[name] for row in rows])
    optimizer.step()
    for name, tensor in shared_tensors(twin).items():
        ours = shared_tensors(trainer.model)[name]
        torch.testing.assert_close(ours, tensor, rtol=1e-4, atol=1e-6)


def test_noise_has_the_size_that_was_asked():
    model = perturbed(lora(target_modules="all-linear"))
    before = shared_tensors(model)
    trainer = trainer_of(model, items(100), batch=1, steps=1, optimizer="sgd", lr=1.0)
    account = PrivacyAccount(Privacy(1e-3, 1e-9, noise=2e9, seed=3), {}, 100)
    private_steps(trainer, account, "task")  # gradients count for nothing beside noise of 2
    moved = torch.cat([(shared_tensors(model)[n] - t).flatten() for n, t in before.items()])
    assert float(moved.std()) == pytest.approx(2.0, rel=0.03)
    assert abs(float(moved.mean())) < 0.1


def test_batches_are_drawn_by_chance():
    trainer = trainer_of(lora(), items(40), batch=4, steps=60)
    sizes = []
    original = private_gradients.clipped_gradients

    def note(trainer, chosen, clip):
        sizes.append(len(chosen))
        return original(trainer, chosen[:0], clip)

    private_gradients.clipped_gradients = note
    try:
        account = PrivacyAccount(Privacy(1e-3, 1.0, noise=1.0, seed=0), {}, 40)
        private_steps(trainer, account, "task")
    finally:
        private_gradients.clipped_gradients = original
    mean, variance = (
        torch.tensor(sizes, dtype=torch.float64).mean(),
        torch.tensor(sizes).double().var(),
    )
    assert float(mean) == pytest.approx(4, abs=1) and float(variance) == pytest.approx(3.6, abs=2)
    assert 0 in sizes, "an empty batch is a step of noise"


def test_epsilon_is_opacus():
    state = {}
    account = PrivacyAccount(Privacy(1e-4, 1.0, noise=1.3), state, 500)
    theirs = RDPAccountant()
    for _ in range(7):
        account.charge(1.3, 1 / 16, 10)
        for _ in range(10):
            theirs.step(noise_multiplier=1.3, sample_rate=1 / 16)
    account.charge(0.9, 1 / 4, 1)
    theirs.step(noise_multiplier=0.9, sample_rate=1 / 4)
    assert account.epsilon() == theirs.get_epsilon(1e-4)
    assert state["history"] == [[1.3, 1 / 16, 70], [0.9, 1 / 4, 1]]
    assert PrivacyAccount(account.privacy, state, 500).epsilon() == account.epsilon()


def test_noise_follows_from_the_budget():
    privacy = Privacy(1e-4, 1.0, epsilon=2.0, tasks=6)
    noise = noise_for(privacy, 1 / 16, 60)
    account = PrivacyAccount(privacy, {}, 500)
    assert account.noise(1 / 16, 10) == noise
    assert 1.97 < account.charge(noise, 1 / 16, 60) <= 2.0
    with pytest.raises(PrivacyBudgetExceeded, match=r"1 more steps .* the budget is 2, of which"):
        account.charge(noise, 1 / 16, 1)
    assert account.history == [[noise, 1 / 16, 60]]


def test_secrets_differ_and_seeds_repeat():
    privacy = Privacy(1e-3, 1.0, noise=1.0)
    states = [{}, {}]
    drawn = [
        torch.randn(3, generator=PrivacyAccount(privacy, state, 9).generator("a", 1))
        for state in states
    ]
    assert not torch.equal(*drawn)
    again = PrivacyAccount(privacy, states[0], 9).generator("a", 1)
    assert torch.equal(torch.randn(3, generator=again), drawn[0])
    seeded = Privacy(1e-3, 1.0, noise=1.0, seed=4)
    two = [PrivacyAccount(seeded, {}, 9).generator("a", word) for word in (1, 1, 2)]
    numbers = [float(torch.randn((), generator=g)) for g in two]
    assert numbers[0] == numbers[1] != numbers[2]


def private(epsilon=None, noise=1.0, tasks=None, clip=0.5, delta=1e-3, **options):
    training = local(**options)
    privacy = Privacy(delta, clip, epsilon, noise, tasks, seed=5)
    return LocalTraining(training.objective, training.options, privacy)


def simulate(strategy, training, places=None, rounds=3, model=None, **options):
    return strategy.simulate(
        model or lora(), training, places or sites(3, 16), rounds=rounds, **options
    )


@pytest.mark.parametrize("strategy", [FedAvg(), FedIT(), FedProx(0.1)], ids=lambda s: s.name)
def test_a_private_federation_keeps_accounts(strategy):
    federation = simulate(strategy, private())
    result = federation.run()
    theirs = RDPAccountant()
    for _ in range(3 * 2):
        theirs.step(noise_multiplier=1.0, sample_rate=4 / 16)
    assert result.metrics["epsilon/c1"] == theirs.get_epsilon(1e-3)
    assert "loss" not in result.metrics, "a loss is not private"
    assert federation.runtime.node("c1").state["privacy"]["history"] == [[1.0, 0.25, 6]]


def test_fed_sb_charges_its_first_gradient():
    model = adapters.build("lora_sb", tiny.llama(), r=6, target_modules=["q_proj", "v_proj"])
    federation = simulate(FedSB(), private(), model=model)
    federation.run()
    # One step for the gradient, two rounds of two steps.
    assert federation.runtime.node("c0").state["privacy"]["history"] == [[1.0, 0.25, 5]]


def test_accounts_survive_being_killed(tmp_path):
    assert_killed_ends_the_same(
        lambda store: simulate(FedIT(), private(), store=store), tmp_path, (1, 4, 7)
    )


def test_whoever_has_spent_its_budget_refuses_and_others_go_on():
    # Fewer examples are drawn more often: c0 is through first.
    places = [Site("c0", items(5, 0)), Site("c1", items(100, 1))]
    account = PrivacyAccount(Privacy(1e-3, 0.5, noise=1.0), {}, 5)
    budget = account.charge(1.0, 4 / 5, 5)
    federation = simulate(FedAvg(), private(epsilon=budget), places, rounds=4)
    result = federation.run()
    assert result.version == 4
    refused = [i for i in result.incidents if i.what == "failed" and i.client == "c0"]
    assert len(refused) == 1 and refused[0].count == 2
    assert "PrivacyBudgetExceeded: 2 more steps would reveal" in refused[0].message
    assert federation.runtime.node("c0").state["privacy"]["history"] == [[1.0, 0.8, 4]]


def test_a_run_within_its_budget():
    result = simulate(FedAvg(), private(epsilon=3.0, noise=None, tasks=3)).run()
    assert 2.9 < result.metrics["epsilon/c0"] <= 3.0


def test_delta_that_would_allow_to_reveal_an_example():
    federation = simulate(FedAvg(), private(delta=0.1), rounds=1, patience=0)
    with pytest.raises(AggregationError, match=r"delta=0\.1 is not below one over the site's 16"):
        federation.run()


@pytest.mark.parametrize("strategy", [FedKSeed(), Scaffold()], ids=lambda s: s.name)
def test_methods_that_say_more_are_refused(strategy):
    with pytest.raises(ConfigurationError, match=f"{strategy.name} is not private"):
        strategy.simulate(digits.perceptron(), private(), [Site("a", [0, 1])])


def test_classifiers_are_private_too():
    training = digits.local(batch=16, steps=20)
    training = LocalTraining(
        training.objective, training.options, Privacy(1e-3, 1.0, noise=0.6, seed=0)
    )
    model = digits.perceptron()
    federation = Federation(
        FedAvg().begin(model),
        FedAvg().client(training),
        Sync(8),
        Simulation([Site("a", list(range(300)))], model),
        watch=digits.watch(model),
    )
    assert federation.run().metrics["accuracy"] > 0.4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"delta": 0.0}, "delta is between"),
        ({"clip": 0.0}, "clip is above 0"),
        ({"epsilon": -1.0}, "epsilon is above 0"),
        ({"noise": -1.0}, "noise is at least 0"),
        ({"noise": None}, "give noise, or epsilon and the number of tasks"),
        ({"noise": None, "epsilon": 1.0}, "give noise, or epsilon and the number of tasks"),
        ({"noise": 0.0, "epsilon": 1.0}, "without noise there is no epsilon"),
    ],
)
def test_promises_are_checked(options, says):
    with pytest.raises(ConfigurationError, match=says):
        Privacy(**{"delta": 1e-3, "clip": 1.0, "noise": 1.0, **options})


def test_budgets_out_of_reach():
    with pytest.raises(ConfigurationError, match=r"no noise keeps epsilon 0\.0001"):
        noise_for(Privacy(1e-9, 1.0, epsilon=1e-4, tasks=1), 1.0, 10**6)


def test_half_precision_is_refused():
    trainer = trainer_of(lora(), items(4), precision="fp16")
    account = PrivacyAccount(Privacy(1e-3, 1.0, noise=1.0), {}, 4)
    with pytest.raises(Exception, match="fp32 or bf16"):
        private_steps(trainer, account)
    assert same(shared_tensors(trainer.model), shared_tensors(lora()))
