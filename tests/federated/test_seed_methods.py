"""Methods that send scalars and let everyone draw the directions."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import ConfigurationError
from anabranch.evaluation.testbeds import digits
from anabranch.federated import Site, Sync, Work
from anabranch.federated.errors import EmptyRound, FederationError
from anabranch.federated.randomness import derive_seed
from anabranch.federated.seeded_directions import normal, truncated
from anabranch.federated.seeded_model import (
    UNIT,
    BaseModelMismatch,
    ModelDiverged,
    PooledModel,
    SeededModel,
    digest,
    require_same_base,
    to_units,
)
from anabranch.federated.shared import lent, shared_tensors
from anabranch.federated.slopes import loss_of
from anabranch.federated.strategies.fedkseed import FedKSeed, FedKSeedPro
from anabranch.training.sampler import Sampler, shuffled
from tests.federated.helpers import Tamper

SHAPES = {"a": (3, 5), "b": (7,), "c": ()}


def small_start():
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def sites(clients=3, examples=30):
    return [Site(f"c{i}", list(range(examples * i, examples * (i + 1)))) for i in range(clients)]


def simulate(strategy, places=None, steps=4, rounds=3, **options):
    local = digits.local(batch=8, steps=steps)
    places = sites() if places is None else places
    return strategy.simulate(digits.perceptron(), local, places, rounds=rounds, **options)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# Directions


def test_directions_are_the_same_on_every_machine():
    """A digest of the bits; another one would break every stored run."""
    values = normal(7, "layer.weight", (3, 1001))
    assert values.dtype == torch.float32 and values.shape == (3, 1001)
    assert hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16] == "e8d40e060d349551"
    assert torch.equal(values.double() * 2**13, (values.double() * 2**13).round())


def test_directions_are_standard_normal_and_independent():
    from scipy.stats import kstest

    values = normal(1, "w", (200_000,)).double()
    assert kstest(values.numpy(), "norm").pvalue > 0.01
    assert abs(float(values.square().mean()) - 1) < 0.02
    for other in (normal(2, "w", (200_000,)), normal(1, "v", (200_000,))):
        assert abs(float(values @ other.double()) / 200_000) < 4 / 200_000**0.5


@pytest.mark.parametrize("width", [1, 3, 50, 4096])
def test_truncated_rows_have_unit_variance_and_a_bound(width):
    rows = 200_000 // width
    values = torch.cat(list(truncated(3, 5, rows, width)))
    assert values.shape == (rows, width)
    assert float(values.double().square().mean()) == pytest.approx(1, abs=0.02)
    assert abs(float(values.double().mean())) < 0.02
    assert float(values.abs().max()) <= 3**0.5 * 1.12
    assert torch.equal(next(truncated(3, 5, 2, width)), values[:2])


# The exact sum

scalars = st.lists(
    st.tuples(st.integers(0, 5), st.integers(-(2**30), 2**30)), min_size=1, max_size=12
)


@settings(deadline=None, max_examples=40)
@given(scalars, st.randoms())
def test_a_replica_has_the_same_bits_in_any_order(pairs, random):
    start = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    one, other = SeededModel(start, 0.01), SeededModel(start, 0.01)
    for seed, units in pairs:
        one.add(seed, units)
    for seed, units in random.sample(pairs, len(pairs)):
        other.add(seed, units)
    assert same(one.sums, other.sums) and same(one.tensors, other.tensors)
    for seed, units in pairs:
        other.add(seed, -units)
    assert same(other.tensors, start) and not any(s.any() for s in other.sums.values())


def test_the_sum_is_that_of_the_directions():
    start = small_start()
    model = SeededModel(start, 0.25)
    for seed, scalar in ((3, 1.5), (9, -0.75), (3, 0.25)):
        model.add(seed, int(to_units([scalar])[0]))
    for name, shape in SHAPES.items():
        expected = start[name] - 0.25 * (
            1.75 * normal(3, name, shape) - 0.75 * normal(9, name, shape)
        )
        assert torch.allclose(model.tensors[name], expected, atol=1e-6)


def test_following_a_run_is_starting_over():
    start = small_start()
    rng = np.random.default_rng(0)
    follower = PooledModel(start, 0.1, 11, 8)
    for _ in range(5):
        version = to_units(np.where(rng.random(8) < 0.6, rng.normal(size=8), 0))
        changed = int((version != follower.units).sum())
        assert follower.move_to(version) == changed
        newcomer = PooledModel(start, 0.1, 11, 8)
        newcomer.move_to(version)
        assert same(newcomer.sums, follower.sums) and same(newcomer.tensors, follower.tensors)


def test_half_precision_weights_and_others_that_cannot_move():
    model = SeededModel({"w": torch.ones(5, dtype=torch.bfloat16)}, 1.0)
    model.add(1, int(0.5 / UNIT))
    expected = (1 - 0.5 * normal(1, "w", (5,))).to(torch.bfloat16)
    assert torch.equal(model.tensors["w"], expected)
    with pytest.raises(FederationError, match=r"w is torch.int8"):
        SeededModel({"w": torch.ones(5, dtype=torch.int8)}, 1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e9])
def test_scalars_that_cannot_be_added_exactly(bad):
    with pytest.raises(ModelDiverged, match="lower its rate"):
        to_units([1.0, bad])


def test_base_weights_have_names():
    start = small_start()
    assert digest(start) == digest(dict(reversed(start.items())))
    assert digest(start) != digest({**start, "a": start["a"] + 1e-6})
    require_same_base("c0", 5, 5)
    with pytest.raises(BaseModelMismatch, match="c0 has the base weights"):
        require_same_base("c0", 5, 6)


# FedKSeed


def test_one_client_is_plain_zeroth_order_descent():
    """Against the loop that perturbs the weights itself, in another order of additions."""
    lr, eps, steps = 0.01, 1e-3, 12
    federation = simulate(FedKSeed(64, lr, eps), sites(1), steps=steps, rounds=1)
    federation.run()
    model = digits.perceptron()
    local = digits.local(batch=8, steps=steps)
    seed = derive_seed(0, "client", "c0", 1)
    sampler = Sampler(shuffled(30, seed), 8)
    pool = federation.server.pool
    for index in np.random.default_rng(seed).integers(0, 64, steps).tolist():
        batch = sampler.next_batch()
        before = shared_tensors(model)
        z = {n: normal(derive_seed(pool, index), n, t.shape) for n, t in before.items()}
        losses = []
        for sign in (1, -1):
            moved = {n: t + sign * eps * z[n] for n, t in before.items()}
            with lent(model, moved):
                losses.append(loss_of(model, local.objective, batch))
        slope = (losses[0] - losses[1]) / (2 * eps)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= lr * slope * z[name]
    start, ours = shared_tensors(digits.perceptron()), federation.server.tensors
    apart = sum((ours[n] - p).square().sum() for n, p in model.named_parameters()) ** 0.5
    moved = sum((start[n] - p).square().sum() for n, p in model.named_parameters()) ** 0.5
    # A slope divides the rounding of a float32 loss by 2 eps.
    assert apart.item() < 1e-3 * moved.item()


@pytest.mark.parametrize("cls", [FedKSeed, FedKSeedPro])
def test_a_client_rebuilds_the_servers_model_bit_for_bit(cls):
    federation = simulate(cls(32), rounds=4)
    federation.run()
    server = federation.server
    newcomer = PooledModel(shared_tensors(digits.perceptron()), 0.01, server.pool, 32)
    newcomer.move_to(to_units(server.message("new", "train")["scalars"].numpy()[0]))
    assert same(newcomer.tensors, server.tensors)


@pytest.mark.parametrize(("cls", "rows"), [(FedKSeed, 1), (FedKSeedPro, 2)])
def test_messages_are_scalars_only(cls, rows):
    result = simulate(cls(50), steps=7, rounds=2).run()
    down, up = (result.ledger.total(direction=d) for d in ("down", "up"))
    assert down.payload == down.messages * (rows * 4 * 50 + 16)
    assert up.payload == up.messages * 6 * 7


def test_scalars_are_averaged_by_examples():
    places = [Site("a", list(range(30))), Site("b", list(range(30, 40)))]
    replies = {}

    def keep(task, reply):
        replies[task.client] = np.frombuffer(reply.body, dtype=[("i", "<u2"), ("g", "<f4")])
        return [reply]

    for weighting, shares in (("examples", (0.75, 0.25)), ("uniform", (0.5, 0.5))):
        federation = simulate(FedKSeed(16, weighting=weighting), places, rounds=1)
        federation.runtime.faults = keep
        federation.run()
        expected = np.zeros(16)
        for name, share in zip("ab", shares, strict=True):
            for index, slope in replies[name]:
                expected[index] += share * float(slope)
        assert np.allclose(federation.server.scalars, expected, atol=1e-12)


def test_pro_prefers_steep_directions():
    server = FedKSeedPro(4).server(small_start())
    assert np.allclose(server.chances(), 0.25)
    server.times, server.steepness = np.array([1.0, 3, 2, 2]), np.array([0.0, 6, 2, 4])
    expected = np.exp([0, 1, 0.5, 1])
    assert np.allclose(server.chances(), expected / expected.sum())


def test_the_rate_of_a_task_scales_its_steps():
    whole = simulate(FedKSeed(16), sites(1), steps=1, rounds=1)
    half = simulate(FedKSeed(16), sites(1), steps=1, schedule=Sync(1, work=Work(lr_scale=0.5)))
    whole.run(), half.run()
    assert np.allclose(half.server.scalars, whole.server.scalars / 2)


def test_steps_that_cannot_be_used_are_left_out():
    none = simulate(FedKSeed(16, clip=1e-12), patience=0)
    with pytest.raises(EmptyRound, match="no client took a step"):
        none.run()
    without_data = simulate(FedKSeed(16), [*sites(2), Site("empty", [])], rounds=1)
    alone = simulate(FedKSeed(16), sites(2), rounds=1)
    without_data.run(), alone.run()
    assert np.array_equal(without_data.server.scalars, alone.server.scalars)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"12345", "no list of steps"),
        (np.array([(99, 1.0)], dtype=[("i", "<u2"), ("g", "<f4")]).tobytes(), "direction 99"),
        (np.array([(1, np.nan)], dtype=[("i", "<u2"), ("g", "<f4")]).tobytes(), "NaN"),
    ],
)
def test_replies_that_are_no_steps_are_refused(body, says, caplog):
    federation = simulate(FedKSeed(16), rounds=1)
    federation.runtime.faults = Tamper(
        {("c1", 1): lambda task, reply: [dataclasses.replace(reply, body=body)]}
    )
    result = federation.run()
    assert result.incidents.count("malformed", "c1") == 1
    assert says in federation.coordinator.state.last_problem


def test_a_site_with_other_weights_does_not_take_part():
    federation = simulate(FedKSeed(16), rounds=1)
    federation.server.base += 1
    with pytest.raises(EmptyRound, match="BaseModelMismatch"):
        federation.run()


@pytest.mark.parametrize(
    "options",
    [{"k": 0}, {"k": 2**16 + 1}, {"lr": 0.0}, {"eps": -1.0}, {"clip": 0.0}, {"weighting": "loss"}],
)
def test_options_of_fedkseed_that_cannot_work(options):
    with pytest.raises(ConfigurationError):
        FedKSeed(**options)


def test_weights_cannot_decay():
    with pytest.raises(ConfigurationError, match=r"set weight_decay to 0, not 0\.1"):
        FedKSeed().client(digits.local(weight_decay=0.1))
