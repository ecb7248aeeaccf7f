"""The OpenAPI document against the server: no 5xx, no undocumented status or shape."""

from __future__ import annotations

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

from anabranch.api import create_app

from .conftest import EchoModel

schema = schemathesis.openapi.from_asgi("/openapi.json", create_app([EchoModel()]))

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
        body["model"] = "echo"
    return body


@schema.parametrize()
@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_document_and_server_agree(case: schemathesis.Case) -> None:
    case.call_and_validate(checks=CHECKS)


def test_document_names_every_route_and_body() -> None:
    document = create_app([EchoModel()]).openapi()
    assert set(document["paths"]) == {
        "/v1/models",
        "/v1/models/{model}",
        "/v1/adapters",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/health",
        "/metrics",
    }
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert set(chat["responses"]) >= {"200", "400", "401", "404", "413", "429", "503"}
    assert "422" not in chat["responses"]
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    fields = document["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert fields["tools"]["type"] == "null"
    assert "no effect" in fields["user"]["description"]
