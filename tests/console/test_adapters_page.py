"""Adapters on the Models page and over HTTP: downloaded, and merged by a job."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from nicegui import ui

from anabranch.jobs import Artefact, Report, Workspace
from anabranch.jobs.kinds.merge import Merge, MergeSpec
from tests.api.conftest import EchoModel
from tests.api.fake_trainer import TrainingModel

from .simulation import Visit, visit
from .test_keys import KEYS, sign_in
from .test_other_pages import adapter


def says_what(merge: Merge, spec: MergeSpec, folder: Path) -> list[str]:
    """The command of a merge that only says what it would merge."""
    return [sys.executable, "-c", f"print({json.dumps(spec.model_dump(exclude={'limits'}))!r})"]


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    opened = Workspace.open(tmp_path / "state")
    yield opened
    opened.close()


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    folder.mkdir()
    adapter(folder, "one")
    (folder / "one" / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


def test_download_and_merge(
    workspace: Workspace, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Merge, "command", says_what)
    model = TrainingModel()
    model.source = "smollm2"

    async def story(at: Visit) -> None:
        await at.console.service.load_adapter("base", "one")
        await at.open("models")
        (link,) = at.user.find(marker="download").elements
        page, api = [
            await at.http.get(each) for each in (link._props["href"], "/v1/adapters/base:one")
        ]
        assert page.content == api.content and page.headers["etag"] == api.headers["etag"]
        assert int(api.headers["content-length"]) == len(api.content)
        with zipfile.ZipFile(io.BytesIO(api.content)) as archive:
            assert archive.read("one/adapter_model.safetensors") == b"weights"
        at.user.find(marker="merge base:one").click()
        await at.sees("Merge base:one into a new model?")
        name = at.one(ui.input, "merged-name")
        assert name.value == "base-one"
        name.value = "../away"
        at.user.find(marker="confirm").click()
        await at.sees("cannot name a model")
        assert not workspace.jobs.find("merge").items
        name.value = "both"
        at.user.find(marker="confirm").click()
        await at.until(lambda: "/jobs/merge/" in at.user.back_history[-1])
        await at.sees("succeeded", 20)
        (job,) = workspace.jobs.find("merge").items
        asked = {"base": "smollm2", "adapter": str(adapters / "one"), "model": "both"}
        assert job.spec == asked and job.name == "both"
        answer = await at.http.post("/v1/adapters/merge", json={"model": "base:one", "name": "two"})
        assert (answer.json()["kind"], answer.json()["spec"]["model"]) == ("merge", "two")
        for wrong, status, named in (
            ({"model": "base", "name": "x"}, 400, "is a base model"),
            ({"model": "base:none", "name": "x"}, 404, "none"),
            ({"model": "base:one", "name": "a/b"}, 400, "cannot name a model"),
            ({"model": "base:one"}, 400, "name"),
        ):
            refused = await at.http.post("/v1/adapters/merge", json=wrong)
            assert refused.status_code == status and named in refused.json()["error"]["message"]
        for missing, status in (("base", 400), ("base:none", 404), ("none", 404)):
            assert (await at.http.get(f"/v1/adapters/{missing}")).status_code == status

    visit(story, model, workspace=workspace, adapters=adapters, run_jobs=True)


def test_a_server_that_takes_no_jobs_merges_nothing(workspace: Workspace, adapters: Path) -> None:
    model = TrainingModel()
    model.source = "smollm2"

    async def story(at: Visit) -> None:
        await at.console.service.load_adapter("base", "one")
        await at.open("models")
        assert at.has("download") and "Merge" not in at.texts()
        answer = await at.http.post("/v1/adapters/merge", json={"model": "base:one", "name": "x"})
        assert answer.status_code == 400 and "--run-jobs" in answer.json()["error"]["message"]

    visit(story, model, workspace=workspace, adapters=adapters)


def test_files_belong_to_the_key_whose_job_made_them(workspace: Workspace, adapters: Path) -> None:
    async def story(at: Visit) -> None:
        cookie, owners = {}, {}
        for key in KEYS:
            await sign_in(at, key)
            cookie[key] = dict(at.http.cookies)
            owners[key] = at.console.sessions._visitors[at.http.cookies["anabranch_console"]].owner
        job = workspace.jobs.create("mine", {}, owner=owners[KEYS[0]])
        made = workspace.job_folder(job.id) / "adapter"
        made.parent.mkdir(parents=True)
        (adapters / "one").rename(made)
        assert workspace.jobs.claim(["mine"]) is not None
        artefact = Artefact("adapter", str(made), 9)
        workspace.jobs.record([Report(job.id, "succeeded", artefacts=[artefact])])
        await at.console.service.models["base"].add_adapter("mine", made)
        at.http.cookies.clear()
        console = f"/console/downloads/jobs/{job.id}/adapter"
        for path, denied in (
            (f"/v1/jobs/{job.id}/artifacts", 404),
            (f"/v1/jobs/{job.id}/artifacts/adapter", 404),
            ("/v1/adapters/base:mine", 404),
        ):
            assert (await at.http.get(path)).status_code == 401
            for key, status in ((KEYS[0], 200), (KEYS[1], denied)):
                headers = {"authorization": f"Bearer {key}"}
                assert (await at.http.get(path, headers=headers)).status_code == status, path
        for path in (console, "/console/downloads/adapters/base:mine"):
            assert (await at.http.get(path)).status_code == 401
            for key, status in ((KEYS[0], 200), (KEYS[1], 404)):
                at.http.cookies.update(cookie[key])
                assert (await at.http.get(path)).status_code == status, path
            at.http.cookies.clear()
        at.http.cookies.update(cookie[KEYS[1]])
        await at.open("models")
        await at.sees("base:mine")
        assert not at.has("download")

    visit(story, TrainingModel(), EchoModel(), workspace=workspace, adapters=adapters,
          api_keys=KEYS)  # fmt: skip
