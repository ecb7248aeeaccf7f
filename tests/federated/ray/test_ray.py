"""Clients in actors of a Ray cluster on this machine: the results of simulation, also after kills.

Run in an environment with the extra ``ray``; without it they are skipped, which pytest -rs prints.
"""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch

ray = pytest.importorskip("ray", reason="needs the extra ray: pip install 'anabranch[ray]'")

from anabranch.errors import ConfigurationError  # noqa: E402
from anabranch.federated import Federation, Simulation, Site, Sync  # noqa: E402
from anabranch.federated.codecs import ErrorFeedback, TopK  # noqa: E402
from anabranch.federated.errors import FederationError  # noqa: E402
from anabranch.federated.job import load_job  # noqa: E402
from anabranch.federated.runtimes.ray import Ray  # noqa: E402
from anabranch.federated.runtimes.wall_clock import WallClock  # noqa: E402
from anabranch.federated.strategies import FedAvg  # noqa: E402
from tests.federated.helpers import (  # noqa: E402
    EXAMPLES,
    Crash,
    VectorClient,
    VectorServer,
    crash_after,
    sites,
)
from tests.federated.processes.sites import (  # noqa: E402
    Fails,
    Stillborn,
    StuckOnce,
    Weights,
    broken_model,
    model,
)
from tests.federated.processes.test_job import file  # noqa: E402, F401
from tests.federated.processes.test_processes import outcome  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One for all tests; runs connect to it and leave it open."""
    torch.set_num_threads(1)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def federation(runtime, client=None, rounds=3, **options) -> Federation:
    return Federation(VectorServer(), client or VectorClient(), Sync(rounds), runtime, **options)


def simulated(client=None, count=3, **options) -> dict[str, object]:
    run = federation(Simulation(sites(count), strict=False), client, **options)
    run.run()
    return outcome(run)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("codec", [None, ErrorFeedback(TopK(0.5))])
def test_parameters_and_bytes_are_those_of_simulation(workers, codec):
    run = federation(Ray(sites(5), workers=workers), codec=codec)
    run.run()
    assert outcome(run) == simulated(count=5, codec=codec)
    assert isinstance(run.runtime, WallClock) and ray.is_initialized()


def test_training_in_torch_ends_as_in_simulation():
    from anabranch.evaluation.testbeds import digits
    from anabranch.federated import splits

    places = digits.sites(splits.iid(200, 4))
    found = []
    for make in (Simulation, Ray):
        network = digits.perceptron()
        method, local = FedAvg(), digits.local(steps=3)
        run = Federation(
            method.begin(network), method.client(local), Sync(2), make(places, network)
        )
        run.run()
        found.append(outcome(run))
    assert found[0] == found[1]


def test_a_killed_actor_is_replaced_and_its_turn_run_again(tmp_path):
    mark = tmp_path / "stuck"
    run = federation(Ray(sites(3), workers=2), StuckOnce(mark), codec=ErrorFeedback(TopK(0.5)))
    killer = kill_when_there(mark)
    result = run.run()
    killer.join()
    assert not len(result.incidents)
    assert outcome(run) == simulated(codec=ErrorFeedback(TopK(0.5)))


def kill_when_there(mark):
    def kill():
        deadline = time.monotonic() + 120
        while not mark.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(int(mark.read_text()), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


@pytest.mark.parametrize("inputs", [1, 4, 8])
def test_a_killed_coordinator_goes_on_with_what_the_sites_stored(tmp_path, inputs):
    codec = ErrorFeedback(TopK(0.5))
    with pytest.raises(Crash):
        store = crash_after(inputs)(tmp_path / "run")
        federation(Ray(sites(3), workers=2), store=store, codec=codec).run()
    again = federation(Ray(sites(3), workers=1), store=tmp_path / "run", codec=codec)
    again.resume()
    assert outcome(again) == simulated(codec=codec)


def test_model_and_data_are_brought_there():
    places = [
        Site("a", torch.ones(4), examples=EXAMPLES),
        Site("b", torch.full((2,), 3.0), examples=EXAMPLES),
    ]
    run = federation(Ray(places, model, workers=2), Weights(), rounds=2)
    result = run.run()
    assert result.history[-1]["weight"] == 6.0 and result.history[-1]["data"] == 5.0


def test_a_clients_error_is_its_own():
    run = federation(Ray(sites(3), workers=2), Fails(), rounds=1)
    result = run.run()
    assert outcome(run) == simulated(Fails(), rounds=1)
    assert result.incidents.count("failed") == 1


@pytest.mark.parametrize(
    ("client", "made"),
    [(Stillborn(), None), (VectorClient(), broken_model)],
    ids=["client", "model"],
)
def test_actors_that_never_come_to_be_end_the_run(client, made):
    with pytest.raises(FederationError, match="3 actors in a row died"):
        federation(Ray(sites(3), made, workers=1), client).run()


def test_mistakes_are_named_at_once():
    with pytest.raises(ConfigurationError, match="at least 1 worker"):
        Ray(sites(1), workers=0)
    with pytest.raises(ConfigurationError, match="virtual time"):
        Ray(sites(1, joins=1.0))
    with pytest.raises(ConfigurationError, match="the cluster has 3"):
        federation(Ray(sites(4), workers=4)).run()


def test_the_runtime_is_a_key_of_the_job(file):  # noqa: F811
    runtime = load_job(file, ["runtime=ray", "workers=3"]).make_runtime([], torch.nn.Linear(1, 1))
    assert isinstance(runtime, Ray) and runtime.workers == 3
