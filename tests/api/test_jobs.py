"""``/v1/jobs``: submit, look, follow, steer, over HTTP."""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from anabranch.jobs import Workspace
from tests.jobs.scripted import Script

from .conftest import Api, EchoModel, LiveServer, make
from .test_server import within


@pytest.fixture
def server(tmp_path: Path) -> Iterator[httpx.Client]:
    workspace = Workspace.open(tmp_path)
    live = LiveServer(EchoModel(), workspace=workspace, run_jobs=True)
    live.app.state.service.jobs.kinds["script"] = Script()
    with live, httpx.Client(base_url=live.url, timeout=30) as client:
        yield client
    workspace.close()


def submit(client: httpx.Client, **spec: Any) -> dict[str, Any]:
    answer = client.post("/v1/jobs", json={"kind": "script", "spec": spec})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_life_of_a_job(server: httpx.Client) -> None:
    job = submit(server, until=3)
    assert (job["state"], job["name"]) in [("queued", "to 3"), ("running", "to 3")]
    events = []
    with server.stream("GET", f"/v1/jobs/{job['id']}/events") as stream:
        for line in stream.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                events.append(json.loads(line.removeprefix("data: ")))
    assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
    assert events[-1]["message"] == "Finished"
    done = server.get(f"/v1/jobs/{job['id']}").json()
    assert done["state"] == "succeeded"
    assert [one["name"] for one in done["artefacts"]] == ["count"]
    assert "as asked" in server.get(f"/v1/jobs/{job['id']}/log").text
    listed = server.get("/v1/jobs", params={"state": "succeeded"}).json()
    assert [one["id"] for one in listed["data"]] == [job["id"]]


def test_what_a_job_made_is_downloaded(server: httpx.Client) -> None:
    job = submit(server, until=3)
    path = f"/v1/jobs/{job['id']}"
    assert within(20, lambda: server.get(path).json()["state"] == "succeeded")
    (item,) = server.get(f"{path}/artifacts").json()["data"]
    assert item == server.get(path).json()["artefacts"][0]
    answer = server.get(f"{path}/artifacts/count")
    digest = hashlib.sha256(b"3")
    assert (answer.status_code, answer.content, item["sha256"]) == (200, b"3", digest.hexdigest())
    assert answer.headers["etag"] == f'"{digest.hexdigest()}"'
    assert answer.headers["repr-digest"] == f"sha-256=:{b64encode(digest.digest()).decode()}:"
    assert answer.headers["content-length"] == "1"
    assert answer.headers["content-disposition"] == "attachment; filename*=UTF-8''count"
    assert answer.headers["x-content-type-options"] == "nosniff"
    again = server.get(f"{path}/artifacts/count", headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    part = server.get(f"{path}/artifacts/count", headers={"range": "bytes=1-"})
    assert part.status_code == 416
    for name in ("cuont", "%2e%2e/log.txt", "..%2Flog.txt", "count/%2e%2e", "%00"):
        missing = server.get(f"{path}/artifacts/{name}")
        assert missing.status_code == 404, name
    assert (
        "did you mean 'count'" in server.get(f"{path}/artifacts/cuont").json()["error"]["message"]
    )


def test_pause_resume_cancel(server: httpx.Client) -> None:
    job = submit(server, until=10_000)
    path = f"/v1/jobs/{job['id']}"

    def state() -> str:
        return str(server.get(path).json()["state"])

    assert within(20, lambda: server.get(path).json()["progress"].get("fraction"))
    server.post(f"{path}/pause")
    assert within(20, lambda: state() == "paused")
    server.post(f"{path}/resume")
    assert within(20, lambda: state() == "running")
    server.post(f"{path}/cancel")
    assert within(20, lambda: state() == "cancelled")
    refused = server.post(f"{path}/resume")
    assert refused.status_code == 409
    assert "cancelled" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"kind": "finetun", "spec": {}}, "finetune"),
        ({"kind": "finetune", "spec": {"recipe": "recipe: x\n"}}, "train"),
        ({"kind": "finetune"}, "spec"),
        ({"kind": "script", "spec": {"until": "many"}}, "until"),
        ({"kind": "script", "spec": {}, "priority": 5000}, "priority"),
    ],
)
def test_a_bad_job_is_refused_by_name(
    server: httpx.Client, body: dict[str, Any], named: str
) -> None:
    answer = server.post("/v1/jobs", json=body)
    assert answer.status_code in (400, 404)
    assert named in answer.json()["error"]["message"]
    assert server.get("/v1/jobs").json()["data"] == []


def test_a_server_that_others_reach_takes_no_jobs(tmp_path: Path) -> None:
    workspace = Workspace.open(tmp_path)
    api: Api = make(workspace=workspace)
    answer = api.post("/v1/jobs", json={"kind": "evaluate", "spec": {"claims": ["S01"]}})
    assert answer.status_code == 400
    assert "--run-jobs" in answer.json()["error"]["message"]
    workspace.close()


def test_a_key_sees_its_own_jobs_only(tmp_path: Path) -> None:
    workspace = Workspace.open(tmp_path)
    live = LiveServer(EchoModel(), workspace=workspace, run_jobs=True, api_keys=("one", "two"))
    live.app.state.service.jobs.kinds["script"] = Script()
    with live:
        clients = [
            httpx.Client(base_url=live.url, headers={"authorization": f"Bearer {key}"})
            for key in ("one", "two")
        ]
        job = submit(clients[0], until=2)
        assert clients[1].get("/v1/jobs").json()["data"] == []
        for path in ("", "/log", "/events", "/artifacts", "/artifacts/count"):
            assert clients[1].get(f"/v1/jobs/{job['id']}{path}").status_code == 404
        assert clients[1].post(f"/v1/jobs/{job['id']}/cancel").status_code == 404
        assert clients[0].get(f"/v1/jobs/{job['id']}").status_code == 200
        for client in clients:
            client.close()
    workspace.close()
