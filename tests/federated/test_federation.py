"""The loop: schedules, topologies, faults. Each fault is named and counted, and the run goes on."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest
import torch

from anabranch.errors import ConfigurationError
from anabranch.federated import (
    Buffered,
    Deadline,
    DeviceProfile,
    Everyone,
    Federation,
    Simulation,
    Site,
    Sync,
    Tree,
    Uniform,
    Work,
)
from anabranch.federated.codecs import Cast, ErrorFeedback, Quantise, TopK
from anabranch.federated.errors import (
    EmptyRound,
    FederationError,
    NotEnoughClients,
    NotFinite,
    Stalled,
    TopologyError,
)
from anabranch.federated.events import Send
from anabranch.federated.payload import decode, encode
from anabranch.federated.randomness import generator
from tests.federated.helpers import (
    DIMENSIONS,
    EXAMPLES,
    Tamper,
    VectorClient,
    VectorServer,
    fingerprint,
    lost,
    names,
    random_order,
    sites,
    vectors,
)


def test_the_makespan_of_rounds_is_the_analytic_maximum():
    """Ten clients: each round takes exactly as long as its slowest client."""
    federation = vectors(Sync(5), 10)
    result = federation.run()
    expected = 0.0
    for version in range(5):
        durations = []
        for site in federation.runtime.sites.values():
            traffic = {
                direction: result.ledger.total(
                    direction=direction, client=site.name, version=version
                ).payload
                for direction in ("down", "up")
            }
            profile = site.profile
            durations.append(
                profile.latency_s
                + traffic["down"] / profile.down_bytes_per_s
                + 3 * profile.seconds_per_unit
                + traffic["up"] / profile.up_bytes_per_s
            )
        expected = max(expected + duration for duration in durations)
        assert result.history[version]["seconds"] == expected
    assert result.seconds == expected
    assert (result.version, result.reason) == (5, "finished")


def test_the_ledger_counts_what_was_sent():
    federation = vectors(Sync(3, Uniform(2)), 4)
    result = federation.run()
    body = len(encode(federation.server.x))
    assert result.ledger.total(direction="down").payload == 3 * 2 * body
    assert result.ledger.total(direction="up").payload == 3 * 2 * body
    assert result.ledger.total().messages == 12
    assert result.ledger.total().envelope > 0
    by_kind = result.ledger.by("direction", "kind")
    assert by_kind["down", "train"].payload == 6 * body
    assert sum(traffic.bytes for _, traffic in result.ledger) == result.ledger.total().bytes


@pytest.mark.parametrize(
    "schedule", [Sync(4, Uniform(5)), Buffered(8, 3), Deadline(4, seconds=1.5)]
)
def test_the_order_in_which_clients_execute_does_not_matter(schedule):
    def run(order):
        federation = vectors(dataclasses.replace(schedule), 7, order=order)
        federation.run()
        return fingerprint(federation)

    expected = run(None)
    for seed in range(3):
        assert run(random_order(seed)) == expected


def test_global_generators_are_left_alone_and_other_seeds_differ():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one = vectors(Sync(2))
    one.run()
    assert torch.equal(torch.get_rng_state(), before)
    other = vectors(Sync(2), seed=1)
    other.run()
    assert not torch.equal(one.server.x["x"], other.server.x["x"])


def test_everyone_reaches_the_common_optimum():
    federation = vectors(Sync(60, work=Work(steps=10)), 5)
    federation.run()
    targets = [generator("target", name).standard_normal(DIMENSIONS) for name in names(5)]
    assert np.abs(federation.server.x["x"].numpy() - np.mean(targets, 0)).max() < 0.05


def test_a_federation_of_one():
    federation = vectors(Sync(3), 1)
    assert federation.run().version == 3


def test_nobody_is_there():
    with pytest.raises(NotEnoughClients, match=r"needs 1 clients; after 60 s there are 0"):
        vectors(Sync(3), 0).run()
    with pytest.raises(Stalled, match="clients: none"):
        vectors(Buffered(3, 1), 0).run()


def test_a_federation_runs_once():
    federation = vectors(Sync(1))
    federation.run()
    with pytest.raises(FederationError, match="ran already"):
        federation.run()


# Without a barrier


def test_buffered_commits_by_number_and_reports_staleness():
    federation = vectors(Buffered(6, 3), 5)
    server = federation.server
    stale = []
    fold = server.fold

    def spy(acc, update):
        stale.append(update.staleness)
        assert update.seconds > 3 * 0.1 * (1 + int(update.client[1:]))
        return fold(acc, update)

    server.fold = spy
    result = federation.run()
    assert result.version == 6
    assert len(server.folded) == 18  # three of each commit
    assert max(stale) > 0
    times = [row["seconds"] for row in result.history]
    assert times == sorted(times)


def test_updates_that_are_too_old_are_dropped_and_their_clients_go_on():
    slow = [Site(f"c{i}", range(EXAMPLES), DeviceProfile(1.0 if i == 0 else 0.1)) for i in range(4)]
    federation = vectors(Buffered(40, 1, max_staleness=3), places=slow)
    result = federation.run()
    assert result.incidents.count("stale", "c0") >= 1
    assert result.version == 40
    assert all(client != "c0" for client, *_ in federation.server.folded)


def test_a_deadline_leaves_stragglers_out_and_counts_their_late_replies():
    places = [
        Site(f"c{i}", range(EXAMPLES), DeviceProfile(10.0 if i == 3 else 0.1)) for i in range(4)
    ]
    federation = vectors(Deadline(4, seconds=12.0), places=places)
    result = federation.run()
    assert [row["seconds"] for row in result.history] == [12.0, 24.0, 36.0, 48.0]
    assert {client for client, *_ in federation.server.folded} == {"c0", "c1", "c2"}
    assert result.incidents.count("cancelled", "c3") == 2  # replies due at 30 and 42 s, in vain


def test_enough_replies_end_a_round_early():
    federation = vectors(Deadline(3, seconds=1e6, enough=2), 5)
    result = federation.run()
    assert result.version == 3 and len(federation.server.folded) == 6
    assert result.seconds < 3


# Topologies


def test_a_tree_gives_what_a_star_gives_and_its_inner_edges_are_counted():
    star = vectors(Sync(4), 9)
    star.run()
    for tree in (
        Tree.balanced(names(9), 2),
        Tree.balanced(names(9), 4),
        Tree({"top": ["a", "c0"], "a": names(9)[1:5]}),  # the others send to the root
    ):
        federation = vectors(Sync(4), 9, topology=tree)
        result = federation.run()
        assert torch.allclose(federation.server.x["x"], star.server.x["x"], rtol=1e-12)
        inner = set(tree.children) - {tree.root}
        partial = result.ledger.by("client", "kind")
        assert {client for client, kind in partial if kind == "partial"} == inner
        assert result.ledger.total(kind="partial").messages == 4 * len(inner)


def test_folding_as_replies_come_gives_the_same_up_to_rounding():
    for schedule in (lambda: Sync(4), lambda: Buffered(6, 2)):
        held, eager = vectors(schedule(), 6), vectors(schedule(), 6, eager=True)
        held.run(), eager.run()
        assert torch.allclose(held.server.x["x"], eager.server.x["x"], rtol=1e-12)
        assert held.coordinator.state.ledger == eager.coordinator.state.ledger


def test_only_an_associative_server_has_a_tree():
    server = VectorServer()
    server.associative = False
    with pytest.raises(TopologyError, match="VectorServer needs all updates at once"):
        vectors(Sync(1), 4, server=server, topology=Tree.balanced(names(4), 2)).run()
    with pytest.raises(ConfigurationError, match="eager"):
        vectors(Sync(1), 4, server=server, eager=True).run()


# Faults


def replaced(**changes):
    return lambda task, reply: [dataclasses.replace(reply, **changes)]


def body_of(change):
    def fault(task, reply):
        payload = decode(reply.body)
        change(payload)
        return [dataclasses.replace(reply, body=encode(payload))]

    return fault


def set_nan(payload):
    payload["x"][2] = math.nan


FAULTS = {
    "NaN": (body_of(set_nan), "not finite", "reply of c1: x has 1 values that are NaN"),
    "infinity": (
        body_of(lambda p: p.update(x=torch.full_like(p["x"], math.inf))),
        "not finite",
        "x has 6 values",
    ),
    "wrong shape": (
        body_of(lambda p: p.update(x=p["x"][:3])),
        "mismatch",
        r"x should be torch.float64 \[6\], but is torch.float64 \[3\]",
    ),
    "wrong type": (body_of(lambda p: p.update(x=p["x"].float())), "mismatch", "torch.float32"),
    "extra tensor": (
        body_of(lambda p: p.update(y=torch.ones(1))),
        "mismatch",
        "y should be absent",
    ),
    "missing tensor": (body_of(lambda p: p.pop("x")), "mismatch", "x should be .*, but is absent"),
    "truncated": (
        lambda task, reply: [dataclasses.replace(reply, body=reply.body[:-5])],
        "malformed",
        "was cut off",
    ),
    "empty": (replaced(body=b""), "malformed", "too few"),
    "noise": (replaced(body=bytes(range(200))), "malformed", "header"),
    "negative examples": (replaced(examples=-5), "malformed", "-5 examples"),
    "own failure": (replaced(error="disk full", body=b""), "failed", "disk full"),
    "vanished": (lost, "lost", "c1 vanished"),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("schedule", [Sync(4), Buffered(8, 2, retry_after=0.5)])
def test_a_bad_reply_is_named_and_counted_and_the_run_goes_on(name, schedule):
    fault, what, message = FAULTS[name]
    faults = Tamper({("c1", 2): fault})
    federation = vectors(dataclasses.replace(schedule), 4, faults=faults)
    result = federation.run()
    assert result.version in (4, 8)
    assert result.incidents.count(what, "c1") == len(result.incidents) == 1
    (incident,) = result.incidents
    assert incident.client == "c1"
    assert re.search(message, incident.message)
    assert torch.isfinite(federation.server.x["x"]).all()
    # Its next tasks are accepted again.
    assert faults.seen["c1"] >= 3 or isinstance(schedule, Buffered)


def test_a_duplicate_is_ignored_but_paid_for():
    clean = vectors(Sync(3))
    clean.run()
    doubled = vectors(Sync(3), faults=Tamper({("c2", 2): lambda task, reply: [reply, reply]}))
    result = doubled.run()
    assert torch.equal(clean.server.x["x"], doubled.server.x["x"])
    assert result.incidents.count("duplicate", "c2") == 1
    assert result.ledger.total(direction="up").messages == 13


def test_nobody_replies_for_somebody_else():
    faults = Tamper(
        {("c1", 1): lambda task, reply: [dataclasses.replace(reply, client="c2"), reply]}
    )
    federation = vectors(Sync(2), faults=faults)
    assert federation.run().incidents.count("impostor", "c2") == 1
    assert [client for client, *_ in federation.server.folded][:4] == names(4)


def test_a_reply_to_a_task_that_never_was():
    faults = Tamper({("c1", 1): lambda task, reply: [dataclasses.replace(reply, task=999), reply]})
    result = vectors(Sync(2), faults=faults).run()
    assert result.incidents.count("duplicate") == 1 and result.version == 2


def test_nobody_weighs_more_than_the_data_it_declared():
    faults = Tamper({("c1", n): replaced(examples=10**9) for n in (1, 2, 3)})
    honest, lying = vectors(Sync(3)), vectors(Sync(3), faults=faults)
    honest.run()
    result = lying.run()
    assert torch.equal(honest.server.x["x"], lying.server.x["x"])
    assert result.incidents.count("examples capped", "c1") == 3
    assert max(examples for *_, examples in lying.server.folded) == EXAMPLES


def test_not_finite_values_may_be_zeroed_or_raised():
    def federation(policy):
        faults = Tamper({("c1", 2): body_of(set_nan)})
        return vectors(Sync(3), faults=faults, not_finite=policy)

    zeroed = federation("zero").run()
    assert zeroed.incidents.count("zeroed", "c1") == 1 and zeroed.version == 3
    with pytest.raises(NotFinite, match="reply of c1: x"):
        federation("raise").run()
    with pytest.raises(ConfigurationError):
        federation("ignore")


def test_a_task_is_given_up_at_its_deadline():
    class Hurried(Sync):
        def send(self, client, fed):
            return dataclasses.replace(super().send(client, fed), deadline=fed.now() + 1.0)

    federation = vectors(Hurried(3), 4)  # c3 takes 1.2 s
    result = federation.run()
    assert result.incidents.count("late", "c3") >= 3
    assert {client for client, *_ in federation.server.folded} == {"c0", "c1", "c2"}
    assert result.seconds == 3.0


def test_rounds_without_any_usable_reply_leave_the_model_and_end_after_some():
    everything = Tamper({(f"c{i}", n): lost for i in range(4) for n in range(1, 99)})
    federation = vectors(Sync(3), faults=everything)
    with pytest.raises(EmptyRound, match="version 0 got no usable reply; the last problem: c"):
        federation.run()
    assert federation.coordinator.state.incidents.count("empty round") == 4
    assert not federation.server.x["x"].any()


def test_one_empty_round_is_tried_again():
    federation = vectors(Sync(3), faults=Tamper({(f"c{i}", 2): lost for i in range(4)}))
    result = federation.run()
    assert result.version == 3
    assert result.incidents.count("empty round") == 1


def test_weights_that_are_all_zero_change_nothing():
    federation = vectors(Sync(2), places=sites(4, examples=0))
    with pytest.raises(EmptyRound, match="all weights are 0"):
        federation.run()
    assert not federation.server.x["x"].any()


def test_clients_that_always_fail_do_not_keep_a_run_alive_for_ever():
    class Broken(VectorClient):
        def run(self, ctx, kind, payload):
            raise FederationError("no sensor")

    with pytest.raises(FederationError, match=r"1001 tasks in a row .* no sensor"):
        vectors(Buffered(3, 2), client=Broken()).run()


def test_a_client_that_fails_half_way_leaves_no_trace_in_its_state():
    class Clumsy(VectorClient):
        def run(self, ctx, kind, payload):
            answer = super().run(ctx, kind, payload)
            ctx.state["memory"] += 100
            if ctx.name == "c1" and ctx.version == 1:
                raise ZeroDivisionError("oops")
            return answer

    federation = vectors(Sync(3), client=Clumsy(), strict=False)
    result = federation.run()
    assert result.incidents.count("failed", "c1") == 1
    assert len(federation.runtime.node("c1").state["tasks"]) == 2
    assert len(federation.runtime.node("c0").state["tasks"]) == 3
    with pytest.raises(ZeroDivisionError):
        vectors(Sync(3), client=Clumsy()).run()


def test_unreliable_devices():
    places = [
        Site(f"c{i}", range(EXAMPLES), DeviceProfile(0.1, availability=0.7, failure_rate=0.3))
        for i in range(6)
    ]
    one, other = (vectors(Sync(8), places=places) for _ in range(2))
    result = one.run()
    other.run()
    assert result.incidents.count("lost") > 5 and result.version == 8
    assert fingerprint(one) == fingerprint(other)


# Coming and going


def test_who_joins_takes_part_and_who_leaves_is_not_waited_for():
    places = [
        Site("stays", range(EXAMPLES), DeviceProfile(1.0)),
        Site("late", range(EXAMPLES), DeviceProfile(1.0), joins=4.0),
        Site("goes", range(EXAMPLES), DeviceProfile(1.0), leaves=7.0),
    ]
    federation = vectors(Sync(4), places=places)
    result = federation.run()
    rounds = [
        {c for c, task, _ in federation.server.folded if low <= task < high}
        for low, high in ((1, 3), (3, 5), (5, 8), (8, 10))
    ]
    assert rounds[0] == {"stays", "goes"} == rounds[1]
    assert rounds[2] == {"stays", "late"} == rounds[3]
    assert result.incidents.count("left", "goes") == 1
    assert result.incidents.count("lost", "goes") == 1


@pytest.mark.parametrize("schedule", [Buffered(9, 2), Deadline(4, seconds=5.0)])
def test_other_schedules_cope_with_joins_and_leaves(schedule):
    places = [
        Site("stays", range(EXAMPLES), DeviceProfile(1.0)),
        Site("late", range(EXAMPLES), DeviceProfile(1.0), joins=4.0),
        Site("goes", range(EXAMPLES), DeviceProfile(1.0), leaves=7.0),
    ]
    federation = vectors(schedule, places=places)
    federation.run()
    assert {client for client, *_ in federation.server.folded} == {"stays", "late", "goes"}


def test_a_round_waits_for_enough_clients():
    places = [Site("a", range(5)), Site("b", range(5), joins=30.0)]
    result = vectors(Sync(2, Everyone(2)), places=places).run()
    assert result.seconds == 30.0
    with pytest.raises(NotEnoughClients, match=r"needs 2 clients; after 10 s there are 1: a"):
        vectors(Sync(2, Everyone(2), join_timeout=10.0), places=places).run()


# Codecs and the rest


def test_codecs_act_in_both_directions_and_save_bytes():
    plain, coded = vectors(Sync(3)), vectors(Sync(3), codec=Cast("bf16"), down=Quantise(8))
    plain.run()
    result = coded.run()
    assert (plain.server.x["x"] - coded.server.x["x"]).abs().max() < 0.05
    assert not torch.equal(plain.server.x["x"], coded.server.x["x"])
    assert {kind for _, _, kind in result.ledger.by("client", "direction", "kind")} == {"train"}


def test_what_a_codec_held_back_for_a_refused_reply_is_owed_again():
    """The residual of a message that was in vain is taken back: nothing leaks from the sum."""
    codec = ErrorFeedback(TopK(0.2))
    faults = Tamper({("c0", 2): lost})
    federation = vectors(Sync(4), 1, codec=codec, faults=faults, patience=9)
    changes = []
    client = federation.client
    run = client.run

    def spy(ctx, kind, payload):
        answer, examples = run(ctx, kind, payload)
        changes.append(answer["x"].clone())
        return answer, examples

    client.run = spy
    federation.run()
    counted = [change for index, change in enumerate(changes) if index != 1]
    residual = federation.runtime.node("c0")._personal["codec"]["residual"]["x"]
    total = federation.server.x["x"] + residual
    assert torch.allclose(total, sum(counted), atol=1e-12)


def test_a_second_task_at_once_takes_nothing_back_that_is_still_awaited():
    """Two tasks of one client overlap: both count, and the residual is that of both."""

    class Twice(Sync):
        def begin(self, fed):
            return [action for action in super().begin(fed) for _ in range(2)]

    codec = ErrorFeedback(TopK(0.2))
    federation = vectors(Twice(1), 1, codec=codec)
    changes = []
    run = federation.client.run

    def spy(ctx, kind, payload):
        answer, examples = run(ctx, kind, payload)
        changes.append(answer["x"].clone())
        return answer, examples

    federation.client.run = spy
    federation.run()
    residual = federation.runtime.node("c0")._personal["codec"]["residual"]["x"]
    sent = 2 * federation.server.x["x"]  # the mean of the two messages
    assert torch.allclose(sent + residual, sum(changes), atol=1e-12)


def test_a_client_cannot_set_the_clock_of_the_history():
    class Says(VectorClient):
        def run(self, ctx, kind, payload):
            ctx.report(seconds=-1.0)
            return super().run(ctx, kind, payload)

    assert vectors(Sync(1), client=Says()).run().metrics["seconds"] > 0


def test_metrics_of_clients_are_weighted_by_examples():
    places = [Site("a", range(1)), Site("b", range(3))]

    class Says(VectorClient):
        def run(self, ctx, kind, payload):
            ctx.report(size=float(len(ctx.data)))
            return {"x": payload["x"]}, len(ctx.data)

    result = vectors(Sync(1), places=places, client=Says()).run()
    assert result.metrics["size"] == (1 * 1 + 3 * 3) / 4
    assert "norm" in result.metrics


def test_watch_sees_every_version():
    seen = []
    result = vectors(Sync(3), watch=lambda c: seen.append(c.version) or {"v": c.version}).run()
    assert seen == [1, 2, 3]
    assert [row["v"] for row in result.history] == [1, 2, 3]


def test_schedule_options_that_cannot_work():
    for make in (
        lambda: Sync(0),
        lambda: Buffered(0, 1),
        lambda: Buffered(1, 0),
        lambda: Deadline(1, seconds=0.0),
        lambda: Deadline(1, enough=0),
        lambda: Uniform(0),
        lambda: Uniform(1.5),
        lambda: Simulation([Site("a"), Site("a")]),
    ):
        with pytest.raises(ConfigurationError):
            make()


def test_a_schedule_cannot_send_to_strangers():
    class Confused(Sync):
        def begin(self, fed):
            return [Send("nobody")]

    with pytest.raises(FederationError, match="Confused sends to 'nobody'"):
        vectors(Confused(1)).run()
    assert isinstance(vectors(Sync(1)), Federation)
