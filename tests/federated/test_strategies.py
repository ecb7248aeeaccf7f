"""The methods: what every method must do, and what each one is."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from anabranch import adapters, registry
from anabranch.errors import ConfigurationError
from anabranch.evaluation.testbeds import digits, tinyops
from anabranch.federated import (
    Buffered,
    DeviceProfile,
    Federation,
    Gossip,
    Graph,
    Simulation,
    Site,
    Sync,
    Tree,
    Work,
    splits,
)
from anabranch.federated.aggregation import Flag, Krum, Median
from anabranch.federated.client import ClientContext
from anabranch.federated.codecs import Chain, ErrorFeedback, Quantise, TopK
from anabranch.federated.errors import EmptyRound, FederationError
from anabranch.federated.gossip import Peer, Relay
from anabranch.federated.local import LocalTraining
from anabranch.federated.payload import decode, encode
from anabranch.federated.randomness import derive_seed, seeded
from anabranch.federated.shared import lent, load_shared, shared_tensors
from anabranch.federated.strategies import FedAdam, FedAvg, FedProx
from anabranch.federated.topologies import complete, metropolis
from anabranch.training.trainer import Trainer
from tests.federated.helpers import Tamper, assert_killed_ends_the_same

ALL = [
    pytest.param(cls, id=name)
    for name, cls in registry.available("strategies").items()
    if not cls.decentralised  # those have a contract of their own
]


SLOW = ("fedkseed", "fedkseed-pro", "just-one-byte", "fedex")
"""Two losses say less than a gradient, plain SGD is slow on a fresh LoRA: they need more steps."""
ROUNDS_ONLY = ("fedex",)
"""These refuse late updates."""


def split(clients=4, examples=160):
    labels = digits.images()[0].labels[:examples].tolist()
    return splits.dirichlet(labels, clients, 0.5, min_size=10)


def places(clients=4):
    profiles = [DeviceProfile(0.1 * (1 + i), 1e5, 1e5) for i in range(clients)]
    return digits.sites(split(clients), profiles)


def trained(federation):
    federation.run()
    return torch.cat([t.reshape(-1) for t in federation.server.tensors.values()])


def network_for(cls):
    """The perceptron, with the adapter that the method is for."""
    if not cls.adapter:
        return digits.perceptron()
    torch.manual_seed(0)
    return adapters.build(cls.adapter, digits.perceptron(), r=8, target_modules=["0", "2"])


@pytest.mark.parametrize("cls", ALL)
class TestEveryStrategy:
    """A contract: a new method is here as soon as it is registered."""

    def test_learns_something_with_its_defaults(self, cls):
        model = network_for(cls)
        rounds = 60 if cls.name in SLOW else 15
        federation = cls().simulate(
            model, digits.local(), places(), rounds=rounds, watch=digits.watch(model)
        )
        history = federation.run().history
        assert history[-1]["accuracy"] > history[0]["accuracy"] + 0.2
        assert history[-1]["loss"] < history[0]["loss"]

    def test_does_not_depend_on_the_order_in_which_clients_run(self, cls):
        def run(order):
            model = network_for(cls)
            made = cls().simulate(model, digits.local(steps=3), places(), rounds=2)
            made.runtime.order = order
            return trained(made)

        assert torch.equal(run(None), run(lambda tasks: tasks[::-1]))

    def test_leaves_the_simulated_model_as_it_was(self, cls):
        model = network_for(cls)
        before = copy.deepcopy(model.state_dict())
        cls().simulate(model, digits.local(steps=2), places(), rounds=2).run()
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    def test_without_a_barrier_with_a_codec_and_in_a_tree(self, cls):
        model, local = network_for(cls), digits.local(steps=3)
        codec = ErrorFeedback(Chain([TopK(0.2), Quantise(8)]))
        names = [site.name for site in places()]
        without = {"schedule": Buffered(4, 2)}
        if cls.name in ROUNDS_ONLY:
            with pytest.raises(ConfigurationError, match="without a barrier"):
                trained(cls().simulate(model, local, places(), **without))
            without = {"rounds": 2}
        for options in (
            without,
            {"rounds": 2, "codec": codec},
            {"rounds": 2, "topology": Tree.balanced(names, 2)},
        ):
            assert trained(cls().simulate(model, local, places(), **options)).isfinite().all()

    def test_is_listed_with_a_summary(self, cls):
        assert registry.summary(cls).endswith(".")


def test_one_client_with_all_data_trains_as_the_trainer_does_bit_for_bit():
    local, items = digits.local(steps=25, optimizer="adamw", lr=0.01), list(range(200))
    federated = FedAvg(upload="weights").simulate(digits.perceptron(), local, [Site("a", items)])
    federated.run()
    model = digits.perceptron()
    seed = derive_seed(0, "client", "a", 1)
    trainer = Trainer(model, local.objective, local.for_task(Work(), seed), items)
    for _ in range(25):
        trainer.step(trainer.next_items())
    for name, parameter in model.named_parameters():
        assert torch.equal(federated.server.tensors[name], parameter), name


def test_identical_clients_are_one_client():
    class SameSeed(LocalTraining):
        def for_task(self, work, seed):
            return super().for_task(work, 1)

    local = digits.local(steps=5)
    local = SameSeed(local.objective, local.options)
    items = list(range(100))
    for upload in ("weights", "delta"):
        strategy = FedAvg(upload=upload)
        one = strategy.simulate(digits.perceptron(), local, [Site("a", items)], rounds=3)
        many = strategy.simulate(
            digits.perceptron(), local, [Site(name, items) for name in "abcde"], rounds=3
        )
        assert torch.equal(trained(one), trained(many))


def test_the_average_is_weighted_by_examples():
    sites = [Site("a", list(range(30))), Site("b", list(range(30, 40)))]
    local = digits.local(steps=4)
    start = shared_tensors(digits.perceptron())

    def alone(site):
        made = FedAvg(upload="weights").simulate(digits.perceptron(), local, [site])
        made.runtime.sites = {site.name: site}
        # The task's number decides the seed: b is the second in the joint run.
        made.coordinator.state.next_task = 1 if site.name == "a" else 2
        made.run()
        return made.server.tensors

    a, b = map(alone, sites)
    for weighting, share in (("examples", 0.75), ("uniform", 0.5)):
        joint = FedAvg(weighting=weighting).simulate(digits.perceptron(), local, sites)
        joint.run()
        for name in start:
            expected = a[name] * share + b[name] * (1 - share)
            assert torch.allclose(joint.server.tensors[name], expected, atol=1e-6)


def test_server_rate_multiplies_the_change():
    start = torch.cat([t.reshape(-1) for t in shared_tensors(digits.perceptron()).values()])
    local = digits.local(steps=2)
    whole = trained(FedAvg().simulate(digits.perceptron(), local, places()))
    for upload in ("delta", "weights"):
        strategy = FedAvg(upload=upload, server_lr=0.5)
        half = trained(strategy.simulate(digits.perceptron(), local, places()))
        assert torch.allclose(half - start, 0.5 * (whole - start), atol=1e-6)


@pytest.mark.parametrize("upload", ["delta", "weights"])
def test_momentum_by_hand(upload):
    start = shared_tensors(digits.perceptron())
    strategy = FedAvg(upload=upload, server_lr=0.5, momentum=0.9)
    federation = strategy.simulate(digits.perceptron(), digits.local(steps=2), places(), rounds=4)
    changes, step = [], federation.server.step

    def spy(change):
        changes.append(change)
        return step(change)

    federation.server.step = spy
    federation.run()
    x, velocity = start, dict.fromkeys(start, 0.0)
    for change in changes:
        velocity = {name: 0.9 * v + 0.5 * change[name] for name, v in velocity.items()}
        x = {name: value + velocity[name] for name, value in x.items()}
    assert len(changes) == 4
    for name, tensor in federation.server.tensors.items():
        assert torch.allclose(tensor, x[name], atol=1e-6)


def test_momentum_survives_being_killed(tmp_path):
    def make(store):
        return FedAvg(momentum=0.9).simulate(
            digits.perceptron(), digits.local(steps=2), places(), rounds=3, store=store
        )

    assert_killed_ends_the_same(make, tmp_path, (6, 9))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: FedAvg(momentum=1.0), "not 1.0"),
        (lambda: FedAvg(momentum=-0.1), "not -0.1"),
        (lambda: FedAdam(momentum=0.9), "it is beta1"),
    ],
)
def test_momentum_that_cannot_work(make, says):
    with pytest.raises(ConfigurationError, match=says):
        make()


def test_old_updates_count_less():
    sites = [
        Site("fast", list(range(40)), DeviceProfile(0.01)),
        Site("slow", list(range(40, 80)), DeviceProfile(0.1)),
    ]
    options = {"schedule": Buffered(12, 1)}

    def run(staleness):
        federation = FedAvg(staleness=staleness).simulate(
            digits.perceptron(), digits.local(steps=3), sites, **options
        )
        norms = []
        step = federation.server.step

        def spy(change):
            norms.append(float(sum(c.square().sum() for c in change.values()).sqrt()))
            return step(change)

        federation.server.step = spy
        federation.run()
        return norms

    plain, damped = run(0.0), run(0.5)
    assert plain[:9] == damped[:9]
    slow = next(i for i, (a, b) in enumerate(zip(plain, damped, strict=True)) if a != b)
    assert damped[slow] == pytest.approx(plain[slow] * (1 + slow) ** -0.5, rel=1e-4)


def test_late_weights_are_refused():
    strategy = FedAvg(upload="weights")
    federation = strategy.simulate(
        digits.perceptron(), digits.local(steps=1), places(), schedule=Buffered(4, 1)
    )
    with pytest.raises(ConfigurationError, match="use upload=delta"):
        federation.run()


def test_fedprox_with_mu_zero_is_fedavg_and_pulls_otherwise():
    def run(strategy):
        return trained(strategy.simulate(digits.perceptron(), digits.local(), places(), rounds=2))

    start = torch.cat([t.reshape(-1) for t in shared_tensors(digits.perceptron()).values()])
    average = run(FedAvg())
    assert torch.equal(run(FedProx(mu=0.0)), average)
    distances = [float((run(FedProx(mu=mu)) - start).norm()) for mu in (0.01, 1.0, 5.0)]
    assert float((average - start).norm()) > distances[0] > distances[1] > distances[2]


def test_fedprox_steps_follow_the_gradient_of_loss_plus_proximal_term():
    """Against autograd on the written-out objective."""
    mu, lr, items = 0.3, 0.1, list(range(32))
    local = digits.local(lr=lr, batch=32, steps=6)
    federation = FedProx(mu=mu, upload="weights").simulate(
        digits.perceptron(), local, [Site("a", items)]
    )
    federation.run()
    model = digits.perceptron()
    start = shared_tensors(model)
    for _ in range(6):
        loss = local.objective.loss(model, torch.tensor(items), {"images": 32}).loss
        for name, parameter in model.named_parameters():
            loss = loss + mu / 2 * (parameter - start[name]).square().sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= lr * gradient
    for name, parameter in model.named_parameters():
        assert torch.allclose(federation.server.tensors[name], parameter, atol=1e-5)


def test_fedadam_by_hand():
    options = {"server_lr": 0.05, "beta1": 0.8, "beta2": 0.9, "tau": 0.01}
    start = {"w": torch.tensor([1.0, -2.0, 0.0])}
    server = FedAdam(**options).server(start)
    x, m, v = np.array([1.0, -2.0, 0.0]), np.zeros(3), np.full(3, 0.01**2)
    for step in range(5):
        change = np.array([0.1 * step, -0.2, 0.0])
        server.tensors = server.step({"w": torch.from_numpy(change).float()})
        m = 0.8 * m + 0.2 * change
        v = 0.9 * v + 0.1 * change**2
        x = x + 0.05 * m / (np.sqrt(v) + 0.01)
    assert np.allclose(server.tensors["w"], x, atol=1e-6)


@pytest.mark.parametrize("rule", [Median(), Krum(1), Flag()], ids=lambda rule: rule.name)
def test_robust_rules_withstand_a_client_that_lies(rule):
    """One of five sends the opposite, a hundred times as large."""

    def opposite(task, reply):
        payload = {name: -100 * value for name, value in decode(reply.body).items()}
        return [dataclasses.replace(reply, body=encode(payload))]

    images = digits.images()[0]
    parts = splits.iid(len(images.labels), 5)

    def accuracy(rule):
        model = digits.perceptron()
        federation = FedAvg(rule=rule).simulate(
            model, digits.local(), digits.sites(parts), rounds=12, watch=digits.watch(model)
        )
        federation.runtime.faults = Tamper({("client-3", n): opposite for n in range(1, 13)})
        return federation.run().metrics

    robust, fooled = accuracy(rule), accuracy(None)
    assert robust["accuracy"] > 0.75 > 0.4 > fooled["accuracy"]
    scores = {name: value for name, value in robust.items() if name.startswith("quality/")}
    if rule.name == "krum":
        assert min(scores, key=scores.__getitem__) == "quality/client-3"


def test_one_method_by_barrier_without_in_a_tree_and_by_gossip():
    """With everyone joined to everyone, gossip is federated averaging."""
    sites = [Site(f"c{i}", list(range(40 * i, 40 * i + 40))) for i in range(4)]
    names = [site.name for site in sites]
    strategy, local = FedAvg(), digits.local(steps=4)
    star = trained(strategy.simulate(digits.perceptron(), local, sites))
    tree = strategy.simulate(digits.perceptron(), local, sites, topology=Tree.balanced(names, 2))
    assert torch.allclose(trained(tree), star, atol=1e-7)
    late = strategy.simulate(digits.perceptron(), local, sites, schedule=Buffered(1, 4))
    assert torch.equal(trained(late), star)
    gossip = Federation(
        Relay(),
        Peer(strategy.client(local)),
        Gossip(1),
        Simulation(sites, digits.perceptron()),
        topology=Graph(names, metropolis(complete(4))),
    )
    gossip.run()
    for name in names:
        own = gossip.runtime.node(name).state["own"]
        assert torch.allclose(torch.cat([t.reshape(-1) for t in own.values()]), star, atol=1e-6)


def test_clients_without_data_are_ignored_and_all_without_is_an_empty_round():
    sites = [Site("a", list(range(30))), Site("b", [])]
    for weighting in ("examples", "uniform"):
        strategy = FedAvg(weighting=weighting)
        alone = strategy.simulate(digits.perceptron(), digits.local(steps=2), sites[:1])
        both = strategy.simulate(digits.perceptron(), digits.local(steps=2), sites)
        assert torch.equal(trained(alone), trained(both))
        nobody = strategy.simulate(digits.perceptron(), digits.local(steps=2), sites[1:])
        with pytest.raises(EmptyRound):
            nobody.run()


def test_messages_are_the_shared_tensors_and_no_more():
    model = digits.perceptron()
    federation = FedAvg().simulate(model, digits.local(steps=1), places(), rounds=2)
    result = federation.run()
    body = len(encode(shared_tensors(model)))
    assert 4 * 4810 < body < 4 * 4810 + 150
    assert result.ledger.total().payload == 2 * 2 * 4 * body


def test_a_task_says_how_much_to_do():
    seen = []

    class Counting(LocalTraining):
        def run(self, ctx, start, hooks=()):
            result = super().run(ctx, start, hooks)
            seen.append((ctx.work, result.steps))
            return result

    local = digits.local()
    local = Counting(local.objective, local.options)
    for work, steps in (
        (Work(), 10),
        (Work(steps=3), 3),
        (Work(epochs=2.0), 6),
        (Work(epochs=1.0, batch_size=10), 4),
    ):
        schedule = Sync(1, work=work)
        site = Site("a", list(range(40)), DeviceProfile(1.0))
        result = FedAvg().simulate(digits.perceptron(), local, [site], schedule=schedule).run()
        assert seen[-1] == (work, steps) and result.seconds == steps


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (FedAvg, {"upload": "gradients"}),
        (FedAvg, {"weighting": "loss"}),
        (FedAvg, {"server_lr": 0.0}),
        (FedAvg, {"staleness": -1.0}),
        (FedAvg, {"rule": Flag(), "upload": "weights"}),
        (FedProx, {"mu": -0.1}),
        (FedAdam, {"beta1": 1.0}),
        (FedAdam, {"tau": 0.0}),
    ],
)
def test_options_that_cannot_work(cls, options):
    with pytest.raises(ConfigurationError):
        cls(**options)


def test_lending_a_model_gives_it_back_whatever_happens():
    model = digits.perceptron()
    before = shared_tensors(model)
    other = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    with pytest.raises(RuntimeError), lent(model, other):
        assert not any(p.any() for p in model.parameters())
        raise RuntimeError
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    with pytest.raises(FederationError, match="absent in the model here"):
        load_shared(model, {"nothing": torch.ones(1)})
    with pytest.raises(FederationError, match="nothing to share"):
        shared_tensors(digits.perceptron().requires_grad_(False))


def test_running_means_of_one_site_never_reach_the_next():
    model = torch.nn.Sequential(torch.nn.Linear(64, 10), torch.nn.BatchNorm1d(10)).eval()
    before = copy.deepcopy(model.state_dict())

    def run(order):
        made = FedAvg().simulate(model, digits.local(steps=3), places(), rounds=2)
        made.runtime.order = order
        return trained(made)

    assert torch.equal(run(None), run(lambda tasks: tasks[::-1]))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())


# A language model with an adapter


def lora(seed=0):
    with seeded(seed):
        return adapters.build(
            "lora", tinyops.network(), r=4, lora_alpha=8, target_modules="all-linear"
        )


def language_sites(examples=32):
    return [Site(f"c{i}", tinyops.items(4 + i % 4, examples, "train", i)) for i in range(4)]


def test_adapters_are_federated_and_the_base_stays_at_home():
    model = lora()
    local = LocalTraining(tinyops.objective(), tinyops.training_options(steps=4, batch=8))
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = tinyops.score(model)
    federation = FedAvg().simulate(model, local, language_sites(), rounds=4)
    result = federation.run()
    assert all("lora_" in name for name in federation.server.tensors)
    assert all(torch.equal(base[n], p) for n, p in model.named_parameters() if n in base)
    adapter = sum(t.numel() for t in federation.server.tensors.values())
    assert result.ledger.total(direction="up", version=0).payload < 4 * (4 * adapter + 4000)
    with lent(model, federation.server.tensors):
        assert tinyops.score(model)["loss"] < before["loss"] - 0.1


def test_a_federated_adapter_step_is_the_trainers():
    items = language_sites()[0].data
    local = LocalTraining(tinyops.objective(), tinyops.training_options(steps=3, batch=8))
    federation = FedAvg(upload="weights").simulate(lora(), local, [Site("a", items)])
    federation.run()
    model, seed = lora(), derive_seed(0, "client", "a", 1)
    trainer = Trainer(model, local.objective, local.for_task(Work(), seed), items)
    for _ in range(3):
        trainer.step(trainer.next_items())
    for name, tensor in federation.server.tensors.items():
        assert torch.equal(tensor, model.get_parameter(name)), name


def test_a_site_context_is_its_own():
    ctx = ClientContext("a", [], None, 1, "train", 0, Work(), 0, {}, {}, 5, lambda b, k: {})
    assert ctx.rng.random() == np.random.default_rng(5).random()
    ctx.spend(2)
    ctx.spend(0.5)
    ctx.report(loss=1.0)
    assert (ctx.units, ctx.metrics) == (2.5, {"loss": 1.0})
