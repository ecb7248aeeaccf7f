"""A federation whose coordinator sees sums only."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from anabranch.errors import ConfigurationError
from anabranch.federated import Buffered, Reply, Site, Sync, Task, Uniform
from anabranch.federated.aggregation import Median
from anabranch.federated.codecs import ErrorFeedback, TopK
from anabranch.federated.payload import decode, encode
from anabranch.federated.runtimes import Lost
from anabranch.federated.secure import (
    BelowThreshold,
    FixedPoint,
    Secure,
    SecureOptions,
    WrongShares,
    refuse_codec,
    secure_schedule,
)
from anabranch.federated.secure.protocol import KEYS, PHASES, SHARES, TRAIN, UNMASK
from anabranch.federated.strategies import FedAvg, FedProx
from anabranch.federated.strategies.fedadam import FedAdam
from anabranch.federated.strategies.scaffold import Scaffold
from anabranch.federated.topologies import Tree
from tests.federated.helpers import assert_killed_ends_the_same
from tests.federated.quadratics import Point, bowls, local

SITES = 5


def sites(count=SITES):
    """Sites with 1, 2, 3, ... examples."""
    made = bowls(count)
    return [Site(f"c{index}", [bowl] * (index + 1)) for index, bowl in enumerate(made)]


def federation(strategy=None, options=None, *, rounds=2, faults=None, count=SITES, **more):
    secure = Secure(strategy or FedAvg(), options)
    made = secure.simulate(Point(5), local(), sites(count), rounds, **more)
    made.runtime.faults = faults
    return made


def plain(strategy=None, *, rounds=2, count=SITES, dropped=(), **more):
    """The same without secure sums; ``dropped`` sites are not there."""
    there = [site for site in sites(count) if site.name not in dropped]
    return (strategy or FedAvg()).simulate(Point(5), local(), there, rounds, **more)


def vector(made):
    return torch.cat([made.server.tensors[n].reshape(-1) for n in sorted(made.server.tensors)])


@pytest.mark.parametrize(
    "strategy",
    [FedAvg(), FedAvg(weighting="uniform"), FedAvg(upload="weights"), FedProx(0.1), FedAdam(0.1)],
    ids=["examples", "uniform", "weights", "fedprox", "fedadam"],
)
def test_the_model_is_that_of_the_plain_method_up_to_rounding(strategy):
    secure, open_ = federation(strategy), plain(strategy)
    losses = []

    def listen(task, reply):
        losses.append(reply.metrics["loss"])
        return [reply]

    open_.runtime.faults = listen
    result, _ = secure.run(), open_.run()
    # Training draws nothing, so that the only difference is that of rounding to 2 ** -25.
    assert torch.allclose(vector(secure), vector(open_), atol=1e-6)
    assert result.version == 2 and len(result.incidents) == 0
    assert result.metrics["loss"] == pytest.approx(np.mean(losses[-SITES:]), abs=1e-5)
    assert result.metrics["sites"] == SITES


class Spy:
    """Keeps what the coordinator gets, and drops or bends replies by (site, kind)."""

    def __init__(self, script=None):
        self.script = script or {}
        self.seen = {kind: {} for kind in PHASES}

    def __call__(self, task, reply):
        if reply.body:
            self.seen[task.kind].setdefault(reply.client, []).append(decode(reply.body))
        change = self.script.get((task.client, task.kind))
        return [reply] if change is None else change(task, reply)


def dropped(task, reply):
    return [Lost(task.id, "gone")]


def updates_of(made):
    """What sites train, unmasked: by wrapping the inner client."""
    inner, seen = made.client.inner, {}
    run = inner.run

    def noted(ctx, kind, payload):
        answer = run(ctx, kind, payload)
        seen.setdefault(ctx.name, []).append(answer)
        return answer

    inner.run = noted
    return seen


@pytest.mark.parametrize("numbers", [FixedPoint(), FixedPoint(32, 12)])
def test_the_sum_is_exact(numbers):
    """The new version is, bit for bit, that of the weighted mean of the rounded updates."""
    made = federation(options=SecureOptions(numbers=numbers), rounds=1)
    start = {name: tensor.clone() for name, tensor in made.server.tensors.items()}
    seen = updates_of(made)
    made.run()
    scale, total = 2**numbers.fraction, sum(index + 1 for index in range(SITES))
    for name, before in start.items():
        exact = [
            sum(
                examples * round(float(update[name].reshape(-1)[i]) * scale)
                for [(update, examples)] in seen.values()
            )
            for i in range(before.numel())
        ]
        mean = torch.tensor([n / scale / total for n in exact], dtype=torch.float64)
        expected = before + mean.reshape(before.shape).to(before.dtype)
        assert torch.equal(made.server.tensors[name], expected)


def test_what_the_coordinator_gets_of_one_site_is_uniform():
    """Masked updates of one site over rounds that differ in nothing but their keys."""
    spy = Spy()
    bytes_ = []
    plain_view = []
    for _ in range(40):
        spy = Spy()
        made = federation(faults=spy, rounds=1, count=3)
        inside = updates_of(made)
        made.run()
        masked = spy.seen[TRAIN]["c0"][0]["masked"]
        bytes_.append(masked.numpy().view(np.uint8))
        [(update, _)] = inside["c0"]
        plain_view.append(torch.cat([update[n].reshape(-1) for n in sorted(update)]))
        # Nothing else about the update is in any message.
        assert spy.seen[TRAIN]["c0"][0].keys() == {"masked"}
    assert all(torch.equal(plain_view[0], other) for other in plain_view)
    found = np.concatenate(bytes_)
    counts = np.bincount(found, minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-7
    # The same place of the vector is another number each time, in high and low bytes alike.
    by_place = np.stack(bytes_)
    assert all(len(set(column)) > 20 for column in by_place.T)


def test_no_metrics_and_no_examples_leave_a_site():
    heard = []

    def listen(task, reply):
        heard.append((task.kind, reply.examples, dict(reply.metrics)))
        return [reply]

    federation(faults=listen).run()
    assert {kind for kind, *_ in heard} == set(PHASES)
    assert {(examples, str(metrics)) for _, examples, metrics in heard} == {(0, "{}")}


def test_a_site_s_privacy_account_is_told():
    """What was spent of a budget is no figure of the examples."""
    heard = []

    def listen(task, reply):
        heard.append((task.kind, dict(reply.metrics)))
        return [reply]

    made = federation(faults=listen, rounds=1, count=3)
    run = made.client.inner.run

    def accounted(ctx, kind, payload):
        answer = run(ctx, kind, payload)
        ctx.metrics.clear()
        ctx.report(**{f"epsilon/{ctx.name}": 1.5, "accuracy": 0.5})
        return answer

    made.client.inner.run = accounted
    result = made.run()
    assert ("train", {"epsilon/c1": 1.5}) in heard
    assert result.metrics["epsilon/c2"] == 1.5 and "accuracy" not in result.metrics
    assert "loss" not in result.metrics  # private steps report none


@pytest.mark.parametrize("stage", PHASES)
def test_a_site_that_drops_out_at_each_stage(stage):
    """Before it sent its update it does not count; afterwards it does."""
    spy = Spy({("c1", stage): dropped})
    made = federation(options=SecureOptions(3), rounds=1, faults=spy)
    result = made.run()
    missing = () if stage == UNMASK else ("c1",)
    expected = plain(rounds=1, dropped=missing)
    expected.run()
    assert torch.allclose(vector(made), vector(expected), atol=1e-6)
    assert result.metrics["sites"] == SITES - len(missing)
    assert result.incidents.count("lost", "c1") == 1 == len(result.incidents)
    if stage == TRAIN:
        # The others told its masking key, and nobody told its seed.
        told = spy.seen[UNMASK]["c0"][0]
        assert "key/c1" in told and "seed/c1" not in told
        assert "seed/c0" in told and "key/c0" not in told


def test_a_site_that_dropped_out_is_asked_again_in_the_next_round():
    spy = Spy()
    first = []

    def once(task, reply):
        if task.client == "c1" and task.kind == TRAIN and not first:
            first.append(task.id)
            return [Lost(task.id, "gone")]
        return spy(task, reply)

    result = federation(options=SecureOptions(3), rounds=2, faults=once).run()
    assert [row["sites"] for row in result.history] == [4, 5]


@pytest.mark.parametrize("stage", PHASES)
def test_below_the_threshold_a_round_is_empty_by_name(stage):
    spy = Spy({(f"c{index}", stage): dropped for index in (1, 2)})
    made = federation(options=SecureOptions(4), rounds=1, faults=spy, patience=1)
    start = vector(made).clone()
    with pytest.raises(BelowThreshold, match=f"needs 4 sites; after '{stage}' there are 3: c0, c3"):
        made.run()
    assert torch.equal(vector(made), start)
    assert made.coordinator.state.version == 0
    assert made.coordinator.state.incidents.count("empty round") == 2
    # Whoever is left does not tell what would open the sum of too few, nor even trains for it.
    assert stage == UNMASK or not spy.seen[UNMASK]
    assert stage not in (KEYS, SHARES) or not spy.seen[TRAIN]


def test_the_coordinator_cannot_ask_twice_or_out_of_turn():
    made = federation(rounds=1)
    made.run()
    node = made.runtime.node("c0")
    task = Task(1000, "c0", UNMASK, 1, 0.0, exchange=1000, body=encode({"sent/c0": b""}))
    reply = node.handle(task)
    assert "OutOfTurn" in reply.error and "nothing is told twice" in reply.error
    assert not reply.body
    unknown = replace(task, id=1001, exchange=1001, kind="gradients")
    assert "no 'gradients'" in node.handle(unknown).error


def test_a_site_whose_own_keys_were_exchanged_does_not_go_on():
    made = federation(rounds=1, patience=0)
    message = made.server.message

    def exchanged(client, kind):
        payload = dict(message(client, kind))
        if kind == SHARES and client == "c0":
            payload["seal/c0"] = payload["seal/c1"][::-1]
        return payload

    made.server.message = exchanged
    made.run()
    [incident] = made.coordinator.state.incidents
    assert (incident.what, incident.client) == ("failed", "c0")
    assert "this one's among them" in incident.message


def bent(**changes):
    """A reply with other values."""

    def bend(task, reply):
        payload = dict(decode(reply.body))
        for name, value in changes.items():
            name = name.replace("__", "/")
            payload[name] = value(payload.get(name)) if callable(value) else value
        made = Reply(reply.task, reply.client, reply.kind, reply.version, body=encode(payload))
        return [made]

    return bend


def flip(data):
    return bytes([data[0] ^ 1]) + data[1:]


@pytest.mark.parametrize(
    ("kind", "change", "incident"),
    [
        (KEYS, {"seal": b"short"}, "malformed"),
        (SHARES, {"commitment": 3}, "malformed"),
        (SHARES, {"for__stranger": b""}, "malformed"),
        (TRAIN, {"masked": torch.zeros(3, dtype=torch.int64)}, "mismatch"),
        (TRAIN, {"masked": lambda tensor: tensor.double()}, "mismatch"),
        (UNMASK, {"seed__c0": b"short"}, "malformed"),
        (UNMASK, {"key__c0": bytes(66)}, "malformed"),
    ],
)
def test_messages_that_are_malformed_fail_one_site(kind, change, incident):
    made = federation(
        options=SecureOptions(3), rounds=1, faults=Spy({("c1", kind): bent(**change)})
    )
    result = made.run()
    assert result.incidents.count(incident, "c1") == 1 and result.version == 1


def test_a_site_that_tells_wrong_shares_is_noticed():
    liar = Spy({("c0", UNMASK): bent(seed__c1=lambda share: share[:-1] + b"\0")})
    made = federation(options=SecureOptions(3), rounds=1, faults=liar, patience=0)
    with pytest.raises(WrongShares, match="c1's seed"):
        made.run()


def test_sealed_shares_that_were_changed_on_the_way():
    """The others cannot open what c0 sealed for them, and say so; c0 itself can still reply."""
    changes = {f"for__c{index}": flip for index in range(1, 5)}
    made = federation(
        options=SecureOptions(3),
        rounds=1,
        faults=Spy({("c0", SHARES): bent(**changes)}),
        patience=0,
    )
    with pytest.raises(BelowThreshold, match="after 'unmask' there are 1: c0"):
        made.run()
    assert made.coordinator.state.incidents.count("failed") == 4


@pytest.mark.parametrize("value", [1e30, float("nan"), float("inf")])
def test_values_that_do_not_fit_fail_their_site_only(value):
    made = federation(options=SecureOptions(3), rounds=1)
    run = made.client.inner.run

    def wild(ctx, kind, payload):
        update, examples = run(ctx, kind, payload)
        if ctx.name == "c1":
            update = {name: torch.full_like(x, value) for name, x in update.items()}
        return update, examples

    made.client.inner.run = wild
    result = made.run()
    [incident] = result.incidents
    assert (incident.what, incident.client) == ("failed", "c1")
    assert "OutOfRange" in incident.message and "the limit is" in incident.message
    assert result.metrics["sites"] == SITES - 1 and torch.isfinite(vector(made)).all()


def test_a_killed_run_ends_the_same(tmp_path):
    def make(store):
        return federation(rounds=2, count=3, store=store)

    assert_killed_ends_the_same(make, tmp_path, [2, 5, 8, 11, 14, 20])


def test_sampled_sites():
    made = Secure(FedAvg()).simulate(
        Point(5), local(), sites(), schedule=secure_schedule(Sync(3, Uniform(4)))
    )
    result = made.run()
    assert [row["sites"] for row in result.history] == [4, 4, 4]


def test_what_is_refused_by_name():
    with pytest.raises(ConfigurationError, match="scaffold needs more than the weighted mean"):
        Secure(Scaffold())
    with pytest.raises(ConfigurationError, match="the rule median looks at each update"):
        Secure(FedAvg(rule=Median())).begin(Point(5))
    with pytest.raises(ConfigurationError, match="use the schedule sync, not buffered"):
        secure_schedule(Buffered(3))
    with pytest.raises(ConfigurationError, match="ErrorFeedback"):
        refuse_codec(ErrorFeedback(TopK(0.1)))
    refuse_codec(None)
    names = [site.name for site in sites()]
    with pytest.raises(ConfigurationError, match="SecureServer"):
        federation(topology=Tree.balanced(names, 2)).run()
    with pytest.raises(ConfigurationError, match="eager"):
        federation(eager=True).run()
