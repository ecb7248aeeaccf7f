"""Pausing, cancelling, turns and failures."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from ..fake_trainer import TrainingModel
from ..test_files import exactly
from ..test_server import within
from .conftest import Server, messages_of, serving


def test_cancel_pause_resume(tmp_path: Path) -> None:
    with serving(tmp_path, TrainingModel(step_seconds=0.01)) as server:
        job = server.create(extras={"steps": 500})
        assert within(5, lambda: server.jobs.retrieve(job.id).estimated_finish is not None)
        now = server.jobs.retrieve(job.id)
        assert abs(now.estimated_finish - (time.time() + 5)) < 10  # type: ignore[operator]
        paused = server.jobs.pause(job.id)
        exactly(FineTuningJob, paused)
        assert (paused.status, paused.anabranch["state"]) == ("queued", "paused")  # type: ignore[attr-defined]
        assert paused.estimated_finish is None
        at = paused.anabranch["step"]  # type: ignore[attr-defined]
        assert server.model.statistics().finetune_jobs == 0
        resumed = server.jobs.resume(job.id)
        assert resumed.anabranch["state"] in ("queued", "running")  # type: ignore[attr-defined]
        assert within(5, lambda: server.jobs.retrieve(job.id).anabranch["step"] > at)  # type: ignore[attr-defined]
        assert len(server.model.jobs) == 1  # it was never submitted again
        cancelled = server.jobs.cancel(job.id)
        assert (cancelled.status, cancelled.fine_tuned_model) == ("cancelled", None)
        assert cancelled.trained_tokens
        assert len(cancelled.result_files) == 1
        assert server.jobs.cancel(job.id).status == "cancelled"  # again: nothing to do
        for method in (server.jobs.pause, server.jobs.resume):
            with pytest.raises(openai.ConflictError, match="cancelled and cannot"):
                method(job.id)
        messages = messages_of(server, job)
        assert "Fine-tuning job paused" in messages
        assert messages[-1] == "The job was cancelled"


def test_at_most_so_many_run_and_the_important_first(tmp_path: Path) -> None:
    model = TrainingModel()
    model.go.clear()
    with serving(tmp_path, model, max_finetune_jobs=2) as server:
        first = [server.create(extras={"steps": 5}) for _ in range(2)]
        for job in first:
            server.wait(job, "running")
        low = server.create(extras={"steps": 5})
        high = server.create(extras={"steps": 5, "priority": 3})
        given_up = server.create(extras={"steps": 5, "priority": 9})
        assert server.jobs.cancel(given_up.id).status == "cancelled"
        kept = server.create(extras={"steps": 5, "priority": 8})
        assert server.jobs.pause(kept.id).anabranch["state"] == "paused"  # type: ignore[attr-defined]
        model.go.set()
        for job in (*first, low, high):
            server.wait(job)
        started = [job.id for job in model.jobs]
        assert started[2:] == [high.id, low.id]
        assert model.most_at_once == 2
        server.jobs.resume(kept.id)
        server.wait(kept)


def test_a_paused_job_makes_room_and_waits_for_its_turn(tmp_path: Path) -> None:
    model = TrainingModel()
    model.go.clear()
    with serving(tmp_path, model, max_finetune_jobs=1) as server:
        long = server.create(extras={"steps": 10})
        server.wait(long, "running")
        server.jobs.pause(long.id)
        other = server.create(extras={"steps": 10})
        server.wait(other, "running")
        assert server.jobs.resume(long.id).anabranch["state"] == "queued"  # type: ignore[attr-defined]
        server.jobs.cancel(long.id)  # while it is queued, and held
        assert within(5, lambda: model.handles[0].wanted == "cancel")
        assert server.state(other) == "running"
        server.jobs.cancel(other.id)


def test_failures_are_told(tmp_path: Path) -> None:
    with serving(tmp_path, TrainingModel(fail_at=2)) as server:
        failed = server.wait(server.create(extras={"steps": 5}), "failed")
        exactly(FineTuningJob, failed)
        assert failed.error is not None
        assert failed.error.message == "the trainer broke"
        assert failed.fine_tuned_model is None
        server.model.refuse = "this base cannot be differentiated"
        refused = server.wait(server.create(), "failed")
        assert refused.error is not None
        assert refused.error.message == server.model.refuse
        (event, *_) = server.jobs.list_events(refused.id)
        assert (event.level, event.message) == ("error", f"The job failed: {server.model.refuse}")


def test_a_job_that_pauses_itself_says_why(tmp_path: Path) -> None:
    with serving(tmp_path, TrainingModel(pause_at=2)) as server:
        job = server.create(extras={"steps": 4})
        server.wait(job, "paused")
        (event, *_) = server.jobs.list_events(job.id)
        assert (event.level, event.message) == (
            "warn",
            "The job paused itself: the loss is not finite",
        )
        server.jobs.resume(job.id)
        server.wait(job)


def test_jobs_created_at_once_are_all_run(server: Server) -> None:
    file = server.upload()

    def create(number: int) -> str:
        return server.jobs.create(model="base", training_file=file, suffix=f"s{number}").id

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(create, range(16)))
    done: Callable[[], bool] = lambda: all(  # noqa: E731
        job.status == "succeeded" for job in server.jobs.list(limit=100)
    )
    assert within(20, done)
    assert {job.id for job in server.model.jobs} == set(ids)
