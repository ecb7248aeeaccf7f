"""FedAMD against its written-out algorithm, and the mean of what is kept."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from anabranch.errors import ConfigurationError
from anabranch.evaluation.testbeds import digits
from anabranch.federated import DeviceProfile, Site, Sync, splits
from anabranch.federated.errors import EmptyRound
from anabranch.federated.payload import decode, encode
from anabranch.federated.strategies import FedAvg
from anabranch.federated.strategies.fedamd import FedAMD
from tests.federated.helpers import Tamper, lost
from tests.federated.quadratics import InTurn, Point, bowls, gradient, local, places, position
from tests.federated.test_momentum_methods import RATE, STEPS, run


def by_hand(made, rounds, anchors, steps=STEPS, server_lr=1.0, sizes=None):
    """Algorithm 1 in float64, everyone first; ``anchors(round, client)`` says who is one."""
    sizes = np.ones(len(made)) if sizes is None else np.array(sizes)
    x = np.zeros(len(made[0].target))
    kept = [bowl.gradient(x) for bowl in made]
    for number, chosen in enumerate(rounds, 1):
        target = np.average(kept, axis=0, weights=sizes)
        changes, miners, fresh = [], [], {}
        for i in chosen:
            if anchors(number, i):
                fresh[i] = made[i].gradient(x)
                continue
            y = before = x
            g = target
            for _ in range(steps):
                g = g + made[i].gradient(y) - made[i].gradient(before)
                before, y = y, y - RATE * g
            changes.append(y - x)
            miners.append(sizes[i])
        if changes:
            x = x + server_lr * np.average(changes, axis=0, weights=miners)
        for i, found in fresh.items():
            kept[i] = found
    return x, np.average(kept, axis=0, weights=sizes)


@pytest.mark.parametrize("cache", ["server", "client"])
@pytest.mark.parametrize("options", [{}, {"every": 3}, {"probability": 0.5}, {"server_lr": 0.5}])
def test_against_the_written_out_algorithm(options, cache):
    made, sampler = bowls(4), InTurn(2)
    strategy = FedAMD(cache=cache, **options)
    roles = {}

    def watch(coordinator):
        server = coordinator.server
        roles.update({(server.version, i): server.is_anchor(f"c{i}") for i in range(4)})

    federation = run(strategy, made, strategy.schedule(9, sampler), watch=watch)
    x, target = by_hand(
        made, sampler.rounds, lambda n, i: roles[n, i], server_lr=options.get("server_lr", 1.0)
    )
    assert len(sampler.rounds) == 8
    assert np.allclose(position(federation.server.tensors), x, atol=2e-5)
    assert np.allclose(position(federation.server.target), target, atol=2e-5)


@pytest.mark.parametrize("cache", ["server", "client"])
def test_clients_count_by_their_examples_where_asked(cache):
    made, sampler, sizes = bowls(4), InTurn(2), [1, 2, 3, 1]
    sites = [
        Site(f"c{i}", [bowl] * size) for i, (bowl, size) in enumerate(zip(made, sizes, strict=True))
    ]
    strategy = FedAMD(cache=cache, weighting="examples")
    schedule = strategy.schedule(9, sampler)
    federation = strategy.simulate(Point(5), local(RATE, STEPS), sites, schedule=schedule)
    federation.run()
    x, target = by_hand(made, sampler.rounds, lambda n, _: n % 2 == 0, sizes=sizes)
    assert np.allclose(position(federation.server.tensors), x, atol=2e-5)
    assert np.allclose(position(federation.server.target), target, atol=2e-5)


def test_one_step_from_fresh_gradients_is_gradient_descent_on_everyones_loss():
    made = bowls(4)
    federation = run(FedAMD(), made, FedAMD().schedule(2), steps=1)
    expected = -RATE * gradient(made, np.zeros(5))
    assert np.allclose(position(federation.server.tensors), expected, atol=1e-6)


def test_one_client_with_steps_of_all_its_data_descends_its_gradient():
    made = bowls(1)
    federation = run(FedAMD(), made, FedAMD().schedule(2))
    x = np.zeros(5)
    for _ in range(STEPS):
        x = x - RATE * made[0].gradient(x)
    assert np.allclose(position(federation.server.tensors), x, atol=1e-6)


def test_finds_the_optimum_when_few_take_part():
    made = bowls(4)
    strategy = FedAMD()
    federation = run(strategy, made, strategy.schedule(200, InTurn(2)), rate=0.2)
    assert np.linalg.norm(gradient(made, position(federation.server.tensors))) < 1e-4


@settings(max_examples=12, deadline=None)
@given(
    faults=st.sets(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=8),
    options=st.sampled_from([{"every": 2}, {"probability": 0.5}]),
)
def test_where_to_go_is_the_mean_of_what_is_kept_whoever_was_lost(faults, options):
    """In both places of keeping, which give the same models."""
    made, script = bowls(4), {(f"c{i}", n): lost for i, n in faults}

    def result(cache):
        schedule = Sync(5, InTurn(3))
        return run(FedAMD(cache=cache, **options), made, schedule, Tamper(script), patience=50)

    try:
        server, client = result("server"), result("client")
    except EmptyRound:
        return
    kept = [position(gradient) for gradient in server.server.kept.values()]
    assert len(kept) == len(server.server.warm)
    if kept:
        target = position(server.server.target)
        assert np.allclose(target, np.mean(kept, axis=0), atol=1e-5)
        assert np.allclose(position(client.server.target), target, atol=1e-5)
    moved = position(server.server.tensors)
    assert np.allclose(position(client.server.tensors), moved, atol=1e-5)


def test_a_client_of_which_nothing_is_kept_is_an_anchor():
    strategy = FedAMD(every=5)
    federation = run(strategy, bowls(4), Sync(3, InTurn(2)))
    counts = [(h["anchors"], h["miners"]) for h in federation.result.history]
    assert counts == [(2, 0), (1, 1), (1, 1)]


def test_only_miners_are_told_where_to_go():
    strategy = FedAMD()
    federation = run(strategy, bowls(2), strategy.schedule(4))
    down = [federation.result.ledger.total(direction="down", version=v).payload for v in range(4)]
    assert down[0] == down[2] < down[1] == down[3]


def test_gradients_and_steps_are_counted_as_work():
    sites = [Site("a", list(range(40)))]
    strategy = FedAMD()
    federation = strategy.simulate(digits.perceptron(), digits.local(steps=3, batch=8), sites)
    ctx_units = []
    schedule = strategy.schedule(2)
    on = schedule.on

    def spy(event, fed):
        ctx_units.append(getattr(event, "units", None))
        return on(event, fed)

    federation.coordinator.schedule = schedule
    schedule.on = spy
    federation.run()
    assert [u for u in ctx_units if u is not None] == [5.0, 5.0]


def test_a_large_batch_is_drawn_from_the_clients_data():
    def kept(large_batch):
        sites = [Site("a", list(range(40)))]
        made = FedAMD(large_batch=large_batch).simulate(
            digits.perceptron(), digits.local(), sites, rounds=1
        )
        made.run()
        return position_of(made.server.kept["a"])

    whole = kept(None)
    assert np.array_equal(kept(40), whole) and np.array_equal(kept(1000), whole)
    assert not np.allclose(kept(10), whole, atol=1e-4)
    model, images = digits.perceptron(), digits.images()[0]
    cross_entropy(model(images.pixels[:40]), images.labels[:40]).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert np.allclose(whole, position_of(expected), atol=1e-6)


def position_of(tensors):
    return np.concatenate([tensors[name].numpy().reshape(-1) for name in sorted(tensors)])


def test_reaches_what_fedavg_reaches_in_fewer_rounds():
    labels = digits.images()[0].labels.tolist()
    sites = digits.sites(splits.shards(labels, 20, 2))

    def accuracy(strategy):
        model = digits.perceptron()
        schedule = strategy.schedule(24, InTurn(5))
        made = strategy.simulate(
            model,
            digits.local(lr=0.05, batch=8),
            sites,
            schedule=schedule,
            watch=digits.watch(model),
        )
        return made.run().metrics["accuracy"]

    assert accuracy(FedAMD()) > accuracy(FedAvg(weighting="uniform"))


def test_a_miner_whose_direction_blows_up_fails():
    strategy = FedAMD()
    schedule = strategy.schedule(2)
    made = bowls(2)
    with pytest.raises(EmptyRound, match="the direction grew from"):
        run(strategy, made, schedule, steps=60, rate=5.0)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda p: {**p, "role": "boss"}, "malformed"),
        (lambda p: {k: v for k, v in p.items() if k != "role"}, "malformed"),
        (lambda p: {k: v for k, v in p.items() if k != "head"}, "mismatch"),
        (lambda p: {**p, "head": p["head"] * float("nan")}, "not finite"),
    ],
)
def test_what_is_kept_survives_replies_that_cannot_be_used(change, what):
    def broken(task, reply):
        return [dataclasses.replace(reply, body=encode(change(decode(reply.body))))]

    made = bowls(3)
    strategy = FedAMD()
    federation = run(strategy, made, strategy.schedule(3), Tamper({("c1", 3): broken}))
    assert federation.result.incidents.count(what, "c1") == 1
    kept = position(federation.server.kept["c1"])
    assert np.allclose(kept, made[1].gradient(np.zeros(5)), atol=1e-6)


def test_clients_without_data_are_never_anchors_that_count():
    made = bowls(2)
    sites = [*places(made), Site("empty", [])]
    strategy = FedAMD()
    federation = strategy.simulate(Point(5), local(RATE, STEPS), sites, rounds=4)
    federation.run()
    alone = run(strategy, made, strategy.schedule(4))
    assert np.array_equal(position(federation.server.tensors), position(alone.server.tensors))
    assert federation.server.warm == {"c0", "c1"}
    with pytest.raises(EmptyRound):
        FedAMD().simulate(Point(5), local(), [Site("empty", [])]).run()


def test_sites_with_less_than_a_large_batch_are_named_once(caplog):
    sizes = {"a": 40, "b": 5, "empty": 0, "late": 3}
    sites = [
        Site(name, list(range(size)), DeviceProfile(1.0), joins=float(name == "late"))
        for name, size in sizes.items()
    ]
    strategy = FedAMD(large_batch=20)
    federation = strategy.simulate(digits.perceptron(), digits.local(batch=8), sites, rounds=4)
    federation.run()
    said = [record.message for record in caplog.records if "examples" in record.message]
    assert said == [
        "without examples, and so without a say: empty",
        "large_batch is 20; these have fewer examples and use all: b",
        "large_batch is 20; these have fewer examples and use all: late",
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"every": 1},
        {"every": 2.5},
        {"probability": 0.0},
        {"probability": 1.1},
        {"every": 2, "probability": 0.5},
        {"large_batch": 0},
        {"cache": "disk"},
        {"weighting": "loss"},
        {"server_lr": -1.0},
    ],
)
def test_options_that_cannot_work(options):
    with pytest.raises(ConfigurationError):
        FedAMD(**options)


def test_local_training_must_be_plain():
    with pytest.raises(ConfigurationError, match="plain SGD"):
        FedAMD().client(local(optimizer="adamw"))
