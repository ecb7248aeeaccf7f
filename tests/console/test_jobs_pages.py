"""Jobs on the page: uploaded, checked, started, watched, steered."""

from __future__ import annotations

import asyncio
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from nicegui import ui
from nicegui.elements.upload_files import SmallFileUpload

from anabranch.console.components.chart import Chart
from anabranch.console.components.file_picker import FilePicker
from anabranch.jobs import Workspace
from tests.api.conftest import EchoModel
from tests.api.fake_trainer import TrainingModel
from tests.api.test_files import ROW, jsonl

from .simulation import Visit, visit


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    opened = Workspace.open(tmp_path)
    yield opened
    opened.close()


async def upload(at: Visit, content: bytes, name: str = "rows.jsonl") -> None:
    file = SmallFileUpload(name, "application/jsonl", content)
    await at.one(FilePicker).handle_uploads([file])


async def start(at: Visit, suffix: str = "mine", rows: int = 8) -> str:
    """Upload, fill in the form and start; the job's page is open afterwards."""
    await at.open("jobs?new")
    await upload(at, jsonl(*[ROW] * rows))
    await at.sees("rows.jsonl is here")
    at.one(ui.input, "suffix").value = suffix
    at.one(ui.number, "hyperparameters.batch_size").value = 1.0
    at.one(ui.number, "hyperparameters.n_epochs").value = 2.0
    at.user.find(marker="start").click()
    await at.until(lambda: "/jobs/fine_tuning/" in at.user.back_history[-1])
    await at.sees(f"base:{suffix}")
    return at.user.back_history[-1].rpartition("/")[2]


def test_upload_start_watch_and_chat_with_the_result(workspace: Workspace) -> None:
    async def story(at: Visit) -> None:
        await at.open("jobs")
        await at.sees("No jobs yet")
        job_id = await start(at)
        await at.sees("16 of 16 steps")
        await at.sees("succeeded")
        await at.sees("New fine-tuned model created: base:mine")
        (curve,) = at.one(Chart)._props["series"]
        assert curve["name"] == "training"
        assert curve["points"] == [[step, 3 / step] for step in range(1, 17)]
        addresses = [link._props["href"] for link in at.user.find(marker="download").elements]
        metrics = await at.http.get(next(each for each in addresses if "result_file" in each))
        assert metrics.text.startswith("step,train_loss") and len(metrics.text.splitlines()) == 17
        adapter = await at.http.get(next(each for each in addresses if each.endswith("/adapter")))
        with zipfile.ZipFile(io.BytesIO(adapter.content)) as archive:
            assert "adapter/adapter_config.json" in archive.namelist()
        at.user.find(marker="chat-with").click()
        await at.until(lambda: at.user.back_history[-1].endswith("?model=base:mine"))
        await at.until(lambda: at.user.find(marker="model-0").elements)
        assert at.one(ui.select, "model-0").value == "base:mine"
        await at.open("jobs")
        await at.sees("base:mine")
        assert job_id

    visit(story, TrainingModel(), workspace=workspace)


def test_pause_resume_and_cancel(workspace: Workspace) -> None:
    model = TrainingModel(step_seconds=0.02)

    async def story(at: Visit) -> None:
        await start(at, rows=200)
        await at.sees("of 400 steps")
        at.user.find(marker="pause").click()
        await at.sees("paused")
        await at.until(lambda: at.user.find(marker="resume").elements)
        at.user.find(marker="resume").click()
        await at.until(lambda: "Fine-tuning job goes on" in " ".join(at.texts()), 10)
        at.user.find(marker="cancel").click()
        await at.sees("cancelled")
        assert not any(button in at.texts() for button in ("Pause", "Resume", "Cancel"))

    visit(story, model, workspace=workspace)


def test_a_job_that_fails_says_why(workspace: Workspace) -> None:
    async def story(at: Visit) -> None:
        await start(at)
        await at.sees("the trainer broke. The events below say what led to it.")
        await at.sees("failed")
        assert [job.state for job in workspace.jobs.find().items] == ["failed"]

    visit(story, TrainingModel(fail_at=3), workspace=workspace)


def test_a_bad_file_is_named_with_its_line_and_not_kept(workspace: Workspace) -> None:
    async def story(at: Visit) -> None:
        await at.open("jobs?new")
        await upload(at, jsonl(ROW) + b'{"messages": 3}\n', "bad.jsonl")
        await at.sees("bad.jsonl was not kept. ")
        assert any("line 2" in text for text in at.texts())
        await upload(at, b"", "empty.jsonl")
        await at.sees("empty.jsonl was not kept. ")
        assert not workspace.files.find().items

    visit(story, TrainingModel(), workspace=workspace)


def test_the_form_says_beside_the_field_what_is_wrong(workspace: Workspace) -> None:
    async def story(at: Visit) -> None:
        await at.open("jobs?new")
        suffix, epochs = at.one(ui.input, "suffix"), at.one(ui.number, "hyperparameters.n_epochs")
        file = at.one(ui.select, "training_file")
        suffix.value = "no spaces"
        await upload(at, jsonl(ROW))
        await at.sees("rows.jsonl is here")
        assert file.value is not None
        suffix.value = "still no spaces"
        await at.until(lambda: "match" in (suffix.error or ""))
        assert epochs.error is None
        suffix.value = "fine"
        epochs.value = 2.5
        await at.until(lambda: suffix.error is None and epochs.error is not None)
        epochs.value = 2.0
        await at.until(lambda: epochs.error is None)
        file.value = None
        at.user.find(marker="start").click()
        await at.until(lambda: file.error)
        assert "required" in (file.error or "")

    visit(story, TrainingModel(), workspace=workspace)


def test_yaml_is_checked_while_it_is_written(workspace: Workspace) -> None:
    async def story(at: Visit) -> None:
        await at.open("jobs?new")
        await upload(at, jsonl(ROW))
        await at.sees("rows.jsonl is here")
        at.user.find(marker="yaml-tab").click()
        await at.sees("This can be started.")
        text = at.one(ui.textarea, "yaml")
        assert text.value.startswith("model: base\ntraining_file: file-")
        good = text.value
        text.value = good + "sufix: x\n"
        await at.sees("unknown field (did you mean 'suffix'?)")
        text.value = good + "a: [1,\n"
        await at.sees("YAML: line 4")
        text.value = "just words"
        await at.sees("must be keys with values")
        at.user.find(marker="form-tab").click()
        at.user.find(marker="yaml-tab").click()
        await at.sees("must be keys with values")  # what was written by hand stays
        text.value = good + "suffix: from-yaml\nhyperparameters: {n_epochs: 1}\n"
        await at.sees("This can be started.")
        at.user.find(marker="start").click()
        await at.sees("base:from-yaml")

    visit(story, TrainingModel(), workspace=workspace)


def test_a_name_that_is_taken_is_refused_with_what_to_do(workspace: Workspace) -> None:
    async def story(at: Visit) -> None:
        await start(at)
        await at.sees("succeeded")
        await at.open("jobs?new")
        await upload(at, jsonl(ROW))
        await at.sees("rows.jsonl is here")
        at.one(ui.input, "suffix").value = "mine"
        at.user.find(marker="start").click()
        await at.sees("choose another suffix")
        assert len(workspace.jobs.find().items) == 1

    visit(story, TrainingModel(), workspace=workspace)


def test_two_tabs_watch_one_job_by_one_reading(workspace: Workspace) -> None:
    model = TrainingModel(step_seconds=0.02)

    async def story(at: Visit) -> None:
        job_id = await start(at, rows=200)
        kind, readings = at.console.job_kinds["fine_tuning"], 0
        read = kind.report

        def counted(*args: str | None) -> object:
            nonlocal readings
            readings += 1
            return read(*args)  # type: ignore[arg-type]

        kind.report = counted  # type: ignore[method-assign, assignment]
        for _ in range(4):
            await at.open(f"jobs/fine_tuning/{job_id}")
        opened = readings
        await asyncio.sleep(2.3)
        assert 1 <= readings - opened <= 3
        at.user.find(marker="cancel").click()
        await at.sees("cancelled")

    visit(story, model, workspace=workspace)


def test_unknown_jobs_and_servers_without_jobs_say_so(workspace: Workspace) -> None:
    async def unknown(at: Visit) -> None:
        for path in ("jobs/fine_tuning/nothing", "jobs/federate/nothing"):
            answer = await at.http.get(f"/console/{path}")
            assert answer.status_code == 404 and "There is no such job" in answer.text

    async def none(at: Visit) -> None:
        await at.open("jobs")
        await at.sees("No jobs here")

    visit(unknown, TrainingModel(), workspace=workspace)
    visit(none, EchoModel())
