"""Jobs as processes: finished, failed, killed, paused, cancelled, limited, taken over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from anabranch.errors import ConfigurationError, UnknownName
from anabranch.jobs import Job, Workspace
from anabranch.jobs.child import Child
from anabranch.jobs.kinds import Limits
from anabranch.jobs.layout import OUTPUT, RESULT
from anabranch.jobs.runner import CommandRunner
from anabranch.jobs.service import Jobs
from tests.jobs.scripted import Script


def until(true: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


class Bench:
    def __init__(self, folder: Path) -> None:
        self.workspace = Workspace.open(folder, lease_seconds=2)
        self.jobs = Jobs(self.workspace)
        self.jobs.kinds["script"] = Script()

    def submit(self, **spec: Any) -> Job:
        return self.jobs.submit("script", spec)

    @contextmanager
    def running(self, **options: Any) -> Iterator[CommandRunner]:
        runner = CommandRunner(self.workspace, {"script": Script()}, poll_seconds=0.02, **options)
        runner.start()
        try:
            yield runner
        finally:
            runner.stop()

    def state(self, job: Job) -> str:
        return self.jobs.store.get(job.id).state

    def wait(self, job: Job, state: str) -> Job:
        until(lambda: self.state(job) == state)
        return self.jobs.store.get(job.id)

    def count(self, job: Job) -> int:
        path = self.workspace.job_folder(job.id) / OUTPUT / "count"
        return int(path.read_text()) if path.exists() else 0

    def said(self, job: Job) -> list[str]:
        return [event.message for event in self.jobs.store.events(job.id, limit=1000).items]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.workspace.close()


def test_a_job_reports_progress_and_leaves_artefacts(bench: Bench) -> None:
    job = bench.submit(until=3)
    assert (job.state, job.name) == ("queued", "to 3")
    with bench.running():
        done = bench.wait(job, "succeeded")
    assert done.progress["fraction"] == 1
    assert done.progress["attempt"] == 1
    made = bench.jobs.store.artefacts(job.id)[job.id]["count"]
    assert Path(made.path).read_text() == "3"
    assert made.size == 1
    assert len(made.sha256) == 64
    assert json.loads((bench.workspace.job_folder(job.id) / RESULT).read_text()) == {"count": 3}
    assert bench.said(job)[0] == "Queued"
    assert bench.said(job)[-1] == "Finished"


def test_what_a_failed_process_said_last_is_the_error(bench: Bench) -> None:
    job = bench.submit(status=3)
    with bench.running():
        failed = bench.wait(job, "failed")
    assert failed.error == "as asked (exit status 3)"
    assert "as asked" in bench.jobs.log(job.id)


def test_a_killed_process_is_tried_again_as_often_as_asked(bench: Bench) -> None:
    never, once = bench.submit(die_at=2), bench.submit(die_at=2, retries=1)
    with bench.running(max_jobs=2):
        assert "killed by signal 9" in (bench.wait(never, "failed").error or "")
        assert bench.wait(once, "succeeded").progress["attempt"] == 2
    assert bench.count(once) == 3


def test_a_paused_job_goes_on_from_its_checkpoint(bench: Bench) -> None:
    job = bench.submit(until=1000, pause=0.01)
    with bench.running():
        until(lambda: bench.jobs.store.get(job.id).progress.get("fraction"))
        bench.jobs.ask(job.id, "pause")
        bench.wait(job, "paused")
        before = bench.count(job)
        assert before > 0
        time.sleep(0.1)
        assert bench.count(job) == before
        bench.jobs.ask(job.id, "run")
        until(lambda: bench.jobs.store.get(job.id).progress["attempt"] == 2)
        until(lambda: bench.jobs.store.get(job.id).progress["fraction"] > (before + 2) / 1000)
        bench.jobs.ask(job.id, "cancel")
        bench.wait(job, "cancelled")
    assert bench.count(job) > before


def test_a_job_above_its_limits_is_ended_with_the_reason(bench: Bench) -> None:
    slow = bench.submit(until=10_000, limits={"seconds": 0.3})
    large = bench.submit(until=10_000, limits={"memory_mb": 1})
    with bench.running(max_jobs=2):
        assert "longer than its limit of 0.3 s" in (bench.wait(slow, "failed").error or "")
        assert "its limit is 1 MiB" in (bench.wait(large, "failed").error or "")


def test_the_higher_priority_runs_first(bench: Bench) -> None:
    first, urgent = bench.submit(), bench.jobs.submit("script", {}, priority=5)
    with bench.running():
        bench.wait(first, "succeeded")
    times = [bench.jobs.store.get(job.id).started or 0 for job in (urgent, first)]
    assert times[0] < times[1]


def test_stopping_the_runner_ends_no_job(bench: Bench) -> None:
    job = bench.submit(until=300, pause=0.01)
    with bench.running():
        until(lambda: bench.jobs.store.get(job.id).progress.get("fraction"))
    assert bench.state(job) == "running"
    before = bench.count(job)
    assert before > 0
    with bench.running():
        assert bench.wait(job, "succeeded").progress["attempt"] == 2
    assert bench.count(job) == 300


SERVER = """
import sys, time
from pathlib import Path
from anabranch.jobs import Workspace
from anabranch.jobs.runner import CommandRunner
from tests.jobs.scripted import Script

runner = CommandRunner(Workspace.open(Path(sys.argv[1]), lease_seconds=2), {"script": Script()})
runner.start()
time.sleep(60)
"""


def test_a_killed_server_takes_its_jobs_processes_along_and_the_next_goes_on(
    bench: Bench, tmp_path: Path
) -> None:
    job = bench.submit(until=400, pause=0.01, die_at=-1)
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(tmp_path)], cwd=Path.cwd())
    until(lambda: bench.jobs.store.get(job.id).progress.get("fraction"))
    [child] = psutil.Process(server.pid).children()
    os.kill(server.pid, signal.SIGKILL)
    server.wait()
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 5)
    with bench.running():
        assert bench.wait(job, "succeeded").progress["attempt"] == 2
    assert bench.count(job) == 400


def test_jobs_of_a_server_in_the_background_of_a_script_can_be_stopped(
    bench: Bench,
) -> None:
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for "command &"
    try:
        job = bench.submit(until=1000, pause=0.01)
        with bench.running():
            until(lambda: bench.jobs.store.get(job.id).progress.get("fraction"))
            bench.jobs.ask(job.id, "pause")
            bench.wait(job, "paused")
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert 0 < bench.count(job) < 1000


def test_two_runners_never_run_one_job_twice(bench: Bench, tmp_path: Path) -> None:
    other = Bench(tmp_path)
    jobs = [bench.submit(until=2) for _ in range(6)]
    with bench.running(), other.running():
        for job in jobs:
            assert bench.wait(job, "succeeded").progress["attempt"] == 1
    other.workspace.close()
    for job in jobs:
        assert bench.said(job).count("Started") == 1


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        ("script", {"untill": 3}, "untill"),
        ("script", {"limits": {"seconds": 0}}, "seconds"),
        ("finetune", {"recipe": "recipe: x\n"}, "train"),
        ("finetune", {"recipe": "no-such"}, "no-such"),
        ("federate", {"job": "federate: x\nstrategy: nonsense\n"}, "recipe"),
        ("search", {"job": "federate: x\nrecipe: arithmetic\n", "vary": []}, "vary"),
        ("evaluate", {"claims": []}, "claims"),
        ("evaluate", {"claims": ["S999"]}, "S999"),
    ],
)
def test_a_bad_spec_is_refused_before_it_is_queued(
    bench: Bench, kind: str, spec: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigurationError, UnknownName), match=message):
        bench.jobs.submit(kind, spec)
    assert not bench.jobs.store.find().items


def test_an_unknown_kind_names_those_there_are(bench: Bench) -> None:
    with pytest.raises(UnknownName, match="finetune"):
        bench.jobs.submit("finetun", {})


def test_a_claim_becomes_a_command(bench: Bench) -> None:
    job = bench.jobs.submit("evaluate", {"claims": ["S01"], "seed": 1})
    kind, folder = bench.jobs.kinds["evaluate"], bench.workspace.job_folder(job.id)
    command = kind.command(kind.check(job.spec), folder)
    assert command[-6:] == ["claims", "run", "S01", "--seed", "1", "--json"]
    folder.mkdir(parents=True)
    (folder / RESULT).write_text('{"id": "S01", "verdict": "falls short"}\n')
    assert kind.succeeded(1, folder)  # measured; what came out is another matter
    (folder / RESULT).write_text("")
    assert not kind.succeeded(1, folder)


def test_a_job_gives_way_to_what_is_served_beside_it(tmp_path: Path) -> None:
    script = "import os, time; time.sleep(0.3); print(os.nice(0))"
    child = Child([sys.executable, "-c", script], tmp_path, Limits())
    until(lambda: child.poll() is not None)
    assert int((tmp_path / RESULT).read_text()) >= 10
