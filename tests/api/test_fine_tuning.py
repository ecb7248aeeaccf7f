"""``/v1/fine_tuning/jobs`` by the official client, on a model that only pretends to train."""

from __future__ import annotations

import concurrent.futures
import copy
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import FileObject
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from anabranch.api.fine_tuning import dataset, runner
from anabranch.api.fine_tuning.handover import Handover
from anabranch.jobs import NewEvent, Report, Workspace
from anabranch.serving import EngineModel
from anabranch.serving.coserving.job import JobEvent, JobProgress
from anabranch.training.filtering import RowPolicy
from anabranch.training.template import Template
from tests import tiny

from .conftest import CARD, EchoModel, LiveServer
from .fake_trainer import TEMPLATE, TrainingModel
from .test_files import ROW, exactly, jsonl
from .test_server import within

TESTS = Path(__file__).parents[1]
LORA_4 = {"r": 4, "lora_alpha": 8}


class Server:
    """A live server with a training model and a workspace, and the clients of its keys."""

    def __init__(self, live: LiveServer, model: Any, workspace: Workspace) -> None:
        self.live = live
        self.model = model
        self.workspace = workspace
        self.client = self.client_of("none")
        self.jobs = self.client.fine_tuning.jobs

    def client_of(self, key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.live.url}/v1", api_key=key, max_retries=0)

    def upload(self, *rows: Any, client: openai.OpenAI | None = None) -> str:
        content = jsonl(*(rows or (ROW,)))
        files = (client or self.client).files
        return files.create(file=("rows.jsonl", content), purpose="fine-tune").id

    def create(
        self, *rows: Any, extras: dict[str, Any] | None = None, **options: Any
    ) -> FineTuningJob:
        extra_body = {"anabranch": extras} if extras is not None else None
        return self.jobs.create(
            **{"model": "base", "training_file": self.upload(*rows), **options},
            extra_body=extra_body,
        )

    def wait(self, job: FineTuningJob, state: str = "succeeded") -> FineTuningJob:
        assert within(10, lambda: self.state(job) == state), self.jobs.retrieve(job.id)
        return self.jobs.retrieve(job.id)

    def state(self, job: FineTuningJob) -> str:
        return str(self.jobs.retrieve(job.id).anabranch["state"])  # type: ignore[attr-defined]


@contextmanager
def serving(folder: Path, model: Any = None, **options: Any) -> Iterator[Server]:
    model = model or TrainingModel()
    workspace = Workspace.open(folder)
    with LiveServer(model, EchoModel(), workspace=workspace, **options) as live:
        yield Server(live, model, workspace)
    workspace.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path) as started:
        yield started


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("shared")) as started:
        yield started


def messages_of(server: Server, job: FineTuningJob) -> list[str]:
    return [event.message for event in server.jobs.list_events(job.id, limit=7)][::-1]


def test_the_life_of_a_job(server: Server) -> None:
    validation = server.upload(ROW, ROW)
    job = server.create(
        *[ROW] * 10,
        validation_file=validation,
        suffix="tone",
        seed=7,
        metadata={"team": "a"},
        method={
            "type": "supervised",
            "supervised": {
                "hyperparameters": {
                    "n_epochs": 2,
                    "batch_size": 4,
                    "learning_rate_multiplier": 0.5,
                }
            },
        },
        extras={"rank": 4, "weight": 2.0, "publish_every": 2},
    )
    exactly(FineTuningJob, job)
    assert (job.status, job.fine_tuned_model, job.trained_tokens) == ("queued", None, None)
    assert (job.seed, job.model, job.metadata) == (7, "base", {"team": "a"})
    assert job.hyperparameters.model_dump() == {
        "n_epochs": 2,
        "batch_size": 4,
        "learning_rate_multiplier": 0.5,
    }
    done = server.wait(job)
    exactly(FineTuningJob, done)
    assert done.fine_tuned_model == "base:tone"
    assert done.finished_at is not None
    assert done.estimated_finish is None
    (asked,) = server.model.jobs
    assert (asked.adapter, asked.method, asked.method_options) == ("tone", "lora", LORA_4)
    assert (asked.weight, asked.publish_every, len(asked.validation)) == (2.0, 2, 2)
    assert (asked.options.batch, asked.options.epochs, asked.options.lr) == (4, 2, 1e-4)
    assert (asked.options.seed, asked.options.evaluate_every) == (7, 3)
    assert len(asked.items) == 10
    # Two epochs of the same ten rows.
    assert done.trained_tokens == 2 * sum(len(example) for (example,) in asked.items)

    answer = server.client.chat.completions.create(
        model="base:tone", messages=[{"role": "user", "content": "x y"}]
    )
    assert answer.choices[0].message.content == "x y "

    events = list(server.jobs.list_events(job.id, limit=4))
    for event in events:
        exactly(FineTuningJobEvent, event)
    assert events[0].message == "The job has successfully completed"
    assert events[1].message == "New fine-tuned model created: base:tone"
    assert events[-1].message == f"Created fine-tuning job: {job.id}"
    steps = [e for e in events if e.type == "metrics" and "train_loss" in e.data]  # type: ignore[operator]
    assert [e.data["step"] for e in steps] == [6, 5, 4, 3, 2, 1]  # type: ignore[index]
    assert steps[-1].message == "Step 1/6: training loss=3.0000"

    checkpoints = list(server.jobs.checkpoints.list(job.id, limit=2))
    for checkpoint in checkpoints:
        exactly(FineTuningJobCheckpoint, checkpoint)
    assert [c.step_number for c in checkpoints] == [6, 4, 2]
    assert {c.fine_tuned_model_checkpoint for c in checkpoints} == {"base:tone"}
    assert checkpoints[0].metrics.valid_loss == pytest.approx(1.0)

    (result,) = done.result_files
    kept = server.client.files.retrieve(result)
    exactly(FileObject, kept)
    assert (kept.purpose, kept.filename) == ("fine-tune-results", "step_metrics.csv")
    table = list(csv.DictReader(io.StringIO(server.client.files.content(result).text)))
    assert [row["step"] for row in table] == list("123456")
    assert [float(row["train_loss"]) for row in table] == pytest.approx(
        [3 / n for n in range(1, 7)]
    )
    assert [row["valid_loss"] for row in table] == ["", "", "1.5", "", "", "1.0"]


def test_auto_is_a_default_for_adapters(server: Server) -> None:
    auto = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    job = server.create(hyperparameters=auto)
    assert job.hyperparameters.model_dump() == {
        "n_epochs": 3,
        "batch_size": 1,
        "learning_rate_multiplier": 1.0,
    }
    done = server.wait(job)
    assert done.fine_tuned_model == f"base:{job.id.removeprefix('ftjob-')}"
    (asked,) = server.model.jobs
    assert (asked.options.lr, asked.method_options, asked.options.max_length) == (
        2e-4,
        {"r": 16, "lora_alpha": 32},
        512,
    )
    assert asked.validation == ()


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


def test_tokens_are_those_of_the_training_code(server: Server) -> None:
    rows: list[Any] = [
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "one"},
                {"role": "assistant", "content": "wrong", "weight": 0},
                {"role": "user", "content": "two"},
                {"role": "assistant", "content": "right", "weight": 1},
            ]
        },
        {"prompt": "what", "completion": "that"},
        {"messages": [{"role": "developer", "content": "d"}, *ROW["messages"]]},
    ]
    server.wait(server.create(*rows))
    (asked,) = server.model.jobs
    trained, texts = [], []
    for (example,) in asked.items:
        marked = [t for t, on in zip(example.tokens, example.trained, strict=True) if on]
        trained.append(server.model.tokenizer.decode(marked))
        texts.append(server.model.tokenizer.decode(list(example.tokens)))
    assert trained == ["right</assistant>", "that</assistant>", "a</assistant>"]
    assert texts[0] == (
        "<system>s</system><user>one</user><assistant>wrong</assistant>"
        "<user>two</user><assistant>right</assistant>"
    )
    assert texts[2].startswith("<system>d</system>")
    assert [example.source for (example,) in asked.items] == [f"rows.jsonl:{n}" for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("options", "status", "param", "words"),
    [
        ({"model": "bse"}, 404, "model", "did you mean 'base'"),
        ({"model": "echo"}, 400, "model", "cannot be fine-tuned here; models that can: base"),
        ({"model": "base:nothing"}, 404, "model", "nor the result of a succeeded job"),
        ({"training_file": "file-nothing"}, 400, "training_file", "no file"),
        ({"validation_file": "file-nothing"}, 400, "validation_file", "no file"),
        ({"suffix": "a:b"}, 400, "suffix", "suffix"),
        ({"suffix": "x" * 65}, 400, "suffix", "suffix"),
        ({"seed": -1}, 400, "seed", "seed"),
        ({"method": {"type": "dpo"}}, 400, "method.type", "'supervised'"),
        ({"method": {"type": "reinforcement"}}, 400, "method.type", "'supervised'"),
        ({"hyperparameters": {"n_epochs": 0}}, 400, "hyperparameters.n_epochs", "greater"),
        ({"hyperparameters": {"epochs": 1}}, 400, "hyperparameters.epochs", "n_epochs"),
        (
            {
                "hyperparameters": {"n_epochs": 1},
                "method": {"type": "supervised", "supervised": {"hyperparameters": {}}},
            },
            400,
            "hyperparameters",
            "one place",
        ),
        ({"integrations": [{"type": "wandb"}]}, 400, "integrations", "at most 0"),
        ({"metadata": {str(n): "" for n in range(17)}}, 400, "metadata", "at most 16"),
        ({"extras": {"rnk": 4}}, 400, "anabranch.rnk", "did you mean 'rank'"),
        ({"extras": {"method": "lorra"}}, 400, "anabranch.method", "did you mean 'lora'"),
        ({"extras": {"method": "ia3", "rank": 4}}, 400, "anabranch.rank", "has no rank"),
        ({"extras": {"options": {"alpha": 1}}}, 400, "anabranch.options.alpha", "lora_alpha"),
        ({"extras": {"rank": 10**6}}, 400, "anabranch.rank", "1024"),
        ({"extras": {"options": {"r": 10**6}}}, 400, "anabranch.options.r", "1 to 1024"),
        ({"extras": {"rank": 4, "options": {"r": 4}}}, 400, "anabranch.rank", "also given"),
        ({"extras": {"max_length": 513}}, 400, "anabranch.max_length", "at most 512 tokens"),
        ({"extras": {"max_length": 10}}, 400, "training_file", "rows.jsonl:1"),
        ({"extras": {"max_length": 10, "overlong": "drop"}}, 400, "training_file", "no row left"),
        ({"extras": {"evaluate_every": 1}}, 400, "anabranch.evaluate_every", "validation_file"),
        (
            {"extras": {"lr": 1e-3}, "hyperparameters": {"learning_rate_multiplier": 2.0}},
            400,
            "anabranch.lr",
            "learning_rate_multiplier",
        ),
        (
            {"extras": {"steps": 3}, "hyperparameters": {"n_epochs": 2}},
            400,
            "anabranch.steps",
            "n_epochs",
        ),
        ({"extras": {"template": "/etc/passwd"}}, 400, "anabranch.template", "alpaca"),
    ],
)
def test_refusals(
    shared: Server, options: dict[str, Any], status: int, param: str, words: str
) -> None:
    with pytest.raises(openai.APIStatusError, match=words) as refused:
        shared.create(**options)
    assert (refused.value.status_code, refused.value.param) == (status, param)
    assert list(shared.jobs.list()) == []
    folder = shared.workspace.folder / "jobs"
    assert not folder.exists() or list(folder.iterdir()) == []


def test_a_file_of_another_purpose_cannot_be_trained_on(shared: Server) -> None:
    file = shared.client.files.create(file=("x", jsonl(ROW)), purpose="batch")
    with pytest.raises(openai.BadRequestError, match="purpose 'batch'"):
        shared.jobs.create(model="base", training_file=file.id)


def test_unknown_jobs(shared: Server) -> None:
    jobs = shared.jobs
    for method in (
        jobs.retrieve,
        jobs.cancel,
        jobs.pause,
        jobs.resume,
        jobs.list_events,
        jobs.checkpoints.list,
    ):
        with pytest.raises(openai.NotFoundError) as missing:
            method("ftjob-nothing")
        assert missing.value.code == "job_not_found"


def test_long_rows_are_named_or_cut_as_asked(server: Server) -> None:
    long = {"prompt": "x" * 100, "completion": "y" * 100}
    with pytest.raises(openai.BadRequestError, match=r"2 rows \(rows.jsonl:2, rows.jsonl:4\)"):
        server.create(ROW, long, ROW, long, extras={"max_length": 60})
    job = server.create(
        ROW, long, ROW, long, extras={"max_length": 60, "overlong": "drop", "steps": 2}
    )
    server.wait(job)
    assert len(server.model.jobs[0].items) == 2
    assert any("2 rows: longer than max_length" in m for m in messages_of(server, job))
    job = server.create(ROW, long, extras={"max_length": 150, "overlong": "truncate"})
    server.wait(job)
    assert [len(e) for (e,) in server.model.jobs[1].items][1] == 150


def test_ten_thousand_rows_and_a_file_deleted_right_away(server: Server) -> None:
    file = server.upload(*({"prompt": f"p{n}", "completion": f"{n}"} for n in range(10_000)))
    job = server.jobs.create(
        model="base", training_file=file, hyperparameters={"n_epochs": 1, "batch_size": 500}
    )
    server.client.files.delete(file)
    done = server.wait(job)
    assert len(server.model.jobs[0].items) == 10_000
    assert done.training_file == file


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


def test_names_are_not_taken_from_others(server: Server) -> None:
    done = server.wait(server.create(suffix="tone"))
    with pytest.raises(openai.ConflictError, match="base:tone is served already"):
        server.create(suffix="tone")
    server.model.go.clear()
    waiting = server.create(suffix="other")
    with pytest.raises(openai.ConflictError, match="unfinished job already makes 'other'"):
        server.create(suffix="other")
    server.jobs.cancel(waiting.id)
    server.model.go.set()
    # Going on from a result: its method, its folder.
    more = server.wait(server.create(model="base:tone", suffix="more"))
    assert (more.model, more.fine_tuned_model) == ("base:tone", "base:more")
    asked = server.model.jobs[-1]
    assert asked.start_from == server.workspace.job_folder(done.id) / "output" / "adapter"
    assert asked.method_options == {"r": 16, "lora_alpha": 32}
    with pytest.raises(openai.BadRequestError, match="leave it out"):
        server.create(model="base:tone", extras={"rank": 2})
    server.client.models.delete("base:tone")
    server.wait(server.create(suffix="tone"))


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


def test_a_store_that_fails_for_a_while_loses_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "RETRY_SECONDS", 0.01)
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


def test_the_engine_in_the_place_of_the_fake_one(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny.byte_tokenizer())
    tokenizer.chat_template = TEMPLATE
    engine = tiny.engine(200, tokenizer=tokenizer)
    model = EngineModel("base", replace(CARD, name="base"), tokenizer, engine)
    with serving(tmp_path, model) as server:
        ask = {"model": "base:tone", "prompt": "<user>q", "max_tokens": 4, "temperature": 0}
        job = server.create(
            *[ROW] * 8,
            validation_file=server.upload(),
            suffix="tone",
            hyperparameters={"n_epochs": 2, "batch_size": 2},
            extras={"rank": 2, "lr": 1e-2, "publish_every": 3},
        )
        done = server.wait(job)
        exactly(FineTuningJob, done)
        ours = done.anabranch  # type: ignore[attr-defined]
        assert (ours["step"], ours["total_steps"], ours["version"]) == (8, 8, 3)
        assert done.trained_tokens == 608
        table = list(
            csv.DictReader(io.StringIO(server.client.files.content(done.result_files[0]).text))
        )
        losses = [float(row["train_loss"]) for row in table]
        assert len(losses) == 8
        assert losses[-1] < losses[0] - 1
        assert float(table[-1]["valid_loss"]) == ours["validation_loss"]
        assert [c.step_number for c in server.jobs.checkpoints.list(job.id)] == [8, 6, 3]
        answer = server.client.completions.create(**ask)  # type: ignore[call-overload]
        base = server.client.completions.create(**ask | {"model": "base"})  # type: ignore[call-overload]
        assert answer.choices[0].text != base.choices[0].text
        long = server.create(extras={"steps": 100_000})
        server.wait(long, "running")
        server.jobs.pause(long.id)
        server.wait(long, "paused")
        server.jobs.resume(long.id)
        server.wait(long, "running")
        refused = server.create(extras={"method": "prompt_tuning"})
        assert "prompt" in server.wait(refused, "failed").error.message  # type: ignore[union-attr]
    # The served adapter comes back, and the unfinished job goes on.
    engine = tiny.engine(200, tokenizer=tokenizer)
    model = EngineModel("base", replace(CARD, name="base"), tokenizer, engine)
    with serving(tmp_path, model) as server:
        again = server.client.completions.create(**ask)  # type: ignore[call-overload]
        assert again.choices[0].text == answer.choices[0].text
        at = server.jobs.retrieve(long.id).anabranch["step"] or 0  # type: ignore[attr-defined]
        assert within(10, lambda: (server.jobs.retrieve(long.id).anabranch["step"] or 0) > at)  # type: ignore[attr-defined]
        assert server.jobs.cancel(long.id).status == "cancelled"


def step(number: int) -> JobEvent:
    return JobEvent("step", JobProgress("running", step=number))


def test_the_handover_is_bounded_ordered_and_keeps_the_newest() -> None:
    handover = Handover(most=3)
    for number in range(10):
        handover.put("a", step(number))
    handover.put("b", step(0))
    state = JobEvent("state", JobProgress("succeeded", step=9))
    handover.put("a", state)
    events, skipped = handover.take(0)
    assert [e.progress.step for job, e in events if job == "a"] == [0, 1, 2, 9, 9]
    assert events[-1] == ("b", step(0)) or ("b", step(0)) in events
    assert [e for job, e in events if job == "a"][-1] == state
    assert skipped == {"a": 6}
    assert handover.take(0) == ([], {})


notes = st.builds(NewEvent, st.just("k"), st.text("ab", max_size=2))
reports = st.builds(
    Report,
    st.sampled_from("xy"),
    st.sampled_from([None, None, "paused", "running"]),
    st.one_of(st.none(), st.dictionaries(st.just("step"), st.integers(0, 9))),
    st.sampled_from([None, "e"]),
    st.lists(notes, max_size=2),
)


@given(st.lists(reports, max_size=12))
def test_merged_reports_say_the_same(given_: list[Report]) -> None:
    merged = runner.merged(given_)
    for job in "xy":
        before, after = ([r for r in each if r.job_id == job] for each in (given_, merged))
        assert [e for r in after for e in r.events] == [e for r in before for e in r.events]
        assert [r.state for r in after if r.state] == [r.state for r in before if r.state]
        for name in ("progress", "error"):
            told = [
                [getattr(r, name) for r in each if getattr(r, name) is not None]
                for each in (before, after)
            ]
            assert told[0][-1:] == told[1][-1:]
        assert all(r.state for r in after[1:])


def test_rows_come_back_as_they_were_saved(tmp_path: Path) -> None:
    rows = [{"prompt": f"é {n}", "completion": "y" * n} for n in range(50)]
    source = tmp_path / "rows.jsonl"
    source.write_bytes(jsonl(*rows))
    template = Template("chat", TrainingModel().tokenizer)
    made = dataset.render(source, "rows.jsonl", template, RowPolicy(), "training_file").items
    dataset.save(tmp_path / "x" / "rows.safetensors", made)
    assert dataset.load(tmp_path / "x" / "rows.safetensors") == list(made)
