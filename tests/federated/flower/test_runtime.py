"""The federation's messages through a grid: the same results as in simulation, and faults."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("flwr", reason="Flower is not installed; it needs an environment of its own")

from flwr.app import ConfigRecord, Error, Message, RecordDict

from anabranch.errors import ConfigurationError
from anabranch.federated import Reply, Simulation, Task
from anabranch.federated.errors import FederationError, NotEnoughClients, PayloadError
from anabranch.federated.runtimes import ClientJoined, ClientLeft
from anabranch.federated.runtimes.flower import Flower, client_app
from anabranch.federated.runtimes.flower.letter import RECORD, VALUE, Letter
from anabranch.federated.runtimes.flower.resident import Resident, stop_residents
from tests.federated.flower.grids import LocalGrid, context
from tests.federated.flower.sites import federation
from tests.federated.helpers import EXAMPLES, names
from tests.federated.helpers import sites as simulated_sites

SITE = "tests.federated.flower.sites:site"


@pytest.fixture
def nodes(tmp_path: Path):
    """A grid of two nodes with real residents; afterwards none is left."""
    app = client_app(SITE)
    grid = LocalGrid((21, 22), app)
    for index, node in enumerate((21, 22)):
        grid.contexts[node] = context(node, index=index, folder=str(tmp_path / str(node)))
    yield grid
    for node in (21, 22):
        stop_residents(tmp_path / str(node))
    assert not residents(tmp_path)


def residents(folder: Path):
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "anabranch.federated.runtimes.flower.resident" in (process.info["cmdline"] or [])
        and str(folder) in process.info["cmdline"][-1]
    ]


def reference():
    made = federation(Simulation(simulated_sites(2)))
    return made, made.run()


@pytest.mark.slow
def test_parameters_and_payload_bytes_are_those_of_simulation(nodes, tmp_path) -> None:
    expected, result = reference()
    made = federation(Flower(nodes, clients=2, join_timeout=60))
    got = made.run()
    assert made.server.x["x"].equal(expected.server.x["x"])
    accounts = ("direction", "client", "kind", "version")
    ours, theirs = got.ledger.by(*accounts), result.ledger.by(*accounts)
    assert ours.keys() == theirs.keys()
    assert all(ours[k].payload == theirs[k].payload for k in ours)
    assert {row["pid"] for row in got.history} != {float(os.getpid())}
    assert len({row["pid"] for row in got.history}) == 1  # one process for all messages of a node
    assert len(residents(tmp_path)) == 2
    for message in nodes.pushed:
        (record,) = message.content.values()
        (value,) = record.values()
        assert isinstance(value, bytes)


@pytest.mark.slow
def test_a_killed_resident_is_started_again_and_the_task_takes_effect_once(nodes, tmp_path) -> None:
    expected, _ = reference()
    working = nodes.answer
    killed = []

    def answer(message, context):
        letter = Letter.from_bytes(message.content.config_records[RECORD][VALUE])
        if letter.kind == "task" and Task.from_bytes(letter.body).version == 1 and not killed:
            working(message, context)  # it is done and stored, but Flower lost the answer
            (process,) = residents(tmp_path / "21")
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            killed.append(process.pid)
        return working(message, context)

    nodes.answer = answer
    made = federation(Flower(nodes, clients=2, join_timeout=60))
    made.run()
    assert killed and made.server.x["x"].equal(expected.server.x["x"])


@pytest.mark.slow
def test_a_killed_coordinator_goes_on(nodes, tmp_path) -> None:
    expected, _ = reference()

    class Crash(BaseException):
        pass

    def die(coordinator):
        raise Crash

    store = tmp_path / "run"
    dying = federation(Flower(nodes, clients=2, run="one", join_timeout=60), store=store)
    dying.coordinator.watch = die
    with pytest.raises(Crash):
        dying.run()
    again = federation(Flower(nodes, clients=2, run="one", join_timeout=60), store=store)
    again.resume()
    assert again.server.x["x"].equal(expected.server.x["x"])


@pytest.mark.slow
def test_a_site_that_cannot_be_made(tmp_path) -> None:
    resident = Resident(str(tmp_path), "tests.federated.flower.sites:nowhere", {})
    with pytest.raises(FederationError, match=r"cannot be made.*nowhere"):
        resident.ask(Letter("who").to_bytes())
    with pytest.raises(ConfigurationError, match="module:function, not 'x'"):
        client_app("x")
    stop_residents(tmp_path)


@pytest.mark.slow
def test_a_resident_leaves_when_nothing_comes(tmp_path) -> None:
    resident = Resident(str(tmp_path), SITE, {"index": 3}, keep_alive=0.2)
    here = Letter.from_bytes(resident.ask(Letter("who").to_bytes()))
    assert here == Letter("here", {"name": "c3", "examples": EXAMPLES})
    until = time.monotonic() + 20
    while residents(tmp_path) and time.monotonic() < until:
        time.sleep(0.05)
    assert not residents(tmp_path)


# Faults of nodes that answer in this process


def fake(tasks, name=lambda node: f"c{node}"):
    """Says who it is, and lets ``tasks(message)`` answer the rest."""

    def answer(message, context):
        letter = Letter.from_bytes(message.content.config_records[RECORD][VALUE])
        if letter.kind != "who":
            return tasks(message)
        here = Letter("here", {"name": name(context.node_id), "examples": EXAMPLES})
        return sent(here.to_bytes(), message)

    return answer


def sent(data, message):
    return Message(RecordDict({RECORD: ConfigRecord({VALUE: data})}), reply_to=message)


@pytest.mark.parametrize(
    ("tasks", "says"),
    [
        (lambda m: Message(Error(1, "out of memory"), reply_to=m), "out of memory"),
        (lambda m: Message(RecordDict({}), reply_to=m), "no.* of a node that runs client_app"),
        (lambda m: sent(b"\xff\xff\xff\xff{}", m), "cut off"),
        (lambda m: sent(Letter("problem", {"reason": "disk full"}).to_bytes(), m), "disk full"),
        (
            lambda m: sent(
                Letter("reply", body=Reply(99, "c0", "train", 0).to_bytes()).to_bytes(), m
            ),
            "replied to task 99",
        ),
    ],
)
def test_what_is_wrong_with_an_answer_is_said(tasks, says) -> None:
    made = federation(Flower(LocalGrid((0,), fake(tasks))), patience=1)
    with pytest.raises(FederationError):
        made.run()
    found = [i for i in made.coordinator.state.incidents if i.what == "lost"]
    assert found
    assert re.search(says, found[0].message), found[0].message


def test_too_few_nodes_and_why(tmp_path) -> None:
    grid = LocalGrid((1, 2), fake(None, name=lambda node: "same"))
    with pytest.raises(NotEnoughClients, match=r"there are: same; node .* same is the name of"):
        federation(Flower(grid, clients=2, join_timeout=1.0)).run()


def test_a_grid_that_breaks_ends_the_run() -> None:
    class Broken(LocalGrid):
        def get_node_ids(self):
            raise ConnectionError("the SuperLink is gone")

    with pytest.raises(FederationError, match="the SuperLink is gone"):
        federation(Flower(Broken((1,), fake(None)))).run()


def test_nodes_that_come_and_go_are_told() -> None:
    class Told(Exception):
        pass

    def tasks(message):
        grid.there = [2, 3]  # node 1 is gone, whoever was asked
        time.sleep(0.2)
        return Message(Error(1, "no"), reply_to=message)

    grid = LocalGrid((1, 2), fake(tasks))
    made = federation(Flower(grid, clients=2, join_timeout=10), patience=10**6)
    handle, heard = made.coordinator.handle, []

    def listen(happened):
        handle(happened)
        if isinstance(happened.input, ClientLeft | ClientJoined):
            heard.append(happened.input)
            if len(heard) == 2:
                raise Told

    made.coordinator.handle = listen
    with pytest.raises(Told):
        made.run()
    assert heard == [ClientLeft("c1"), ClientJoined("c3", EXAMPLES)]
    assert made.coordinator.clients == ["c2", "c3"]


@pytest.mark.parametrize("options", [{"clients": 0}, {"ttl": 0.0}, {"run": "../x"}])
def test_options_that_cannot_be(options) -> None:
    with pytest.raises(ConfigurationError):
        Flower(LocalGrid((), None), **options)


def test_letters() -> None:
    letter = Letter("task", {"run": "r", "agreement": {"seed": 1}}, b"\x00body")
    assert Letter.from_bytes(letter.to_bytes()) == letter
    data = letter.to_bytes()
    for spoiled in (
        b"",
        data[:3],
        data[:10],
        b"\x02\x00\x00\x00[]",
        b"\x02\x00\x00\x00{}",
        b"\0" * 9,
    ):
        with pytest.raises(PayloadError):
            Letter.from_bytes(spoiled)
    assert json.loads(data[4 : 4 + int.from_bytes(data[:4], "little")])["kind"] == "task"
    assert names(2) == ["c0", "c1"]
