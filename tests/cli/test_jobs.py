"""``anabranch jobs``: submit, list, show, steer, run without a server."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from anabranch.cli import app
from anabranch.errors import ConfigurationError
from anabranch.jobs import Report, Workspace
from anabranch.jobs.kinds.base import artefact
from anabranch.jobs.layout import OUTPUT
from tests.jobs.scripted import Script

runner = CliRunner()

RECIPE = """
recipe: tiny
data:
  - {source: jsonl, path: rows.jsonl, task: chat}
train: {steps: 1, lr: 1e-3}
"""


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "state"


def call(state: Path, *arguments: str, status: int = 0) -> str:
    result = runner.invoke(app, ["jobs", *arguments, "--state", str(state)])
    assert result.exit_code == status, result.output
    return result.output


def submit(state: Path, *more: str) -> dict[str, Any]:
    recipe = str(state.parent / "recipe.yaml")
    return json.loads(call(state, "submit", "finetune", recipe, *more, "--json"))


def test_submit_list_show(state: Path) -> None:
    job = submit(state, "train.steps=2", "--retries", "1")
    assert job["state"] == "queued"
    assert str(state.parent / "rows.jsonl") in job["spec"]["recipe"]  # wherever the job runs
    assert "steps: 2" in job["spec"]["recipe"]
    listed = json.loads(call(state, "list", "--unfinished", "--json"))
    assert [one["id"] for one in listed] == [job["id"]]
    assert "tiny" in call(state, "list")
    assert "queued" in call(state, "show", job["id"][:12])
    assert "Queued" in call(state, "logs", job["id"])


def test_pause_resume_cancel(state: Path) -> None:
    job = submit(state)
    assert "paused" in call(state, "pause", job["id"])
    assert "queued" in call(state, "resume", job["id"])
    assert "cancelled" in call(state, "cancel", job["id"])
    call(state, "watch", job["id"], status=1)


def test_the_beginning_of_several_ids_is_refused(state: Path) -> None:
    submit(state), submit(state)
    result = runner.invoke(app, ["jobs", "show", "job-", "--state", str(state)])
    assert result.exit_code != 0
    assert "several" in result.output
    result = runner.invoke(app, ["jobs", "show", "nothing", "--state", str(state)])
    assert "nothing" in result.output


def test_work_runs_what_is_queued_and_ends(state: Path) -> None:
    job = submit(state)  # its rows do not exist: it runs, and fails with the reason
    call(state, "work", "--until-idle")
    shown = json.loads(call(state, "show", job["id"], "--json"))
    assert shown["state"] == "failed"
    assert "rows.jsonl" in shown["error"]
    workspace = Workspace.open(state)
    assert not workspace.jobs.wishes()
    workspace.close()


def test_artifacts_are_listed_and_downloaded(state: Path, tmp_path: Path) -> None:
    workspace = Workspace.open(state)
    job = workspace.jobs.create("x", {})
    output = workspace.job_folder(job.id) / OUTPUT
    (output / "model").mkdir(parents=True)
    (output / "model" / "weights").write_text("w")
    (output / "report.md").write_text("done")
    assert workspace.jobs.claim(["x"]) is not None
    made = [artefact(path) for path in sorted(output.iterdir())]
    workspace.jobs.record([Report(job.id, "succeeded", artefacts=made)])
    workspace.close()
    listed = json.loads(call(state, "artifacts", job.id[:12], "--json"))
    assert [one["name"] for one in listed] == ["model", "report.md"]
    assert listed[1]["sha256"] in call(state, "artifacts", job.id)
    to = tmp_path / "to"
    call(state, "download", job.id[:12], "--output", str(to))
    assert (to / "report.md").read_text() == "done"
    assert zipfile.ZipFile(to / "model.zip").read("model/weights") == b"w"
    call(state, "download", job.id, "model/weights", "--output", str(to))
    assert (to / "weights").read_text() == "w"
    result = runner.invoke(app, ["jobs", "download", job.id, "mode", "--state", str(state)])
    assert result.exit_code != 0 and "did you mean 'model'" in result.output
    result = runner.invoke(app, ["jobs", "download", job.id, "model", "--output", str(to),
                                 "--state", str(state)])  # fmt: skip
    assert result.exit_code != 0 and "exists" in result.output


def test_a_kind_that_there_is_not_is_refused_with_those_there_are(state: Path) -> None:
    result = runner.invoke(app, ["jobs", "submit", "compress", "x", "--state", str(state)])
    assert result.exit_code == 2
    assert "no kind of job named 'compress'" in result.output
    for kind in ("evaluate", "federate", "finetune", "merge", "search"):
        assert kind in result.output


def test_what_a_kind_makes_of_words() -> None:
    assert Script().from_words(["until=4", "pause=0.5"]) == {"until": 4, "pause": 0.5}
    for wrong in ("until", "until=[1"):
        with pytest.raises(ConfigurationError, match="until"):
            Script().from_words([wrong])
