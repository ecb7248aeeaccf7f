"""Flower itself on loopback, with TLS and keys of nodes: the results of simulation.

Slow, because Flower starts a process for every message.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

pytest.importorskip("flwr", reason="Flower is not installed; it needs an environment of its own")

from anabranch.cli import app
from anabranch.errors import ConfigurationError
from anabranch.federated import Simulation
from anabranch.federated.errors import FederationError
from anabranch.federated.job import load_job
from anabranch.federated.runtimes.flower import Deployment
from anabranch.files import write_text
from tests.federated.flower.sites import federation, write_app
from tests.federated.helpers import sites
from tests.federated.processes.test_job import file  # noqa: F401

pytestmark = pytest.mark.slow


def processes_of(folder: Path):
    found = psutil.process_iter(["cmdline"])
    return [p for p in found if str(folder) in " ".join(p.info["cmdline"] or [])]


@pytest.mark.parametrize("insecure", [False, True], ids=["tls", "plain"])
def test_two_clients_and_two_rounds(tmp_path: Path, insecure: bool) -> None:
    expected = federation(Simulation(sites(2)))
    result = expected.run()
    folder, output = tmp_path / "flower", tmp_path / "out.json"
    with Deployment(folder, [{"index": 0}, {"index": 1}], insecure=insecure) as flower:
        flower.wait(flower.run(write_app(tmp_path / "app"), {"output": str(output)}))
    got = json.loads(output.read_text())
    assert got["x"] == expected.server.x["x"].tolist()
    assert got["incidents"] == 0
    by = result.ledger.by("direction", "client", "kind", "version")
    assert got["traffic"] == {
        " ".join(map(str, key)): [traffic.messages, traffic.payload] for key, traffic in by.items()
    }
    assert len(set(got["pids"])) == 1  # the mean of the residents' numbers: they stayed
    assert not processes_of(tmp_path)
    secrets = [*folder.rglob("node.pem"), *folder.rglob("key.pem")]
    assert len(secrets) == (0 if insecure else 3)
    assert all(secret.stat().st_mode & 0o077 == 0 for secret in secrets)


def test_nothing_stays_when_its_process_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib\n"
        "from anabranch.federated.runtimes.flower import Deployment\n"
        "place = pathlib.Path(sys.argv[1])\n"
        "with Deployment(place / 'flower', [{'index': 0}], insecure=True) as flower:\n"
        "    run = flower.run(place / 'app', {'output': str(place / 'out.json')})\n"
        "    while not list(place.rglob('residents/*.pid')):\n"
        "        time.sleep(0.1)\n"
        "    print('there', flush=True)\n"
        "    time.sleep(600)\n"
    )
    write_app(tmp_path / "app")
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "there\n"
        started = processes_of(tmp_path)
        assert len(started) >= 4  # it, SuperLink, SuperNode and resident
        owner.kill()
        owner.wait()
    _, left = psutil.wait_procs(started, timeout=60)
    assert not left
    assert not [p for p in processes_of(tmp_path) if p.pid not in {s.pid for s in started}]


def test_an_app_that_fails_says_why(tmp_path: Path) -> None:
    place = write_app(tmp_path / "app")
    write_text(place / "app.py", (place / "app.py").read_text().replace("run(grid", "nothing(grid"))
    with Deployment(tmp_path / "flower", [{"index": 0}], insecure=True) as flower:
        run = flower.run(place)
        with pytest.raises(FederationError, match=r"finished:failed.*run-\d+\.log"):
            flower.wait(run)
    log = next((tmp_path / "flower" / "logs").glob("run-*.log")).read_text()
    assert "name 'nothing' is not defined" in log


def test_a_job_saves_the_adapter_of_simulation(
    file: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # sums of more threads round otherwise
    small = ["clients.count=2", "schedule.rounds=2"]
    saved = {}
    for runtime in ("simulation", "flower"):
        output = tmp_path / runtime
        command = ["federate", str(file), *small, "--runtime", runtime, "-o", str(output)]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        saved[runtime] = (output / "adapter" / "adapter_model.safetensors").read_bytes()
    assert saved["flower"] == saved["simulation"]
    assert not processes_of(tmp_path)


def test_a_job_that_does_not_say_how_many(file: Path, tmp_path: Path) -> None:  # noqa: F811
    command = ["federate", str(file), "--runtime", "flower", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, "clients={split: category}"])
    assert done.exit_code == 2 and "give clients.count" in done.stderr
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigurationError, match="flower has none"):
        load_job(file, ["runtime=flower", "workers=2"])
    with pytest.raises(ConfigurationError, match="needs a node"):
        Deployment(tmp_path, [])
