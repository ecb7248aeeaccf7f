"""The OpenAPI document against the server: no 5xx, no undocumented status or shape."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from anabranch.api import ServerOptions, create_app
from anabranch.api.fine_tuning.schemas import FineTuningRequest
from anabranch.jobs import Workspace

from .conftest import EchoModel
from .fake_trainer import TrainingModel

# Jobs are queued, and none is ever run: the app's lifespan is not.
folder = tempfile.TemporaryDirectory()
workspace = Workspace.open(Path(folder.name), max_file_bytes=1_000_000)
models = [EchoModel(), TrainingModel()]
app = create_app(models, ServerOptions(workspace=workspace))
schema = schemathesis.openapi.from_asgi("/openapi.json", app)

ROW = json.dumps({"prompt": "p", "completion": "c"}).encode()
FILE = workspace.files.save(io.BytesIO(ROW), "rows.jsonl", "fine-tune").id
BODY = {"model": "base", "training_file": FILE}
JOB = app.state.service.fine_tuning.create(FineTuningRequest.model_validate(BODY), None).id

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


@schema.hook
def map_body(context: Any, body: Any) -> Any:
    """Most requests name a model that exists, or the routes would only ever answer 404."""
    if isinstance(body, dict) and isinstance(body.get("model"), str) and len(body["model"]) != 1:
        body["model"] = "base" if "training_file" in body else "echo"
        file = body.get("training_file")
        if isinstance(file, str) and 3 < len(file) <= 64:
            body["training_file"] = FILE
    return body


@schema.hook
def map_path_parameters(context: Any, path_parameters: Any) -> Any:
    """So that it is not always an unknown file or job either."""
    for name, known in (("file_id", FILE), ("job_id", JOB)):
        value = (path_parameters or {}).get(name)
        if isinstance(value, str) and len(value) > 2:
            path_parameters[name] = known
    return path_parameters


@schema.parametrize()
@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_document_and_server_agree(case: schemathesis.Case) -> None:
    case.call_and_validate(checks=CHECKS)


def test_document_names_every_route_and_body() -> None:
    document = create_app([EchoModel()]).openapi()
    jobs = "/v1/fine_tuning/jobs"
    assert set(app.openapi()["paths"]) - set(document["paths"]) == {
        "/v1/files",
        "/v1/files/{file_id}",
        "/v1/files/{file_id}/content",
        jobs,
        jobs + "/{job_id}",
        *(f"{jobs}/{{job_id}}/{what}" for what in ("cancel", "pause", "resume")),
        jobs + "/{job_id}/events",
        jobs + "/{job_id}/checkpoints",
        "/v1/jobs",
        "/v1/jobs/{job_id}",
        *(f"/v1/jobs/{{job_id}}/{what}" for what in ("cancel", "pause", "resume")),
        "/v1/jobs/{job_id}/events",
        "/v1/jobs/{job_id}/log",
        "/v1/jobs/{job_id}/artifacts",
        "/v1/jobs/{job_id}/artifacts/{name}",
    }
    assert set(document["paths"]) == {
        "/v1/models",
        "/v1/models/{model}",
        "/v1/adapters",
        "/v1/adapters/merge",
        "/v1/adapters/{model}",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/health",
        "/metrics",
    }
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert set(chat["responses"]) >= {"200", "400", "401", "404", "413", "429", "503"}
    for path, operations in app.openapi()["paths"].items():
        for method, operation in operations.items():
            assert "422" not in operation["responses"], (method, path)
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    fields = document["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert fields["functions"]["type"] == "null"
    assert "no effect" in fields["user"]["description"]
