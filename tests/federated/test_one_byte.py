"""Just One Byte: replicas that only ever hear bytes."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import ConfigurationError
from anabranch.evaluation.testbeds import digits
from anabranch.federated import Buffered, DeviceProfile, Site, Sync, Work
from anabranch.federated.errors import EmptyRound, PayloadError
from anabranch.federated.randomness import derive_seed
from anabranch.federated.replay import (
    Contribution,
    ReplayedModel,
    ReplayLog,
    ReplayLogError,
    ScalarQuantiser,
    pack,
    unpack,
)
from anabranch.federated.seeded_directions import normal
from anabranch.federated.seeded_model import BaseModelMismatch, ModelDiverged, digest
from anabranch.federated.server import Update
from anabranch.federated.shared import lent, shared_tensors
from anabranch.federated.slopes import loss_of
from anabranch.federated.strategies.one_byte import JustOneByte, ReplicaDivergence
from anabranch.training.sampler import Sampler, shuffled
from tests.federated.helpers import Tamper, lost

PROFILE = DeviceProfile(1.0)


def sites(clients=3, examples=30, **changes):
    return [
        Site(f"c{i}", list(range(examples * i, examples * (i + 1))), PROFILE, **changes)
        for i in range(clients)
    ]


def simulate(strategy, places=None, steps=2, rounds=3, **options):
    local = digits.local(batch=8, steps=steps)
    places = sites() if places is None else places
    return strategy.simulate(digits.perceptron(), local, places, rounds=rounds, **options)


def replayed(federation, records):
    """The model after the first records of the run's log."""
    server = federation.server
    model = ReplayedModel(
        shared_tensors(digits.perceptron()), server.options.lr, server.run, server.options.quantiser
    )
    for record in unpack(b"".join(server.records[:records]), model.quantiser.width):
        model.apply(record)
    return model


# Codes and the log


@given(st.lists(st.floats(-5, 5), max_size=20), st.floats(5, 50))
def test_a_byte_is_at_most_half_a_level_away(scalars, scale):
    quantiser = ScalarQuantiser()
    codes = quantiser.encode(scalars, scale)
    assert len(codes) == len(scalars)
    found = quantiser.decode(codes, scale)
    assert np.abs(found - np.array(scalars)).max(initial=0) <= scale / 254 * (1 + 1e-9)


def test_codes_that_are_special():
    quantiser = ScalarQuantiser()
    codes = quantiser.encode([0.0, math.nan, 99.0, -99.0, math.inf], 8.0)
    assert np.frombuffer(codes, np.int8).tolist() == [0, -128, 127, -127, 127]
    assert np.array_equal(quantiser.decode(codes, 8.0), [0, math.nan, 8, -8, 8], equal_nan=True)
    exact = ScalarQuantiser("float32")
    assert exact.decode(exact.encode([1.5, -2.25], 1.0), 1.0).tolist() == [1.5, -2.25]
    with pytest.raises(ConfigurationError, match="'int4'"):
        ScalarQuantiser("int4")


@given(st.lists(st.floats(-448, 448), max_size=20), st.floats(1e-3, 50))
def test_a_float8_is_a_16th_away_whatever_the_scale(scalars, scale):
    quantiser = ScalarQuantiser("float8_e4m3")
    codes = quantiser.encode(scalars, scale)
    assert len(codes) == quantiser.width * len(scalars) == len(scalars)
    found = quantiser.decode(codes, 1.0)
    # As the format says: 3 bits of mantissa, exponents from -6 on.
    exponents = np.floor(np.log2(np.maximum(np.abs(scalars), 2.0**-6)))
    assert (np.abs(found - np.array(scalars)) <= 2.0 ** (exponents - 4) * (1 + 1e-6)).all()


def test_float8_codes_that_are_special():
    quantiser = ScalarQuantiser("float8_e4m3")
    codes = quantiser.encode([0.0, math.nan, 1e9, -math.inf, 1.0], 8.0)
    assert list(codes) == [0, 0x7F, 0x7E, 0xFE, 0x38]
    decoded = quantiser.decode(codes, 8.0)
    assert np.array_equal(decoded, [0, math.nan, 448, -448, 1], equal_nan=True)
    everything = quantiser.decode(bytes(range(256)), 1.0)
    assert np.isnan(everything).sum() == 2 and np.nanmax(everything) == 448


contributions = st.builds(
    Contribution, st.integers(0, 9), st.integers(0, 3), st.binary(max_size=12).map(lambda b: b * 4)
)


@given(st.lists(st.lists(contributions, max_size=3), max_size=4), st.sampled_from([1, 4]))
def test_a_log_is_its_records_and_a_torn_one_is_refused(records, width):
    log = b"".join(pack(record, width) for record in records)
    assert unpack(log, width) == records
    if records:
        with pytest.raises(PayloadError, match=r"lacks codes|ends within"):
            unpack(log[:-1], width)


def test_a_log_as_a_file_gives_the_model_to_whoever_has_the_base(tmp_path):
    federation = simulate(JustOneByte(codes="float8_e4m3"))
    federation.run()
    path = tmp_path / "new" / "replay.log"
    federation.server.export(path.parent)
    assert path.stat().st_size < 400, "of 3 rounds of 3 peers with 2 slopes each"
    base = shared_tensors(digits.perceptron())
    log = ReplayLog.load(path)
    assert log == federation.server.log
    found = log.replay(base)
    assert all(torch.equal(found[name], x) for name, x in federation.server.tensors.items())
    assert any(not torch.equal(found[name], x) for name, x in base.items())
    with pytest.raises(BaseModelMismatch):
        log.replay(shared_tensors(digits.perceptron(1)))
    changed = log.records[:-1] + bytes([log.records[-1] ^ 1])
    for wrong, says in (({"records": changed}, "changed or lost"), ({"directions": 0}, "drawn")):
        with pytest.raises(ReplayLogError, match=says):
            dataclasses.replace(log, **wrong).replay(base)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: b"[]\n",
        lambda data: data.replace(b"log 1", b"log 2"),
        lambda data: data.replace(b"float8_e4m3", b"float9"),
        lambda data: data.replace(b'"lr"', b'"rate"'),
        lambda data: b"\x80" + data,
    ],
)
def test_files_that_are_no_logs(spoil, tmp_path):
    federation = simulate(JustOneByte(codes="float8_e4m3"), rounds=1)
    federation.run()
    federation.server.export(tmp_path)
    path = tmp_path / "replay.log"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ReplayLogError, match="no whole replay log"):
        ReplayLog.load(path)


def test_an_update_by_hand():
    start = {"w": torch.ones(4)}
    model = ReplayedModel(start, 0.5, 7, ScalarQuantiser())
    model.apply([Contribution(0, 0, bytes([127, 128])), Contribution(2, 0, bytes([64]))])
    slopes = [8.0, 64 * 8 / 127]  # the second code says that there is none
    expected = torch.ones(4)
    for machine, sample, slope in ((0, 0, slopes[0]), (2, 0, slopes[1])):
        z = normal(derive_seed(7, 0, machine, sample), "w", (4,))
        expected = expected - 0.5 / 2 * slope * z
    assert torch.allclose(model.model.tensors["w"], expected, atol=1e-5)
    mean = (8 + 64 * 8 / 127) / 2
    assert model.scales[-1] == pytest.approx(0.9 * 8 + 0.4 * mean)


def test_records_that_cannot_be_applied_leave_the_model_as_it_was():
    model = ReplayedModel({"w": torch.ones(4)}, 0.5, 7, ScalarQuantiser("float32"))
    huge = np.array([1e30], dtype="<f4").tobytes()
    with pytest.raises(ModelDiverged):
        model.apply([Contribution(0, 0, huge)])
    with pytest.raises(PayloadError, match="before the run began"):
        model.apply([Contribution(0, 1, huge)])
    assert model.iteration == 0 and torch.equal(model.model.tensors["w"], torch.ones(4))


# The run


@pytest.mark.parametrize("codes", ["int8", "float8_e4m3"])
def test_a_gradient_is_one_byte_and_everyone_replays_the_same_model(codes):
    federation = simulate(JustOneByte(codes=codes), steps=5, rounds=6)
    result = federation.run()
    assert result.ledger.total(direction="up").payload == 6 * 3 * 5
    expected = replayed(federation, 5)
    for name in ("c0", "c1", "c2"):
        state = federation.runtime.node(name).state["replica"]
        for tensor, total in state["sums"].items():
            assert torch.equal(total, expected.model.sums[tensor])
        assert state["scales"] == expected.scales
    final = replayed(federation, 6).model.tensors
    assert all(torch.equal(final[n], t) for n, t in federation.server.tensors.items())


def test_one_machine_without_rounding_is_plain_zeroth_order_descent():
    lr, eps, steps, rounds = 0.02, 1e-3, 2, 4
    federation = simulate(JustOneByte(lr, eps, "float32"), sites(1), steps, rounds)
    federation.run()
    model, local = digits.perceptron(), digits.local(batch=8, steps=steps)
    for iteration in range(rounds):
        seed = derive_seed(0, "client", "c0", iteration + 1)
        sampler = Sampler(shuffled(30, seed), 8)
        before = shared_tensors(model)
        after = dict(before)
        for sample in range(steps):
            batch, losses = sampler.next_batch(), []
            name = derive_seed(federation.server.run, iteration, 0, sample)
            z = {n: normal(name, n, t.shape) for n, t in before.items()}
            for sign in (1, -1):
                with lent(model, {n: t + sign * eps * z[n] for n, t in before.items()}):
                    losses.append(loss_of(model, local.objective, batch))
            slope = (losses[0] - losses[1]) / (2 * eps)
            after = {n: t - lr / steps * slope * z[n] for n, t in after.items()}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(after[name])
    start, ours = shared_tensors(digits.perceptron()), federation.server.tensors
    theirs = shared_tensors(model)
    apart = sum((ours[n] - t).square().sum() for n, t in theirs.items()) ** 0.5
    moved = sum((start[n] - t).square().sum() for n, t in theirs.items()) ** 0.5
    assert apart.item() < 1e-3 * moved.item()


@dataclasses.dataclass
class Uneven(Sync):
    """Everyone measures another number of slopes each time."""

    def send(self, client, fed):
        steps = int(fed.rng("steps", client, fed.version).integers(1, 4))
        return dataclasses.replace(super().send(client, fed), work=Work(steps=steps))


def test_machines_join_leave_and_fail_and_stay_the_same():
    places = sites(4)
    places[2] = dataclasses.replace(places[2], joins=9.5)
    places[3] = dataclasses.replace(places[3], leaves=15.5)
    federation = simulate(JustOneByte(), places, schedule=Uneven(14))
    federation.runtime.faults = Tamper({("c1", 3): lost, ("c1", 4): lost, ("c0", 6): lost})
    result = federation.run()
    assert {figures["peers"] for figures in result.history} >= {2, 3}
    assert not any("astray" in figures for figures in result.history)
    for name in ("c0", "c1", "c2"):
        state = federation.runtime.node(name).state["replica"]
        expected = replayed(federation, len(state["scales"]) - 1)
        assert all(torch.equal(t, expected.model.sums[n]) for n, t in state["sums"].items())


def test_late_slopes_are_applied_along_the_directions_that_they_were_measured_on():
    places = [dataclasses.replace(s, profile=DeviceProfile(1.0 + i)) for i, s in enumerate(sites())]
    federation = simulate(JustOneByte(), places, schedule=Buffered(9, 1))
    federation.run()
    records = unpack(b"".join(federation.server.records), 1)
    assert max(part.age for record in records for part in record) > 0
    assert federation.server.tensors["0.weight"].isfinite().all()


def strayed(federation, name):
    """The site's stored sums are no longer what the log says."""
    federation.runtime.node(name)._personal["state"]["replica"]["sums"]["0.bias"] += 1.0


def test_a_replica_that_went_astray_replays_the_log():
    federation = simulate(JustOneByte(), rounds=6)

    def disturb(task, reply):
        strayed(federation, "c1")
        return [reply]

    federation.runtime.faults = Tamper({("c1", 2): disturb})
    result = federation.run()
    assert [figures.get("astray", 0) for figures in result.history] == [0, 0, 1, 0, 0, 0]
    assert result.history[2]["peers"] == 2
    state = federation.runtime.node("c1").state["replica"]
    expected = replayed(federation, 5)
    assert all(torch.equal(t, expected.model.sums[n]) for n, t in state["sums"].items())


def test_without_a_majority_the_run_stops():
    federation = simulate(JustOneByte(), sites(2), rounds=6)

    def disturb(task, reply):
        strayed(federation, "c1")
        return [reply]

    federation.runtime.faults = Tamper({("c1", 2): disturb})
    with pytest.raises(ReplicaDivergence, match="iteration 2"):
        federation.run()
    assert federation.coordinator.version == 2


def test_a_site_that_lost_its_state_begins_again_from_the_log():
    federation = simulate(JustOneByte(), rounds=6)

    def forget(task, reply):
        del federation.runtime.node("c1")._personal["state"]["replica"]
        return [reply]

    federation.runtime.faults = Tamper({("c1", 2): forget})
    result = federation.run()
    assert [figures["peers"] for figures in result.history] == [3, 3, 2, 3, 3, 3]
    state = federation.runtime.node("c1").state["replica"]
    assert digest(state["sums"]) == digest(replayed(federation, 5).model.sums)


@pytest.mark.parametrize(
    ("codes", "metrics", "says"),
    [
        (b"abc", {}, "no list of codes of 4 bytes"),
        (b"abcdabcd", {"iteration": 99.0}, "at iteration 99"),
        (b"abcdabcd", {"iteration": 0.5}, "at iteration 0.5"),
    ],
)
def test_replies_that_cannot_be_are_refused(codes, metrics, says):
    federation = simulate(JustOneByte(codes="float32"), rounds=1)
    federation.runtime.faults = Tamper(
        {
            ("c1", 1): lambda task, reply: [
                dataclasses.replace(reply, body=codes, metrics={**reply.metrics, **metrics})
            ]
        }
    )
    result = federation.run()
    assert result.incidents.count("malformed", "c1") == 1
    assert says in federation.coordinator.state.last_problem


@pytest.mark.parametrize("change", [lambda body: body * 50, lambda body: body[:1]])
def test_as_many_codes_as_slopes(change):
    federation = simulate(JustOneByte(), rounds=2)
    federation.runtime.faults = Tamper(
        {("c1", 1): lambda task, reply: [dataclasses.replace(reply, body=change(reply.body))]}
    )
    result = federation.run()
    (incident,) = result.incidents
    assert (incident.what, incident.client) == ("malformed", "c1")
    assert "c1 says that it measured 2 slopes, but sent codes of" in incident.message
    assert [figures["peers"] for figures in result.history] == [2, 3]


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(4)), st.integers(0, 99))
def test_the_order_of_arrival_leaves_no_trace(order, seed):
    rng = np.random.default_rng(seed)
    codes = [rng.bytes(int(rng.integers(1, 4))) for _ in order]
    records = []
    for chosen in (range(4), order):
        server = JustOneByte().server(shared_tensors(digits.perceptron()))
        server.records, server.machines = [b""] * 3, {f"c{i}": 3 - i for i in range(4)}
        acc = None
        for i in chosen:
            name = f"c{i}"
            acc = server.fold(
                acc,
                Update(i, name, "train", i % 2, {"codes": codes[i]}, 1, 0, 1.0, 0.0, {"digest": 7}),
            )
        server.commit(acc)
        records.append(server.records[-1])
    assert records[0] == records[1]


def test_peers_that_draw_other_directions_are_refused(monkeypatch):
    federation = simulate(JustOneByte(), rounds=1)
    message = federation.server.message
    federation.server.message = lambda *which: {**message(*which), "directions": 0}
    with pytest.raises(EmptyRound, match="DirectionsMismatch: c2 draws directions the way 1, the"):
        federation.run()


def test_other_base_weights_and_nobody_with_data():
    federation = simulate(JustOneByte(), rounds=1)
    federation.server.base += 1
    with pytest.raises(EmptyRound, match="BaseModelMismatch"):
        federation.run()
    with pytest.raises(EmptyRound, match="no peer measured anything"):
        simulate(JustOneByte(), [Site("a", [])], patience=0).run()


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"eps": math.nan}, {"codes": "bits"}])
def test_options_that_cannot_work(options):
    with pytest.raises(ConfigurationError):
        JustOneByte(**options)
