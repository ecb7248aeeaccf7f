"""Jobs that run as processes, on the page: of every kind, from the form to what they leave."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from nicegui import ui

from anabranch.console.components.chart import Chart
from anabranch.console.curves import read_curves
from anabranch.console.jobs import read_yaml, write_yaml
from anabranch.console.processes import Processes
from anabranch.errors import AnabranchError, InvalidRequest
from anabranch.jobs import UnknownJob, Workspace
from anabranch.jobs.kinds.evaluate import Evaluate, EvaluateSpec
from anabranch.jobs.layout import OUTPUT
from tests.jobs.scripted import Script

from .simulation import Visit, visit
from .test_keys import KEYS, sign_in

RECIPE = """
recipe: mine
base: smollm2
data: [{source: "generator:arithmetic"}]
adapter: {method: lora}
train: {steps: 5}
"""


def falls_short(evaluate: Evaluate, spec: EvaluateSpec, folder: Path) -> list[str]:
    """The command of a claim that is measured at once."""
    line = json.dumps({"id": spec.claims[0], "verdict": "falls short"})
    return [sys.executable, "-c", f"print({line!r}); raise SystemExit(1)"]


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    opened = Workspace.open(tmp_path)
    yield opened
    opened.close()


def processes(at: Visit, name: str = Script.name) -> Processes:
    found = at.console.job_kinds[name]
    assert isinstance(found, Processes)
    return found


def test_from_the_form_to_the_artefacts(workspace: Workspace) -> None:
    async def story(at: Visit) -> None:
        await at.open("jobs")
        at.user.find(marker="new-script").click()
        await at.until(lambda: at.has("until"))
        until, retries = at.one(ui.number, "until"), at.one(ui.number, "retries")
        retries.value = -1.0
        await at.until(lambda: "greater than or equal to 0" in (retries.error or ""))
        assert until.error is None
        retries.value = None
        until.value = 4.0
        await at.until(lambda: retries.error is None)
        at.user.find(marker="start").click()
        await at.until(lambda: "/jobs/script/" in at.user.back_history[-1])
        await at.sees("succeeded", 20)
        await at.sees("step 4")
        await at.sees("Finished")
        await at.sees("error: as asked")  # the log
        job_id = at.user.back_history[-1].rpartition("/")[2]
        (made,) = workspace.jobs.artefacts(job_id)[job_id].values()
        assert made.name in at.texts() and made.sha256 in at.texts()
        assert made.size == 1 and "1 B" in at.texts()
        assert "SHA-256" in at.texts() and "Loss" not in at.texts()
        await at.open("jobs")
        await at.sees("to 4")

    visit(story, workspace=workspace, run_jobs=True)


def test_pause_resume_and_cancel(workspace: Workspace) -> None:
    async def story(at: Visit) -> None:
        kind = processes(at)
        job_id = kind.create({"until": 10_000}, None)
        await at.open(f"jobs/script/{job_id}")
        await at.sees("step ", 20)
        at.user.find(marker="pause").click()
        await at.sees("paused", 20)
        at.user.find(marker="resume").click()
        await at.sees("Went on, attempt 2", 20)
        at.user.find(marker="cancel").click()
        await at.sees("cancelled", 20)
        assert not any(button in at.texts() for button in ("Pause", "Resume", "Cancel"))

    visit(story, workspace=workspace, run_jobs=True)


def test_every_kind_checks_its_text_while_it_is_written(workspace: Workspace) -> None:
    async def story(at: Visit) -> None:
        assert set(at.console.job_kinds) >= {"fine_tuning", "finetune", "federate", "evaluate"}
        for kind, field, wrong, named, right in (
            ("finetune", "recipe", "recipe: mine\nbas: x\n", "bas", RECIPE),
            ("federate", "job", "federate: [\n", "line", _federation()),
            ("evaluate", "claims", "S46\nS0000", "S0000", "S46\n\n s02 "),
        ):
            await at.open(f"jobs?new={kind}")
            await at.until(lambda field=field: at.has(field))  # type: ignore[misc]
            text = at.one(ui.textarea, field)
            text.value = wrong
            await at.until(lambda t=text, n=named: n in (t.error or ""), 20)  # type: ignore[misc]
            text.value = right
            await at.until(lambda t=text: t.error is None, 20)  # type: ignore[misc]
            at.user.find(marker="yaml-tab").click()
            await at.sees("This can be started.", 20)
        assert at.one(ui.textarea, "yaml").value == "claims:\n- S46\n- s02\n"

    visit(story, workspace=workspace, run_jobs=True)


def test_examples_can_be_started(workspace: Workspace) -> None:
    async def story(at: Visit) -> None:
        for name in ("finetune", "federate", "evaluate"):  # a merge needs an adapter
            kind = at.console.job_kinds[name]
            kind.check(read_yaml(kind.example))

    visit(story, workspace=workspace, run_jobs=True)


def test_a_server_that_takes_none_says_why_and_shows_what_it_has(workspace: Workspace) -> None:
    async def story(at: Visit) -> None:
        kind = processes(at)
        await at.open("jobs?new=script")
        await at.sees("Evaluations, Federations, Recipes, Merges, Script")
        await at.sees("Start it with --run-jobs")
        assert not at.has("new-script")
        with pytest.raises(InvalidRequest, match="--run-jobs"):
            kind.create({"until": 1}, None)
        assert at.console.service.jobs is not None
        at.console.service.jobs.submit("script", {"until": 2})  # by the command line
        await at.open("jobs")
        await at.sees("to 2")
        await at.open("claims/S46")
        await at.sees("It cannot be measured from here. This server takes no such jobs")

    visit(story, workspace=workspace)


def test_a_claim_is_measured_by_a_job(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Evaluate, "command", falls_short)

    async def story(at: Visit) -> None:
        service = at.console.service
        assert service.job_runner is not None
        await at.open("claims/S46")
        at.user.find(marker="measure").click()
        await at.until(lambda: "/jobs/evaluate/" in at.user.back_history[-1])
        await at.sees("succeeded", 20)
        await at.sees("falls short")
        service.job_runner.close()  # what comes now waits
        assert service.jobs is not None
        waiting = service.jobs.submit("evaluate", {"claims": ["S02"]})
        await at.open("claims")
        await at.sees("Being measured")
        await at.sees("waiting for its turn")
        service.jobs.ask(waiting.id, "cancel")
        await at.until(lambda: "Being measured" not in at.texts())

    visit(story, workspace=workspace, run_jobs=True)


def test_jobs_belong_to_their_key(workspace: Workspace) -> None:
    async def story(at: Visit) -> None:
        kind = processes(at)
        await sign_in(at, KEYS[0])
        await at.open("jobs?new=script")
        await at.until(lambda: at.has("start"))
        at.one(ui.number, "until").value = 77.0
        at.user.find(marker="start").click()
        await at.until(lambda: "/jobs/script/" in at.user.back_history[-1])
        await at.sees("to 77")
        path = at.user.back_history[-1]
        job_id = path.rpartition("/")[2]
        await sign_in(at, KEYS[1])
        assert (await at.http.get(f"/console/jobs/script/{job_id}")).status_code == 404
        assert job_id not in (await at.http.get("/console/jobs")).text
        for ask in (kind.report, lambda *a: kind.ask(a[0], "cancel", a[1])):
            with pytest.raises(UnknownJob):
                ask(job_id, "somebody else")

    visit(story, workspace=workspace, run_jobs=True, api_keys=KEYS)


def test_a_job_is_not_shown_as_one_of_another_kind(workspace: Workspace) -> None:
    async def story(at: Visit) -> None:
        job_id = processes(at).create({"until": 1}, None)
        for kind in ("fine_tuning", "finetune", "evaluate"):
            assert (await at.http.get(f"/console/jobs/{kind}/{job_id}")).status_code == 404
            with pytest.raises(UnknownJob):
                at.console.job_kinds[kind].ask(job_id, "cancel", None)

    visit(story, workspace=workspace, run_jobs=True)


def test_recipes_and_what_the_api_fine_tunes_are_kept_apart(workspace: Workspace) -> None:
    async def story(at: Visit) -> None:
        job_id = at.console.job_kinds["finetune"].create({"recipe": RECIPE}, None)
        listed = (await at.http.get("/v1/fine_tuning/jobs")).json()
        assert listed["data"] == []
        assert (await at.http.get(f"/v1/fine_tuning/jobs/{job_id}")).status_code == 404
        at.console.job_kinds["finetune"].ask(job_id, "cancel", None)

    visit(story, workspace=workspace, run_jobs=True)


def test_losses_are_read_from_the_output(workspace: Workspace, tmp_path: Path) -> None:
    recipe, federation = tmp_path / "recipe", tmp_path / "federation"
    assert read_curves(recipe) == ("step", {})
    (recipe / "training").mkdir(parents=True)
    entries = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": None},
        {"step": 2, "validation": {"loss": 2.5}},
        {"step": 3, "loss": 2.0},
    ]
    log = recipe / "training" / "metrics.jsonl"
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"step": 4, "lo')
    assert read_curves(recipe) == (
        "step",
        {"training": [(1, 3.0), (3, 2.0)], "validation": [(2, 2.5)]},
    )
    log.write_text("{\n")
    with pytest.raises(AnabranchError, match="JSONDecodeError"):
        read_curves(recipe)
    federation.mkdir()
    job = {"strategy": {"name": "fedavg"}, "schedule": {"rounds": 2}, "runtime": "simulation"}
    (federation / "job.json").write_text(json.dumps(job))
    assert read_curves(federation) == ("round", {})
    history = [{"seconds": 1.0, "loss": 2.0, "valid/loss": 3.0}, {"seconds": 2.0, "loss": 1.0}]
    report = {
        "versions": 2, "clock": "virtual", "seconds": 2.0, "history": history, "traffic": [],
        "incidents": [],
    }  # fmt: skip
    (federation / "report.json").write_text(json.dumps(report))
    assert read_curves(federation) == (
        "round",
        {"loss": [(1, 2.0), (2, 1.0)], "valid/loss": [(1, 3.0)]},
    )

    async def story(at: Visit) -> None:
        assert at.console.service.jobs is not None
        job = at.console.service.jobs.submit("script", {"until": 2})
        output = workspace.job_folder(job.id) / OUTPUT
        (output / "training").mkdir(parents=True, exist_ok=True)
        (output / "training" / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
        await at.open(f"jobs/script/{job.id}")
        (curve,) = at.one(Chart)._props["series"]
        assert curve == {"name": "training", "points": [[1, 3.0]]}
        (output / "training" / "metrics.jsonl").write_text("{\n")
        await at.sees("cannot be read: metrics.jsonl")

    visit(story, workspace=workspace)


def test_texts_of_many_lines_are_written_as_they_are() -> None:
    request = {"job": "a: 1\nb: [x]\n", "overrides": ["a=1"], "retries": 2}
    assert write_yaml(request).startswith("job: |\n  a: 1\n")
    assert read_yaml(write_yaml(request)) == request


def _federation() -> str:
    return "federate: silos\nrecipe: arithmetic\nclients: {count: 2, split: {name: iid}}\n"
