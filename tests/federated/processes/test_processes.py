"""Clients in worker processes: the same results as in simulation, and nothing lost by a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
import torch

from anabranch import registry
from anabranch.errors import ConfigurationError
from anabranch.evaluation.testbeds import digits
from anabranch.federated import Federation, Simulation, Site, Sync, Tree, splits
from anabranch.federated.codecs import Chain, ErrorFeedback, Quantise, TopK
from anabranch.federated.errors import FederationError
from anabranch.federated.runtimes.processes import Pool, Processes
from anabranch.federated.runtimes.processes.runtime import Bodies
from anabranch.federated.runtimes.processes.segments import PREFIX, Segments, shared_memory
from anabranch.federated.store import ClientStore
from tests.federated.helpers import EXAMPLES, VectorClient, VectorServer, sites, tree_bytes
from tests.federated.processes.sites import (
    Fails,
    Slow,
    Stillborn,
    StuckOnce,
    Weights,
    broken_model,
    model,
    slow_run,
)
from tests.federated.test_strategies import network_for

CENTRAL = [
    pytest.param(cls, id=name)
    for name, cls in registry.available("strategies").items()
    if not cls.decentralised  # peers have no server whose state could differ
]


@pytest.fixture(scope="module")
def pool():
    with Pool(2) as made:
        yield made
    assert not made.segments.folder.exists()


@pytest.fixture(autouse=True)
def nothing_left(request):
    before = segment_folders()
    yield
    owned = (
        {request.getfixturevalue("pool").segments.folder}
        if "pool" in request.fixturenames
        else set()
    )
    assert segment_folders() - before - owned == set()
    for folder in owned:
        assert not [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]


def segment_folders() -> set[Path]:
    return set(shared_memory().glob(f"{PREFIX}*"))


def federation(client, places=None, workers=1, rounds=3, **options) -> Federation:
    keywords = {name: options.pop(name) for name in ("model", "keep_alive") if name in options}
    runtime = Processes(sites(3) if places is None else places, workers=workers, **keywords)
    return Federation(VectorServer(), client, Sync(rounds), runtime, **options)


def outcome(run: Federation) -> dict[str, object]:
    """What does not depend on how long anything took."""
    state = run.coordinator.state
    return {
        "server": tree_bytes(in_order(run.server.state_dict())),
        "ledger": {key: (t.messages, t.payload) for key, t in payloads(run).items()},
        "incidents": state.incidents.state_dict(),
        "version": state.version,
    }


def in_order(tree):
    """A dict that was filled as replies came is the same dict in any order."""
    if isinstance(tree, Mapping):
        return {key: in_order(tree[key]) for key in sorted(tree)}
    return [in_order(child) for child in tree] if isinstance(tree, list | tuple) else tree


def payloads(run: Federation):
    return run.coordinator.state.ledger.by("direction", "client", "kind", "version")


def in_both(make, pool):
    """The same federation under simulation and in processes."""
    simulated, real = make(Simulation), make(lambda *given: Processes(*given, workers=pool))
    simulated.run()
    real.run()
    return outcome(simulated), outcome(real)


@pytest.mark.parametrize("cls", CENTRAL)
def test_every_strategy_ends_as_in_simulation(cls, pool):
    labels = digits.images()[0].labels[:120].tolist()
    places = digits.sites(splits.dirichlet(labels, 3, 0.5, min_size=10))

    network = network_for(cls)

    def make(runtime):
        strategy = cls()
        client = strategy.client(digits.local(steps=2))
        return Federation(
            strategy.begin(network), client, Sync(2), runtime(places, network), seed=4
        )

    simulated, real = in_both(make, pool)
    assert real == simulated
    assert real["version"] == 2


@pytest.mark.parametrize("tree", [False, True])
def test_codecs_both_ways_and_a_tree_end_as_in_simulation(pool, tree):
    def make(runtime):
        return Federation(
            VectorServer(),
            VectorClient(),
            Sync(4),
            runtime(sites(5)),
            codec=ErrorFeedback(Chain([TopK(0.5), Quantise(8)])),
            down=Quantise(8),
            topology=Tree.balanced([site.name for site in sites(5)], 2) if tree else None,
        )

    simulated, real = in_both(make, pool)
    assert real == simulated


def when_there(mark: Path, then) -> threading.Thread:
    """Call ``then`` with the process that left its mark."""

    def wait():
        while not mark.exists():
            time.sleep(0.01)
        then(int(mark.read_text()))

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def test_a_worker_killed_in_a_task_loses_that_and_nothing_else(tmp_path, caplog):
    """Personal state stays, too, although this run has no store of its own."""
    run = federation(StuckOnce(tmp_path / "mark"), workers=2)
    killer = when_there(tmp_path / "mark", kill)
    tasks = {}

    def watch(coordinator):
        for path in run.runtime.stored.glob("c*"):
            tasks[path.name] = ClientStore(path.parent, path.name).load()["personal"]["state"]

    run.coordinator.watch = watch
    result = run.run()
    killer.join()
    assert result.version == 3
    assert [(i.what, i.client, i.count) for i in result.incidents] == [("lost", "c1", 1)]
    assert "worker 1 died (exit code -9) with task 5 of c1" in caplog.text
    done = {name: state["tasks"] for name, state in tasks.items()}
    assert done == {"c0": [1, 4, 7], "c1": [2, 8], "c2": [3, 6, 9]}
    assert not run.runtime.stored.exists()


@pytest.mark.slow
def test_killed_as_a_whole_and_resumed_it_ends_as_undisturbed(tmp_path):
    parts, others = tmp_path / "parts", segment_folders()
    command = [sys.executable, "-m", "tests.federated.processes.sites", str(parts)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    for _ in range(2):
        line = process.stdout.readline()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(line.split()) == 2, "both workers were there"
    left = segment_folders() - others
    assert left, "a killed owner leaves its folder"
    again = slow_run(parts, 0.0)
    again.resume()
    undisturbed = Federation(
        VectorServer(), VectorClient(), Sync(5), Simulation(sites(3)), codec=again.coordinator.codec
    )
    undisturbed.run()
    assert outcome(again) == outcome(undisturbed)
    assert 2 < again.coordinator.version == 5
    assert not left & segment_folders(), "the next owner removes it"


@pytest.mark.slow
def test_workers_end_with_a_coordinator_that_was_killed(tmp_path):
    command = [sys.executable, "-m", "tests.federated.processes.sites", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    workers = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    process.kill()
    process.wait()
    process.stdout.close()
    assert len(workers) == 2
    _, living = psutil.wait_procs(workers, timeout=5)
    assert living == []
    Segments.owned().close()  # sweeps the folder of the dead


def test_idle_workers_go_and_come_back_with_their_sites_state(tmp_path):
    run = federation(VectorClient(), workers=1, rounds=2, keep_alive=0.2, store=tmp_path)
    pids = []

    def rest(coordinator):
        pool = run.runtime.pool
        pids.extend(pool.pids)
        deadline = time.monotonic() + 20
        while pool.pids and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not pool.pids

    run.coordinator.watch = rest
    result = run.run()
    assert len(set(pids)) == 2 and not result.incidents
    undisturbed = Federation(VectorServer(), VectorClient(), Sync(2), Simulation(sites(3)))
    undisturbed.run()
    assert outcome(run) == outcome(undisturbed)
    assert len(ClientStore(tmp_path / "clients", "c2").load()["personal"]["state"]["tasks"]) == 2


def test_a_waiting_worker_uses_no_processor(pool):
    federation(VectorClient(), workers=pool, rounds=1).run()
    processes = [psutil.Process(pid) for pid in pool.pids]
    before = [sum(p.cpu_times()[:2]) for p in processes]
    time.sleep(0.5)
    assert [sum(p.cpu_times()[:2]) for p in processes] == before
    assert pool.cpu_seconds > 0


def test_a_pool_is_used_again_and_its_processes_stay(pool):
    pids = None
    for _ in range(2):
        assert not federation(VectorClient(), workers=pool).run().incidents
        assert pids in (None, pool.pids)
        pids = pool.pids


def test_a_run_that_fails_leaves_a_pool_that_works(pool, tmp_path):
    def stop(coordinator):
        raise KeyboardInterrupt

    broken = federation(Slow(0.0), workers=pool, watch=stop)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    assert federation(VectorClient(), workers=pool).run().version == 3


def test_model_and_data_reach_the_worker_and_stay_as_they_were(pool):
    network = model()
    places = [Site(f"c{i}", torch.full((4,), float(i)), examples=EXAMPLES) for i in range(3)]
    for given in (network, model):
        result = federation(Weights(), places, pool, model=given).run()
        assert result.metrics["weight"] == 6.0 and result.metrics["data"] == pytest.approx(4.0)
    assert float(network.weight.detach().sum()) == 6.0


def test_a_client_that_fails_is_named_and_the_others_go_on(pool):
    result = federation(Fails(), workers=pool).run()
    assert result.version == 3
    assert result.incidents.count("failed", "c0") == 3 and result.incidents.count("lost") == 0


def test_a_model_that_cannot_be_made_is_said_in_the_end(pool):
    run = federation(VectorClient(), workers=pool, model=broken_model)
    with pytest.raises(FederationError, match="RuntimeError: no such weights"):
        run.run()


@pytest.mark.slow
def test_workers_that_die_at_once_are_not_started_for_ever():
    with pytest.raises(FederationError, match="died 3 times in a row before it finished a task"):
        federation(Stillborn()).run()


def test_what_cannot_be_sent_is_named_before_anything_starts(pool):
    class Local(VectorClient):
        pass

    with pytest.raises(ConfigurationError, match="the client Local, or a codec, cannot be sent"):
        federation(Local(), workers=pool).run()
    with pytest.raises(ConfigurationError, match="the model cannot be sent"):
        federation(VectorClient(), workers=pool, model=lambda: None).run()
    with pytest.raises(ConfigurationError, match="the data of c0 cannot be sent"):
        federation(VectorClient(), [Site("c0", [lambda: None])], pool).run()


def test_options_that_cannot_work():
    with pytest.raises(ConfigurationError, match="same name"):
        Processes([Site("a"), Site("a")])
    with pytest.raises(ConfigurationError, match="site a joins or leaves at a virtual time"):
        Processes([Site("a", leaves=3.0)])
    with pytest.raises(ConfigurationError, match="at least 1 worker"):
        Processes([Site("a")], workers=0)
    with pytest.raises(ConfigurationError, match="keep_alive is above 0"):
        Processes([Site("a")], keep_alive=0.0)


def test_more_workers_than_sites_and_no_site_at_all(pool):
    assert federation(VectorClient(), sites(1), pool).run().version == 3
    Processes([], workers=1).close()


def test_one_message_for_many_lies_in_memory_once():
    with_body = Segments.owned()
    try:
        bodies = Bodies(with_body)
        one, other = b"x" * 100, b"y" * 100
        keys = [bodies.keep(one) for _ in range(5)]
        assert len(set(keys)) == 1
        for key in keys[1:]:
            bodies.release(key)
        bodies.release(keys[0])
        assert bodies.keep(one) == keys[0], "the newest stays for the next client"
        second = bodies.keep(other)
        assert with_body.read(keys[0]) == one
        bodies.release(keys[0])
        assert not with_body.path(keys[0]).exists()
        assert with_body.read(second) == other
    finally:
        with_body.close()
