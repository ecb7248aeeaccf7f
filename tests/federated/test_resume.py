"""A federation that was cut off ends as if it had not been: parameters, ledger, virtual time."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from anabranch import registry
from anabranch.federated import Buffered, Deadline, DeviceProfile, Everyone, Site, Sync
from anabranch.federated.codecs import ErrorFeedback, Identity, TopK
from anabranch.federated.errors import (
    FederationError,
    NotEnoughClients,
    SnapshotMismatch,
    StoreError,
)
from anabranch.federated.messages import Task
from anabranch.federated.node import Agreement, Node
from anabranch.federated.payload import encode
from anabranch.federated.store import ClientStore, RunStore, read_state, write_state
from anabranch.federated.wire import Wire
from tests.federated.exchange import BATCHES, HeadClient, split_learning
from tests.federated.helpers import (
    EXAMPLES,
    Crash,
    VectorClient,
    VectorServer,
    crash_after,
    fingerprint,
    sites,
    vectors,
)


@pytest.fixture(scope="module")
def crashed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crashing")
    command = [sys.executable, "-m", "tests.federated.crashing", str(folder), "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


CASES = (
    "fedadam",
    "fedavg",
    "fedex",
    "fedit",
    "fed-sb",
    "ffa",
    "offsite",
    "fedprox",
    "pfedme",
    "fedamd",
    "fedpage",
    "fedavg_m",
    "scaffold",
    "scaffold_m",
    "scafcom",
    "scallion",
    "fedkseed",
    "fedkseed-pro",
    "ferret",
    "ferret, pooled",
    "just-one-byte",
    "fedasync",
    "fedbuff",
    "fedfix",
    "fedcompass",
    "dfedavgm",
    "dfedsam",
    "dfedsam-mgs",
    "sampled, with error feedback",
    "buffered",
    "deadline",
    "tree",
    "robust",
    "gossip",
    "split learning",
)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_at_random_writes_and_resumed(crashed, case):
    outcome = crashed[case]
    assert isinstance(outcome["whole"], dict), outcome["whole"]
    assert outcome["killed"] == outcome["whole"]
    assert len(outcome["left_at"]) >= 1, "it was never killed"


@pytest.mark.slow
def test_every_registered_strategy_is_among_them(crashed):
    assert set(registry.available("strategies")) <= set(crashed)
    assert set(crashed) == set(CASES)


SCHEDULES = {
    "sync": lambda: Sync(4),
    "buffered": lambda: Buffered(8, 2),
    "deadline": lambda: Deadline(4, seconds=1.0),
}


@pytest.mark.parametrize("inputs", [1, 2, 5, 9, 13])
@pytest.mark.parametrize("name", SCHEDULES)
def test_sites_that_outlive_the_coordinator_train_each_task_once(tmp_path, name, inputs):
    codec = ErrorFeedback(TopK(0.5))
    whole = vectors(SCHEDULES[name](), codec=codec, store=tmp_path / "whole")
    whole.run()
    client = VectorClient()
    store = crash_after(inputs)(tmp_path / "parts")
    first = vectors(SCHEDULES[name](), codec=codec, store=store, client=client)
    with pytest.raises(Crash):
        first.run()
    second = vectors(SCHEDULES[name](), codec=codec, store=tmp_path / "parts", client=client)
    second.resume()
    assert fingerprint(second) == fingerprint(whole)
    assert sorted(client.executed) == sorted(whole.client.executed)
    assert len(set(client.executed)) == len(client.executed), "a task was trained twice"


def test_a_site_answers_a_task_that_comes_again_without_training(tmp_path):
    client = VectorClient()
    agreement = Agreement(client, 0, Wire(), Identity(), Identity(), tmp_path)

    def task(number, settled):
        body = encode(VectorServer().x)
        return Task(number, "a/b", "train", 0, 0.0, exchange=number, settled=settled, body=body)

    node = Node("a/b", agreement, range(3))
    first = node.handle(task(4, 4))
    assert node.handle(task(4, 4)) == first
    node.handle(task(6, 4))
    reborn = Node("a/b", agreement, range(3))
    assert reborn.handle(task(4, 4)) == first
    assert reborn.state["tasks"] == [4, 6] and client.executed == [("a/b", 4), ("a/b", 6)]
    assert torch.equal(reborn.state["memory"], node.state["memory"])
    reborn.handle(task(9, 6))
    with pytest.raises(FederationError, match="a/b has forgotten task 4"):
        reborn.handle(task(4, 4))


def test_an_exchange_is_taken_up_again_after_its_site_was_killed(tmp_path):
    """A new process for every message: the graph is built anew from the stored tasks."""
    undisturbed = split_learning(clients=1)
    undisturbed.run()
    federation = split_learning(tmp_path, clients=1)
    runtime = federation.runtime
    work = runtime._work

    def in_a_new_process(task):
        runtime.nodes.clear()
        work(task)

    runtime._work = in_a_new_process
    federation.run()
    assert torch.equal(federation.server.head["head"], undisturbed.server.head["head"])
    assert federation.runtime.node("c0").state["batches"] == 4 * BATCHES


def test_an_exchange_that_nobody_remembers(tmp_path):
    agreement = Agreement(HeadClient(), 0, Wire(), Identity(), Identity(), tmp_path)
    task = Task(7, "a", "back", 0, 0.0, exchange=5, body=encode({}))
    reply = Node("a", agreement, range(1)).handle(task)
    assert "exchange 5, which it does not know" in reply.error


def test_split_learning_counts_four_messages_a_batch():
    federation = split_learning(clients=2)
    result = federation.run()
    kinds = {kind: t.messages for (kind,), t in result.ledger.by("kind").items()}
    assert kinds == {"train": 16, "body": 2 * 4 * BATCHES * 2, "back": 2 * 4 * BATCHES * 2}


def interrupted(folder, inputs=5, schedule=None, **options):
    federation = vectors(schedule or Sync(4), store=crash_after(inputs)(folder), **options)
    with pytest.raises(Crash):
        federation.run()


def test_a_torn_last_event_is_awaited_again(tmp_path):
    whole = vectors(Sync(4), store=tmp_path / "whole")
    whole.run()
    interrupted(tmp_path / "parts", 7)
    journal = max((tmp_path / "parts").glob("journal-*"))
    os.truncate(journal, journal.stat().st_size - 3)
    again = vectors(Sync(4), store=tmp_path / "parts")
    again.resume()
    assert fingerprint(again) == fingerprint(whole)


def test_a_damaged_snapshot_falls_back_on_the_one_before(tmp_path, caplog):
    whole = vectors(Sync(4), store=tmp_path / "whole")
    whole.run()
    interrupted(tmp_path / "parts", 10)
    newest = max((tmp_path / "parts").glob("snapshot-*"))
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(bytes(data))
    again = vectors(Sync(4), store=tmp_path / "parts")
    again.resume()
    assert "is damaged" in caplog.text
    assert fingerprint(again) == fingerprint(whole)


def test_a_gap_in_the_journals_is_not_passed_over(tmp_path):
    interrupted(tmp_path, 10)
    newest = max(tmp_path.glob("snapshot-*"))
    newest.write_bytes(b"")
    older = sorted(tmp_path.glob("journal-*"))[0]
    os.truncate(older, older.stat().st_size - 3)
    with pytest.raises(StoreError, match="events 7 to 8 are missing"):
        vectors(Sync(4), store=tmp_path).resume()


def test_killed_between_a_snapshot_and_its_journal(tmp_path):
    whole = vectors(Sync(4), store=tmp_path / "whole")
    whole.run()
    interrupted(tmp_path / "parts", 9)
    max((tmp_path / "parts").glob("journal-*")).unlink()
    again = vectors(Sync(4), store=tmp_path / "parts")
    again.resume()
    assert fingerprint(again) == fingerprint(whole)


def test_a_new_run_does_not_take_over_what_other_sites_stored(tmp_path):
    vectors(Sync(2), store=tmp_path).run()
    for path in tmp_path.glob("snapshot-*"):
        path.unlink()
    with pytest.raises(StoreError, match="holds a run already"):
        vectors(Sync(2), store=tmp_path).run()


def test_a_finished_run_gives_its_result_again_and_is_not_overwritten(tmp_path):
    first = vectors(Sync(3), store=tmp_path)
    result = first.run()
    again = vectors(Sync(3), store=tmp_path).resume()
    assert again.history == result.history and again.ledger == result.ledger
    with pytest.raises(StoreError, match=r"holds a run already; resume\(\) goes on"):
        vectors(Sync(3), store=tmp_path).run()


def test_another_run_is_refused_with_the_difference(tmp_path):
    interrupted(tmp_path)
    for changed, says in (
        (vectors(Sync(5), store=tmp_path), r"schedule.rounds: 4 .* 5 now"),
        (vectors(Sync(4), store=tmp_path, seed=3), r"seed: 0 .* 3 now"),
        (vectors(Buffered(4, 2), store=tmp_path), r"schedule.schedule: 'Sync' .* 'Buffered' now"),
        (vectors(Sync(4), store=tmp_path, codec=TopK(0.1)), r"codec: 'Identity\(\)'"),
    ):
        with pytest.raises(SnapshotMismatch, match=says):
            changed.resume()
    vectors(Sync(4), store=tmp_path).resume()


def test_nothing_to_resume(tmp_path):
    with pytest.raises(StoreError, match="no run to resume"):
        vectors(Sync(4), store=tmp_path / "empty").resume()
    with pytest.raises(StoreError, match="no store"):
        vectors(Sync(4)).resume()


def test_one_process_at_a_time(tmp_path):
    store = RunStore(tmp_path)
    store.open()
    with pytest.raises(StoreError, match="in use"):
        vectors(Sync(1), store=tmp_path).run()
    store.close()
    vectors(Sync(1), store=tmp_path).run()


def test_a_run_that_gave_up_goes_on_when_clients_come(tmp_path):
    schedule = Everyone(3)
    with pytest.raises(NotEnoughClients):
        vectors(Sync(2, schedule), 2, store=tmp_path).run()
    federation = vectors(Sync(2, schedule), 3, store=tmp_path)
    assert federation.resume().version == 2


def test_who_left_while_the_coordinator_was_down_is_not_waited_for(tmp_path):
    interrupted(tmp_path, 5)
    smaller = vectors(Sync(4), places=sites(4)[:3], store=tmp_path)
    result = smaller.resume()
    assert result.version == 4
    assert result.incidents.count("left", "c3") == 1


@pytest.mark.parametrize("name", ["plain", "a/b", "..", ".", "", "ü %2F", "a" * 60])
def test_client_names_are_files_of_their_own(tmp_path, name):
    store = ClientStore(tmp_path / "clients", name)
    assert store.load() is None
    store.save({"n": 1})
    assert ClientStore(tmp_path / "clients", name).load() == {"n": 1}
    assert store.path.parent == tmp_path / "clients"
    others = {ClientStore(tmp_path, other).path for other in ("plain", "a/b", "..", ".", "", "%")}
    assert len(others) == 6


def test_state_files_know_when_they_are_damaged(tmp_path):
    path = tmp_path / "state"
    write_state(path, {"x": torch.arange(3), "b": b"abc"})
    assert read_state(path)["b"] == b"abc"
    data = path.read_bytes()
    for damaged in (b"", data[:-1], data[:50], data + b"x", b"x" + data):
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match="damaged"):
            read_state(path)
    with pytest.raises(StoreError, match="cannot be read"):
        read_state(tmp_path / "nothing")


def test_personal_state_survives_a_run_that_is_over(tmp_path):
    vectors(Sync(3), store=tmp_path).run()
    node = Node(
        "c1",
        Agreement(VectorClient(), 0, Wire(), Identity(), Identity(), tmp_path / "clients"),
        range(EXAMPLES),
    )
    assert len(node.state["tasks"]) == 3


def test_a_slow_reply_that_was_given_up_arrives_after_the_resume_too(tmp_path):
    def places():
        return [
            Site(f"c{i}", range(EXAMPLES), DeviceProfile(1.0 if i == 2 else 0.1)) for i in range(3)
        ]

    def run(store):
        return vectors(Deadline(5, seconds=2.0), places=places(), store=store)

    whole = run(tmp_path / "whole")
    whole.run()
    assert whole.coordinator.state.incidents.count("cancelled", "c2") >= 2
    for inputs in range(1, 16, 2):
        folder = tmp_path / str(inputs)
        with pytest.raises(Crash):
            run(crash_after(inputs)(folder)).run()
        again = run(folder)
        again.resume()
        assert fingerprint(again) == fingerprint(whole)
