"""FedCompass: groups that arrive together, by a script and in simulation."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import ConfigurationError
from anabranch.evaluation.testbeds import digits
from anabranch.federated import DeviceProfile, Federation, Simulation, Site, Sync, Uniform
from anabranch.federated.errors import EmptyRound
from anabranch.federated.runtimes import Lost
from anabranch.federated.scheduling.compass import Compass
from anabranch.federated.server import ServerContext, Update
from anabranch.federated.strategies import FedAvg
from anabranch.federated.strategies.fedcompass import FedCompass
from anabranch.federated.topologies import Star
from tests.federated.helpers import (
    EXAMPLES,
    VectorClient,
    VectorServer,
    assert_killed_ends_the_same,
)


class Recorder(Compass):
    """Notes the tasks that it gives out: client, when, steps, and when its group is due."""

    def on(self, event, fed):
        actions = super().on(event, fed)
        for action in actions:
            if type(action).__name__ == "Send":
                due = self.newest()[action.client].due
                entry = (action.client, fed.now(), action.work.steps, due)
                self.__dict__.setdefault("log", []).append(entry)
        given = {action.client for action in actions if type(action).__name__ == "Send"}
        self.check_integrity(given | {task.client for task in fed.in_flight.values()})
        return actions

    def newest(self):
        return {bar.client: bar for bar in self.timeline().bars}

    def check_integrity(self, working):
        """Nobody is forgotten, and groups are what they say."""
        newest = self.newest()
        for name, group in self.groups.items():
            assert group["working"], f"{name} waits for nobody"
            for client in group["working"] + group["arrived"]:
                assert newest[client].group == name
        assert all(self.min_steps <= bar.steps <= self.max_steps for bar in newest.values())
        assert {bar.client for bar in newest.values() if bar.how == "working"} == working


class Grouped(VectorServer):
    """Notes the tasks of each version."""

    def __init__(self):
        super().__init__()
        self.versions = []

    def fold(self, acc, update):
        tasks = [*(acc or {}).get("tasks", []), (update.client, update.task)]
        return {**super().fold(acc, update), "tasks": tasks}

    def commit(self, acc):
        self.versions.append(acc["tasks"])
        return super().commit(acc)


def federation(seconds, schedule, faults=None, **changes):
    """Clients that need these seconds for a step."""
    sites = [
        Site(f"c{i}", range(EXAMPLES), DeviceProfile(each, **changes))
        for i, each in enumerate(seconds)
    ]
    return Federation(Grouped(), VectorClient(), schedule, Simulation(sites, faults=faults))


def test_equal_clients_are_one_group_from_the_second_task_on():
    schedule = Recorder(6)
    made = federation([0.1, 0.1], schedule)
    made.run()
    assert [len(tasks) for tasks in made.server.versions] == [1, 1, 2, 2, 2, 2]
    assert all(steps == 100 for _, _, steps, _ in schedule.log)


def test_a_client_three_times_as_slow_does_a_third_and_ends_at_the_same_time():
    schedule = Recorder(12)
    made = federation([0.1, 0.3], schedule)
    made.run()
    together = [tasks for tasks in made.server.versions if len(tasks) == 2]
    assert len(together) >= 5
    last = {client: (steps, due) for client, _, steps, due in schedule.log}
    assert last["c0"][0] == 100
    assert last["c1"][0] == pytest.approx(100 / 3, abs=1)
    assert last["c0"][1] == last["c1"][1]


def test_clients_beyond_the_ratio_of_steps_have_groups_of_their_own():
    made = federation([0.1, 2.0], Recorder(40))
    made.run()
    later = made.server.versions[2:]
    fast = [tasks for tasks in later if {c for c, _ in tasks} == {"c0"}]
    assert len(fast) >= 15


def test_who_is_late_counts_in_the_next_commit_once():
    """c1's third task takes ten times as long as it should."""
    schedule = Recorder(14, latest_factor=1.2)
    made = federation([0.1, 0.1, 0.1], schedule)
    work = made.runtime._push
    seen = {"c1": 0}

    def slowed(at, rank, number, happened):
        reply = getattr(happened, "reply", None)
        if reply is not None and reply.client == "c1":
            seen["c1"] += 1
            if seen["c1"] == 3:
                at += 90.0
                seen["task"] = reply.task
        work(at, rank, number, happened)

    made.runtime._push = slowed
    made.run()
    containing = [tasks for tasks in made.server.versions if ("c1", seen["task"]) in tasks]
    assert len(containing) == 1
    assert len(containing[0]) == 3  # the two others' group, and the late one
    assert not any(
        ("c1", seen["task"]) in tasks and len(tasks) == 1 for tasks in made.server.versions
    )
    # The group without it was committed when its time was up, not when it came.
    assert any({c for c, _ in tasks} == {"c0", "c2"} for tasks in made.server.versions)
    # Slow once, it is believed to be slow until it is measured again.
    steps = [steps for client, _, steps, _ in schedule.log if client == "c1"]
    assert 20 in steps


def test_a_client_that_becomes_slower_gets_fewer_steps_within_two_tasks():
    schedule = Recorder(30)
    made = federation([0.1, 0.1], schedule)
    work = made.runtime._push

    def slowed(at, rank, number, happened):
        reply = getattr(happened, "reply", None)
        if reply is not None and reply.client == "c1" and made.coordinator.state.now > 45:
            at += 2 * reply.units * 0.1
        work(at, rank, number, happened)

    made.runtime._push = slowed
    made.run()
    after = [(at, steps) for client, at, steps, _ in schedule.log if client == "c1" and at > 45]
    assert min(steps for _, steps in after[:3]) < 50


def test_who_does_less_than_told_is_judged_by_what_it_did(caplog):
    class Half(VectorClient):
        def run(self, ctx, kind, payload):
            ctx.work = dataclasses.replace(ctx.work, steps=ctx.work.steps // 2)
            return super().run(ctx, kind, payload)

    schedule = Recorder(4)
    sites = [Site("c0", range(EXAMPLES), DeviceProfile(0.1))]
    Federation(Grouped(), Half(), schedule, Simulation(sites)).run()
    assert schedule.speeds["c0"] == pytest.approx(0.1)
    assert "c0 did 50 steps and not the 100 that it was given" in caplog.text


@settings(deadline=None, max_examples=15)
@given(
    seconds=st.lists(st.floats(0.01, 5.0), min_size=1, max_size=7),
    failures=st.sampled_from([0.0, 0.2]),
    jitter=st.sampled_from([0.0, 0.3]),
    leaving=st.booleans(),
)
def test_every_result_is_in_one_version_and_nobody_is_forgotten(seconds, failures, jitter, leaving):
    schedule = Recorder(40, latest_factor=1.1, retry_after=0.5)
    made = federation(seconds, schedule, failure_rate=failures, jitter=jitter)
    if leaving and len(seconds) > 1:
        gone = made.runtime.sites["c0"]
        made.runtime.sites["c0"] = Site("c0", gone.data, gone.profile, leaves=150 * seconds[0])
    result = made.run()
    assert result.version == 40
    tasks = list(itertools.chain(*made.server.versions))
    assert len(tasks) == len(set(tasks))
    # The last version holds everything that has arrived: nothing was lost.
    assert made.coordinator.held() == 0
    assert len(tasks) == result.ledger.total(direction="up").messages
    if failures:
        return  # a client may be waiting for its retry
    for client in made.coordinator.clients:
        waits = any(client in group["arrived"] for group in schedule.groups.values())
        assert waits or made.coordinator.busy(client) or client in schedule.free


def test_a_group_whose_last_worker_fails_is_committed_and_the_worker_comes_back():
    count = {"c1": 0}

    def fails_once(task, reply):
        count[task.client] = count.get(task.client, 0) + 1
        if task.client == "c1" and count["c1"] == 2:
            return [Lost(task.id, "gone")]
        return [reply]

    made = federation([0.1, 0.101], Recorder(12), faults=fails_once)
    assert made.run().version == 12
    assert ["c0"] in [[c for c, _ in tasks] for tasks in made.server.versions[2:]]
    assert sum(len(tasks) == 2 for tasks in made.server.versions) >= 3


def server(**options):
    made = FedCompass(**options).server({"x": torch.zeros(1, dtype=torch.float64)})
    made.setup(ServerContext(0, {"a": 30, "b": 10}, Star()))
    return made


def update(client, change, staleness=0, steps=10.0, examples=5):
    tensors = {"x": torch.tensor([change], dtype=torch.float64)}
    return Update(1, client, "train", 0, tensors, examples, staleness, steps, 1.0, {})


def test_weights_by_hand():
    made = server(alpha=0.8, staleness=0.5)
    acc = made.fold(made.fold(None, update("a", 1.0)), update("b", 2.0, staleness=3))
    made.commit(acc)
    assert float(made.tensors["x"]) == pytest.approx(0.8 * (0.75 * 1.0 + 0.25 * 0.5 * 2.0))


def test_normalised_by_steps_by_hand():
    made = server(alpha=1.0, normalise=True)
    acc = made.fold(None, update("a", 1.0, steps=100))
    acc = made.merge(acc, made.fold(None, update("b", 2.0, steps=20)))
    made.commit(acc)
    assert float(made.tensors["x"]) == pytest.approx(60 * (0.75 * 1.0 / 100 + 0.25 * 2.0 / 20))


def test_momentum_by_hand():
    made = server(alpha=1.0, momentum=0.9)
    x, velocity = 0.0, 0.0
    for change in (1.0, -0.5, 0.25):
        made.commit(made.fold(None, update("a", change)))
        velocity = 0.9 * velocity + 0.75 * change
        x += velocity
    assert float(made.tensors["x"]) == pytest.approx(x)


def test_updates_without_examples_change_nothing():
    made = server(momentum=0.9, normalise=True)
    with pytest.raises(EmptyRound):
        made.commit(made.fold(None, update("a", 1.0, examples=0)))
    assert float(made.tensors["x"]) == 0.0


def test_with_a_barrier_and_alpha_one_it_is_fedavg():
    parts = [list(range(40)), list(range(40, 60)), list(range(60, 90))]

    def run(strategy):
        sites = [Site(f"c{i}", part) for i, part in enumerate(parts)]
        made = strategy.simulate(
            digits.perceptron(), digits.local(steps=5), sites, schedule=Sync(2)
        )
        made.run()
        return made.server.tensors

    averaged, compass = run(FedAvg()), run(FedCompass(alpha=1.0))
    normalised = run(FedCompass(alpha=1.0, normalise=True))
    for name, tensor in averaged.items():
        assert torch.allclose(compass[name], tensor, atol=1e-6)
        assert torch.allclose(normalised[name], tensor, atol=1e-6)


def test_killed_in_the_middle_of_a_group_it_ends_the_same(tmp_path):
    def make(store):
        sites = [
            Site(f"c{i}", list(range(20 * i, 20 * i + 20)), DeviceProfile(0.1 * (i + 1)))
            for i in range(4)
        ]
        strategy = FedCompass(max_steps=10, min_steps=2, momentum=0.5)
        return strategy.simulate(digits.perceptron(), digits.local(), sites, 12, store=store)

    assert_killed_ends_the_same(make, tmp_path, (2, 9))


@pytest.mark.parametrize(
    "make",
    [
        lambda: FedCompass(alpha=0),
        lambda: FedCompass(staleness=-1),
        lambda: FedCompass(momentum=1.0),
        lambda: FedCompass(importance="size"),
        lambda: FedCompass(min_steps=30, max_steps=20),
        lambda: FedCompass(speed_momentum=0),
        lambda: FedCompass(latest_factor=0.9),
        lambda: FedCompass().schedule(3, Uniform(2)),
        lambda: Compass(0),
        lambda: Compass(3, retry_after=0),
    ],
)
def test_bad_options_are_named(make):
    with pytest.raises(ConfigurationError):
        make()
