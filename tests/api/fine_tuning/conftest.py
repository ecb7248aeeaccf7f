"""A live server with a model that only pretends to train, and the official client."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from anabranch.jobs import Workspace

from ..conftest import EchoModel, LiveServer
from ..fake_trainer import TrainingModel
from ..test_files import ROW, jsonl
from ..test_server import within


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
