"""Stops, crashes, other servers and a store that fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from anabranch.jobs import Workspace, loop

from ..fake_trainer import TrainingModel
from ..test_files import ROW, jsonl
from ..test_server import within
from .conftest import Server, serving

TESTS = Path(__file__).parents[2]


def test_a_restart_goes_on_and_serves_what_was_made(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        server.wait(server.create(suffix="kept"))
        server.wait(server.create(suffix="dropped"))
        server.client.models.delete("base:dropped")
    model = TrainingModel(step_seconds=0.005)
    with serving(tmp_path, model, max_finetune_jobs=1) as server:
        assert [m.id for m in server.client.models.list()] == ["base", "base:kept", "echo"]
        job = server.create(suffix="long", extras={"steps": 600, "checkpoint_every": 10})
        waiting = server.create(extras={"steps": 3})
        paused = server.create(extras={"steps": 3})
        server.jobs.pause(paused.id)
        assert within(5, lambda: (server.jobs.retrieve(job.id).anabranch["step"] or 0) > 30)  # type: ignore[attr-defined]
    # A clean stop ends no job: in the store it is running, and nobody's.
    workspace = Workspace.open(tmp_path)
    left = workspace.jobs.get(job.id)
    assert (left.state, left.lease) == ("running", None)
    assert 30 < left.progress["step"] < 600
    workspace.close()
    model = TrainingModel()
    with serving(tmp_path, model, max_finetune_jobs=1) as server:
        server.wait(job)
        server.wait(waiting)
        assert [asked.id for asked in model.jobs] == [job.id, waiting.id]
        assert server.state(paused) == "paused"
        messages = [event.message for event in server.jobs.list_events(job.id, limit=1000)]
        assert any(m.startswith("Taken up again after step") for m in messages)
        (result,) = server.jobs.retrieve(job.id).result_files
        table = server.client.files.content(result).text.splitlines()
        assert [int(line.split(",")[0]) for line in table[1:]] == list(range(1, 601))
        server.jobs.resume(paused.id)
        server.wait(paused)


PROGRAM = """
import sys
from pathlib import Path
from anabranch.api import ServerOptions, bind, create_app, serve
from anabranch.jobs import NewEvent, Report, Workspace
from tests.api.fake_trainer import TrainingModel
options = ServerOptions(workspace=Workspace.open(Path(sys.argv[1])))
app = create_app([TrainingModel(step_seconds=0.01)], options)
serve(app, bind("127.0.0.1", 0), on_listening=lambda url: print(url, flush=True))
"""


@pytest.mark.slow
def test_kill_9_of_a_server_loses_no_job(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=TESTS.parent,
        env=os.environ,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        file = client.files.create(file=("rows.jsonl", jsonl(ROW)), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model="base",
            training_file=file.id,
            suffix="tone",
            extra_body={"anabranch": {"steps": 100, "checkpoint_every": 5}},
        )
        retrieve = client.fine_tuning.jobs.retrieve
        assert within(10, lambda: (retrieve(job.id).anabranch["step"] or 0) >= 12)  # type: ignore[attr-defined]
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    model = TrainingModel()
    with serving(tmp_path, model) as server:
        assert server.client.files.content(file.id).read() == jsonl(ROW)
        done = server.wait(job)
        assert done.fine_tuned_model == "base:tone"
        (again,) = model.jobs
        assert again.output == server.workspace.job_folder(job.id) / "output"
        # It went on after a checkpoint: the first steps were not made again.
        events = list(server.jobs.list_events(job.id, limit=1000))
        steps = [e.data["step"] for e in events if e.message.startswith("Step ")]  # type: ignore[index]
        assert steps.count(1) == 1
        table = server.client.files.content(done.result_files[0]).text.splitlines()
        assert [int(line.split(",")[0]) for line in table[1:]] == list(range(1, 101))


def test_two_servers_on_one_store_run_a_job_once(tmp_path: Path) -> None:
    models = [TrainingModel(step_seconds=0.002) for _ in range(2)]
    with (
        serving(tmp_path, models[0], max_finetune_jobs=2) as first,
        serving(tmp_path, models[1], max_finetune_jobs=2) as second,
    ):
        jobs = [first.create(extras={"steps": 30}) for _ in range(6)]
        for job in jobs:
            second.wait(job)
        ran = [asked.id for model in models for asked in model.jobs]
        assert sorted(ran) == sorted(job.id for job in jobs)
        # A request to the one server reaches a job on the other.
        long = first.create(extras={"steps": 100_000})
        first.wait(long, "running")
        asked_of = second if any(j.id == long.id for j in models[0].jobs) else first
        assert asked_of.jobs.cancel(long.id).status == "cancelled"


def test_a_job_that_another_process_has_taken_is_given_up(tmp_path: Path) -> None:
    with serving(tmp_path, TrainingModel(step_seconds=0.005)) as server:
        job = server.create(extras={"steps": 100_000})
        server.wait(job, "running")
        with server.workspace.jobs.engine.begin() as connection:
            connection.execute(text("UPDATE jobs SET lease = 'elsewhere/x/1/1.00/abc'"))
        (handle,) = server.model.handles
        assert within(5, lambda: handle.wanted == "cancel")
        handle.wait(5)
        left = server.workspace.jobs.get(job.id)
        assert (left.state, left.lease) == ("running", "elsewhere/x/1/1.00/abc")


def test_another_base_under_the_name_is_noticed(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        job = server.create(extras={"steps": 3})
        server.wait(job)
        server.model.go.clear()
        paused = server.create()
        server.jobs.pause(paused.id)
    model = TrainingModel()
    model.card = replace(model.card, fingerprint="f" * 64)
    with serving(tmp_path, model) as server:
        server.jobs.resume(paused.id)
        failed = server.wait(paused, "failed")
        assert failed.error is not None
        assert "another model now" in failed.error.message


def test_a_store_that_fails_for_a_while_loses_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "RETRY_SECONDS", 0.01)
    record, failures = server.workspace.jobs.record, iter(range(5))

    def flaky(reports: Any) -> set[str]:
        if reports and next(failures, None) is not None:
            raise OperationalError("INSERT", {}, Exception("disk I/O error"))
        return record(reports)

    monkeypatch.setattr(server.workspace.jobs, "record", flaky)
    job = server.create(extras={"steps": 50})
    server.wait(job)
    assert next(failures, None) is None
    events = server.jobs.list_events(job.id, limit=1000)
    steps = [e.data["step"] for e in events if e.message.startswith("Step ")]  # type: ignore[index]
    assert steps == list(range(50, 0, -1))
