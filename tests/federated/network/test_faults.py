"""Whatever happens on the way, a run over a network ends with the undisturbed run's parameters."""

from __future__ import annotations

import fcntl
import json
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from anabranch.federated import Deadline, Federation, Reply, Sync
from anabranch.federated.codecs import Identity, TopK
from anabranch.federated.errors import FederationError, StoreError
from anabranch.federated.node import Agreement
from anabranch.federated.runtimes.network import Membership, Network, join, work
from anabranch.federated.runtimes.network.agreed import agree, to_json
from anabranch.federated.runtimes.network.link import Link
from anabranch.federated.runtimes.network.outgoing import Outgoing
from anabranch.federated.wire import Field, Schema, Wire
from tests.federated.helpers import (
    DIMENSIONS,
    EXAMPLES,
    Crash,
    VectorServer,
    crash_after,
    names,
)
from tests.federated.network.cutting import CuttingProxy
from tests.federated.network.places import (
    Quiet,
    SiteThread,
    in_threads,
    over_network,
    parameters,
    undisturbed,
    with_sites,
)


@pytest.mark.parametrize("insecure", [True, False])
def test_connections_that_are_cut(tmp_path, insecure):
    federation = over_network(tmp_path, insecure=insecure)
    address = federation.runtime.listen()
    port = int(address.rpartition(":")[2])
    proxy = CuttingProxy(port, seed=1, most=1500 if insecure else 6000)

    def through_it(invitation, folder, name):
        bent = replace(invitation, address=address.replace(str(port), str(proxy.port)))
        return SiteThread(bent, folder, name)

    sites = with_sites(federation, tmp_path, make=through_it)
    federation.run()
    assert [site.end() for site in sites] == ["finished"] * 3
    assert torch.equal(parameters(federation), parameters(undisturbed()))
    assert proxy.cut >= 3
    # Each task was done once, however often it was asked for.
    assert all(len(site.client.executed) == 3 for site in sites)
    proxy.close()


def test_replies_that_come_twice(tmp_path):
    federation = over_network(tmp_path, 2)

    def again(folder):
        def watch(task, reply):
            if reply is not None:
                member = Membership.load(folder)
                for _ in range(2):
                    raw_reply(member, reply)

        return watch

    sites = with_sites(
        federation,
        tmp_path,
        2,
        lambda invitation, folder, name: SiteThread(invitation, folder, name, watch=again(folder)),
    )
    result = federation.run()
    assert [site.end() for site in sites] == ["finished"] * 2
    assert torch.equal(parameters(federation), parameters(undisturbed(2)))
    assert result.incidents.count("duplicate") >= 4
    assert len(result.incidents) == result.incidents.count("duplicate")


def test_a_site_that_is_silent_has_left_and_comes_back(tmp_path):
    federation = over_network(tmp_path, 2, 11, absent_after=1.0)
    away = threading.Event()

    class Absent(Quiet):
        """Vanishes in its second task: no sign of life until it is over."""

        def run(self, ctx, kind, payload):
            if len(self.executed) == 1:
                away.set()
                time.sleep(2.5)
            return super().run(ctx, kind, payload)

    def make(invitation, folder, name):
        return SiteThread(invitation, folder, name, Absent() if name == "c1" else None)

    original = Link.alive

    def silent(self):
        if not away.is_set() or self._token != absent_key():
            original(self)

    def absent_key():
        return Membership.load(tmp_path / "sites" / "c1").key

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Link, "alive", silent)
        patch.setattr(Quiet, "run", slowed(Quiet.run))
        sites = with_sites(federation, tmp_path, 2, make)
        result = federation.run()
        assert [site.end() for site in sites] == ["finished"] * 2
    assert result.version == 11
    # Once, unless this machine stands still for a second.
    assert result.incidents.count("left", "c1") >= 1
    assert result.incidents.count("lost", "c1") >= 1
    assert result.incidents.count("duplicate", "c1") >= 1  # what it handed in when it was back
    assert list(federation.coordinator.state.members) == ["c0", "c1"]


def test_a_site_that_is_late(tmp_path):
    class Late(Quiet):
        def run(self, ctx, kind, payload):
            time.sleep(1.2)
            return super().run(ctx, kind, payload)

    federation = over_network(tmp_path, 2, schedule=Deadline(3, seconds=0.8))
    sites = with_sites(
        federation,
        tmp_path,
        2,
        lambda i, folder, name: SiteThread(i, folder, name, Late() if name == "c1" else None),
    )
    result = federation.run()
    assert [site.end() for site in sites] == ["finished"] * 2
    assert result.version == 3
    assert result.incidents.count("cancelled", "c1") >= 1  # whose reply nobody waits for any more
    assert not any(incident.client == "c0" for incident in result.incidents)


def slowed(run):
    def slow(self, ctx, kind, payload):
        time.sleep(0.4)
        return run(self, ctx, kind, payload)

    return slow


def bodies(federation):
    """Encoded updates that a site may send."""
    encode = federation.coordinator.wire.encode
    good = torch.full((DIMENSIONS,), 0.5, dtype=torch.float64)
    return {
        "NaN": (encode("up", "train", {"x": good * torch.nan}), EXAMPLES),
        "shape": (encode("up", "train", {"x": good[:3]}), EXAMPLES),
        "lie": (encode("up", "train", {"x": good}), 10**6),
        "cut payload": (encode("up", "train", {"x": good})[:-5], EXAMPLES),
    }


@pytest.mark.parametrize(
    ("what", "incident"),
    [
        ("NaN", "not finite"),
        ("shape", "mismatch"),
        ("lie", "examples capped"),
        ("cut payload", "malformed"),
        ("cut envelope", "lost"),
        ("other task", "lost"),
    ],
)
def test_a_site_that_misbehaves_is_named_and_the_run_goes_on(tmp_path, what, incident):
    federation = over_network(tmp_path, 2, 2)

    def misbehave(invitation, folder):
        member = join(invitation, folder, "c1", EXAMPLES)
        link = member.link()
        try:
            while True:
                task = link.next_task()
                body, examples = bodies(federation).get(what, (b"", 1))
                reply = Reply(task.id, "c1", task.kind, task.version, examples, body=body)
                data = reply.to_bytes()
                if what == "cut envelope":
                    data = data[:20]
                if what == "other task":
                    data = replace(reply, task=task.id + 100).to_bytes()
                status = raw(member, f"/federation/tasks/{task.id}/reply", data).status_code
                assert status == (400 if incident == "lost" else 204)
        except Exception as error:
            outcome.append(error)
        finally:
            link.close()

    outcome: list[BaseException] = []
    good = SiteThread(federation.runtime.invite(), tmp_path / "c0", "c0")
    bad = threading.Thread(
        target=misbehave, args=(federation.runtime.invite(), tmp_path / "c1"), daemon=True
    )
    bad.start()
    result = federation.run()
    assert good.end() == "finished" and result.version == 2
    bad.join(timeout=10)
    assert type(outcome[0]).__name__ == "Over"
    assert result.incidents.count(incident, "c1") == 2
    assert torch.isfinite(parameters(federation)).all()


def test_a_reply_that_is_too_large_fails_its_task_only(tmp_path):
    class Huge(Quiet):
        def run(self, ctx, kind, payload):
            super().run(ctx, kind, payload)
            return {"x": torch.zeros(10_000)}, EXAMPLES

    federation = over_network(tmp_path, 2, 2, max_bytes=5_000)
    sites = with_sites(
        federation,
        tmp_path,
        2,
        lambda i, folder, name: SiteThread(i, folder, name, Huge() if name == "c1" else None),
    )
    result = federation.run()
    assert [site.end() for site in sites] == ["finished"] * 2
    assert result.incidents.count("failed", "c1") == 2
    [incident] = result.incidents
    assert "at most 5000 are taken" in incident.message


def test_a_coordinator_that_died_and_comes_back(tmp_path):
    """Its sites wait for it, and nobody's work is done twice."""
    whole = undisturbed(3, 4)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def make():
        return over_network(tmp_path, 3, 4, port=port, insecure=False)

    first = make()
    sites = with_sites(first, tmp_path)
    first.store = crash_after(5)(tmp_path / "run")
    with pytest.raises(Crash):
        first.run()
    again = make()
    again.resume()
    assert [site.end() for site in sites] == ["finished"] * 3
    assert torch.equal(parameters(again), parameters(whole))
    assert [len(site.client.executed) for site in sites] == [4, 4, 4]
    # A finished run that is resumed tells those who did not hear it, and changes nothing.
    late = make()
    member = Membership.load(tmp_path / "sites" / "c0")
    folder = tmp_path / "sites" / "c0"
    [site] = in_threads(lambda: work(member, folder, Quiet(), range(EXAMPLES)))
    late.runtime.desk.absent_after = 1.0
    late.resume()
    assert site.end() == "finished" and torch.equal(parameters(late), parameters(whole))


def test_large_messages_go_piece_by_piece(tmp_path):
    """Four megabytes each way over TLS, more than any buffer on the way."""

    class Large(VectorServer):
        def __init__(self):
            super().__init__()
            self.x = {"x": torch.arange(500_000, dtype=torch.float64)}

        def fold(self, acc, update):
            return update.payload["x"] if acc is None else acc + update.payload["x"]

        def commit(self, acc):
            self.x = {"x": self.x["x"] + acc}

    class Doubles(Quiet):
        def run(self, ctx, kind, payload):
            return {"x": payload["x"]}, 1

    network = Network(tmp_path / "network", join_timeout=20.0)
    made = Federation(Large(), Doubles(), Sync(2), network, store=tmp_path / "run")
    site = SiteThread(network.invite(), tmp_path / "c0", "c0", Doubles())
    made.run()
    assert site.end() == "finished"
    assert torch.equal(made.server.x["x"], torch.arange(500_000, dtype=torch.float64) * 4)


def test_two_processes_cannot_be_one_site(tmp_path):
    federation = over_network(tmp_path, 1, 1)
    invitation, folder = federation.runtime.invite(), tmp_path / "c0"
    member = join(invitation, folder, "c0", EXAMPLES)
    with (folder / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="in use by another process"):
            work(member, folder, Quiet(), range(EXAMPLES))
    federation.runtime.close()


def test_sites_with_another_codec_or_form_of_messages():
    agreement = Agreement(Quiet(), 3, Wire(), TopK(0.1), Identity())
    values = json.loads(json.dumps(to_json(agreement, 60.0)))
    made = agree(values, Quiet(), up=TopK(0.1))
    assert (made.seed, made.wire.fingerprint) == (3, Wire().fingerprint)
    with pytest.raises(FederationError, match=r"codec up is TopK.*, but Identity\(\) here"):
        agree(values, Quiet())
    with pytest.raises(FederationError, match="the same version"):
        agree({**values, "wire": "other"}, Quiet(), up=TopK(0.1))
    schema = Schema((Field("loss", "f32", ()), Field("rows", "i8", (-1, 3)), Field("n", "int")))
    compact = Agreement(Quiet(), 3, Wire({("up", "train"): schema}), Identity(), Identity())
    again = agree(json.loads(json.dumps(to_json(compact, 60.0))), Quiet())
    assert again.wire == compact.wire


@pytest.mark.slow
def test_killed_coordinator_and_sites(tmp_path):
    program = [sys.executable, "-m", "tests.federated.network.crashing", str(tmp_path), "14"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["killed"]["coordinator"] >= 2
    assert sum(outcome["killed"][name] for name in names(3)) >= 3
    assert set(outcome["statuses"].values()) == {0}, done.stderr
    assert {what for what, *_ in outcome["incidents"]} <= {"duplicate"}
    whole = parameters(undisturbed(3, 12))
    assert outcome["parameters"] == whole.tolist()


def raw(member, path, data):
    headers = {"authorization": f"Bearer {member.key}"}
    return httpx.post(member.address + path, content=data, headers=headers, trust_env=False)


def raw_reply(member, reply):
    return raw(member, f"/federation/tasks/{reply.task}/reply", b"".join(Outgoing(reply)))
