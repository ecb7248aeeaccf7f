"""Lists, streamed events, and who sees what."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import openai
import pytest
from openai.types.fine_tuning import FineTuningJobEvent

from ..fake_trainer import TrainingModel
from ..test_server import within
from .conftest import Server, serving


def test_lists_pages_and_labels(server: Server) -> None:
    ids = [server.create(metadata={"n": str(n % 2)}).id for n in range(5)]
    assert [job.id for job in server.jobs.list(limit=2)] == ids[::-1]
    odd = server.jobs.list(metadata={"n": "1"})
    assert [job.id for job in odd] == ids[1::2][::-1]
    page = server.jobs.list(after=ids[2], limit=1)
    assert ([job.id for job in page.data], page.has_more) == ([ids[1]], True)
    job = server.jobs.retrieve(ids[0])
    events = server.jobs.list_events(job.id, limit=1)
    assert events.has_more
    with pytest.raises(openai.BadRequestError, match="after"):
        server.jobs.list_events(job.id, after="ftevent-other-1")


def test_streamed_events_are_all_of_them_and_end(tmp_path: Path) -> None:
    with serving(tmp_path, TrainingModel(step_seconds=0.01)) as server:
        job = server.create(extras={"steps": 20})
        url = f"{server.live.url}/v1/fine_tuning/jobs/{job.id}/events?stream=true"
        with httpx.stream("GET", url, timeout=20) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        streamed = [FineTuningJobEvent.model_validate(json.loads(line)) for line in lines[:-1]]
        listed = [event.id for event in server.jobs.list_events(job.id, limit=100)]
        assert [event.id for event in streamed] == listed[::-1]
        rest = httpx.get(f"{url}&after={listed[1]}").text
        assert rest.count("data: ") == 2


def test_a_key_sees_only_its_own_jobs(tmp_path: Path) -> None:
    with serving(tmp_path, api_keys=("a", "b")) as server:
        mine, theirs = server.client_of("a"), server.client_of("b")
        file = server.upload(client=mine)
        with pytest.raises(openai.BadRequestError, match="no file"):
            theirs.fine_tuning.jobs.create(model="base", training_file=file)
        job = mine.fine_tuning.jobs.create(model="base", training_file=file)
        own, others = mine.fine_tuning.jobs, theirs.fine_tuning.jobs
        assert within(5, lambda: own.retrieve(job.id).status == "succeeded")
        assert [j.id for j in own.list()] == [job.id]
        assert list(others.list()) == []
        for method in (
            others.retrieve,
            others.cancel,
            others.pause,
            others.resume,
            others.list_events,
            others.checkpoints.list,
        ):
            with pytest.raises(openai.NotFoundError):
                method(job.id)
        (result,) = own.retrieve(job.id).result_files
        with pytest.raises(openai.NotFoundError):
            theirs.files.content(result)
        assert mine.files.content(result).read()
