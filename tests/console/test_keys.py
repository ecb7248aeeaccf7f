"""With API keys: who may see what, and that no page shows another's files."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from anabranch.console.jobs import TakesFiles
from anabranch.console.sessions import COOKIE
from anabranch.jobs import Workspace
from tests.api.conftest import EchoModel
from tests.api.fake_trainer import TrainingModel
from tests.api.test_files import ROW, jsonl

from .simulation import Visit, visit

KEYS = ("alices-key", "bobs-key")
PAGES = ("", "models", "jobs", "jobs/x/x", "engine", "federation", "federation/x", "claims")


async def sign_in(at: Visit, key: str, next_: str = "/models") -> str:
    answer = await at.http.post("/console/sign-in", data={"key": key, "next": next_})
    assert answer.status_code == 303
    return answer.headers["location"]


def test_every_page_asks_for_a_key_and_leads_back() -> None:
    async def story(at: Visit) -> None:
        for page in PAGES:
            answer = await at.http.get(f"/console/{page}")
            assert answer.status_code == 303, page
            assert answer.headers["location"] == f"/console/sign-in?next=/{page}"
        assert (await at.http.get("/")).headers["location"] == "/console/"
        form = (await at.http.get("/console/sign-in?next=/jobs%3Fnew")).text
        assert 'value="/jobs?new"' in form and "API key" in form
        assert (await at.http.get("/v1/models")).status_code == 401  # as ever

    visit(story, api_keys=KEYS)


def test_a_wrong_key_is_refused_and_a_right_one_opens_the_page() -> None:
    async def story(at: Visit) -> None:
        wrong = await at.http.post("/console/sign-in", data={"key": "eves-key", "next": "/"})
        assert wrong.status_code == 401 and "not one of the server" in wrong.text
        assert COOKIE not in at.http.cookies
        assert await sign_in(at, f" {KEYS[0]} ") == "/console/models"
        cookie = at.http.cookies[COOKIE]
        assert KEYS[0] not in cookie
        await at.open("models")
        await at.sees("echo")
        await at.http.post("/console/sign-out")
        assert (await at.http.get("/console/models")).status_code == 303

    visit(story, api_keys=KEYS)


@pytest.mark.parametrize("target", ["//evil.example", "https://evil.example", "/\\evil.example"])
def test_nobody_is_led_to_another_host(target: str) -> None:
    async def story(at: Visit) -> None:
        assert await sign_in(at, KEYS[0], target) == "/console/"
        page = (await at.http.get("/console/sign-in", params={"next": target})).text
        assert "evil" not in page

    visit(story, api_keys=KEYS)


def test_the_form_does_not_run_what_is_in_the_address() -> None:
    async def story(at: Visit) -> None:
        page = (await at.http.get("/console/sign-in", params={"next": '/"><script>x'})).text
        assert "<script>x" not in page

    visit(story, api_keys=KEYS)


def test_files_jobs_and_conversations_belong_to_their_key(tmp_path: Path) -> None:
    workspace = Workspace.open(tmp_path)

    async def story(at: Visit) -> None:
        await sign_in(at, KEYS[0])
        alice = at.console.sessions.visitor(_request(at))
        assert alice is not None and alice.owner is not None
        kind = at.console.job_kinds["fine_tuning"]
        assert isinstance(kind, TakesFiles)
        file = kind.upload(io.BytesIO(jsonl(ROW)), "alices-rows.jsonl", alice.owner)
        request = {"model": "base", "training_file": file.id, "suffix": "alices"}
        job = kind.create(request, alice.owner)
        await at.open()
        conversation = at.console.conversations.newest
        conversation.ask("a secret of alice")
        await at.open("jobs?new")
        await at.sees("base:alices")

        await sign_in(at, KEYS[1])
        await at.open("jobs?new")
        await at.sees("No jobs yet")
        html = (await at.http.get("/console/jobs?new")).text
        assert "alices-rows" not in html and job not in html
        other = await at.http.get(f"/console/jobs/fine_tuning/{job}")
        assert other.status_code == 404 and "alices" not in other.text
        lost = await at.http.get(f"/console/?chat={conversation.id}")
        assert "a secret of alice" not in lost.text

    visit(story, TrainingModel(), EchoModel(), workspace=workspace, api_keys=KEYS)
    workspace.close()


def _request(at: Visit) -> object:
    from starlette.requests import Request

    cookie = f"{COOKIE}={at.http.cookies[COOKIE]}".encode()
    return Request({"type": "http", "headers": [(b"cookie", cookie)]})
