"""``anabranch top`` against a live server."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from anabranch.cli import app
from anabranch.cli.top import JobLine, ModelLoad, Snapshot, look, render
from anabranch.jobs import Workspace
from tests.api.conftest import EchoModel, LiveServer
from tests.api.fake_trainer import TrainingModel
from tests.api.test_files import ROW, jsonl

runner = CliRunner()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    workspace = Workspace.open(tmp_path_factory.mktemp("state"))
    model = TrainingModel()
    model.go.clear()
    with LiveServer(model, workspace=workspace, api_keys=("k",)) as live:
        headers = {"authorization": "Bearer k"}
        with httpx.Client(base_url=live.url, headers=headers) as client:
            form = {"files": {"file": jsonl(ROW)}, "data": {"purpose": "fine-tune"}}
            file = client.post("/v1/files", **form).json()["id"]
            body = {"model": "base", "training_file": file, "suffix": "tone"}
            assert client.post("/v1/fine_tuning/jobs", json=body).status_code == 200
        yield live
    workspace.close()


def test_once_as_json(server: LiveServer) -> None:
    done = runner.invoke(app, ["top", "--url", server.url, "--api-key", "k", "--once", "--json"])
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    (model,) = shown["models"]
    assert model["name"] == "base"
    assert model["slo_attainment"] == 0.95
    assert model["cache_usage"] == 0.25
    (job,) = shown["jobs"]
    assert (job["model"], job["eta_seconds"]) == ("base:tone", None)
    assert job["state"] in ("queued", "running")


def test_once_as_tables(server: LiveServer) -> None:
    url = server.url + "/v1/"
    done = runner.invoke(app, ["top", "--url", url, "--api-key", "k", "--once"])
    assert done.exit_code == 0, done.output
    for word in ("95.0%", "25%", "base:tone", "ftjob-"):
        assert word in done.stdout


def test_shares_are_those_since_the_last_look(server: LiveServer) -> None:
    with httpx.Client(base_url=server.url, headers={"authorization": "Bearer k"}) as client:
        first = look(client)
        assert look(client, first).models[0].slo_attainment is None


def test_what_is_shown() -> None:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    model = ModelLoad("m[x]", 12.34, 567.8, 0.987, 0.5, 3, 2, 1)
    job = JobLine("ftjob-1", "m:[bold]", "running", 5, 60, 1.23456, None, 3725)
    console.print(render(Snapshot(0.0, [model], [job], {})))
    text = console.export_text()
    for word in ("m[x]", "12.3", "567.8", "98.7%", "50%", "m:[bold]", "5/60", "1.2346", "1:02:05"):
        assert word in text
    console.print(render(Snapshot(0.0, [model], None, {})))
    assert "keeps no fine-tuning jobs" in console.export_text()


def test_no_server_a_wrong_key_and_another_program(server: LiveServer) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        done = runner.invoke(app, ["top", "--url", f"http://127.0.0.1:{port}", "--once"])
    assert done.exit_code == 1
    assert "no server answers" in done.stderr
    done = runner.invoke(app, ["top", "--url", server.url, "--once"])
    assert done.exit_code == 1
    assert "--api-key" in done.stderr


def test_a_server_without_jobs() -> None:
    with LiveServer(EchoModel()) as live:
        done = runner.invoke(app, ["top", "--url", live.url, "--once", "--json"])
    assert json.loads(done.stdout)["jobs"] is None
