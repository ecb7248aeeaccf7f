"""The OpenAPI document: request bodies are read by :mod:`anabranch.api.body`, so FastAPI has to
be told about them, and every status that a route can answer is listed.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from anabranch.api import schemas
from anabranch.api.fine_tuning.schemas import FineTuningRequest
from anabranch.api.jobs import JobRequest
from anabranch.api.responses import ErrorResponse

REFERENCE = "#/components/schemas/{model}"

_ERRORS = {
    400: "A field has a value that cannot be served; `param` is its path.",
    401: "API keys are set and the request has none of them.",
    404: "No such model, file or job.",
    409: "The job is in a state, or the name in use, that does not allow it.",
    413: "The body is too large.",
    415: "The content-type is not the one that the route reads.",
    429: "The queue is full; retry after `retry-after` seconds.",
    500: "The request was admitted and failed.",
    503: "The server is shutting down.",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` argument of a route."""
    return {s: {"model": ErrorResponse, "description": _ERRORS[s]} for s in statuses}


def request_body(schema: type[BaseModel]) -> dict[str, Any]:
    """The ``openapi_extra`` argument of a route that reads ``schema``."""
    reference = {"$ref": REFERENCE.format(model=schema.__name__)}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}
    }


def upload(schema: type[BaseModel]) -> dict[str, Any]:
    """The ``openapi_extra`` argument of a route that reads a form with a file."""
    content = {"multipart/form-data": {"schema": schema.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


def query(schema: type[BaseModel], *more: dict[str, Any]) -> dict[str, Any]:
    """The ``openapi_extra`` argument of a route whose query string is ``schema``."""
    document = schema.model_json_schema()
    named = [
        {
            "name": name,
            "in": "query",
            "required": False,
            "description": field.pop("description", ""),
            "schema": field,
        }
        for name, field in document["properties"].items()
    ]
    return {"parameters": [*named, *more]}


def download() -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a route that answers with a file, or with a folder as an archive."""
    data = {"schema": {"type": "string", "format": "binary"}}
    content = {"application/octet-stream": data, "application/zip": data}
    return {
        200: {"description": "The bytes; `ETag` is their SHA-256.", "content": content},
        206: {"description": "The `Range` of a file that was asked for.", "content": content},
        304: {"description": "`If-None-Match` has the `ETag`: nothing has changed."},
        416: {"description": "The `Range` begins behind the file's end."},
    }


def event_stream() -> dict[str, Any]:
    """The second content type of a 200 that may be streamed, as the schema of one event."""
    text = "A chunk as JSON; `[DONE]` in the last event; an `error` if it failed on the way."
    data = {"type": "string", "description": text}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {"text/event-stream": {"schema": event}}


def install(app: FastAPI, has_keys: bool) -> None:
    """Replace ``app.openapi`` by one that knows the request bodies and the keys."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            built = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
            bodies: list[type[BaseModel]] = [
                schemas.ChatCompletionRequest,
                schemas.CompletionRequest,
                schemas.EmbeddingRequest,
                schemas.AdapterRequest,
                schemas.MergeRequest,
                FineTuningRequest,
                JobRequest,
            ]
            _drop_impossible(built)
            _, definitions = models_json_schema(
                [(body, "validation") for body in bodies], ref_template=REFERENCE
            )
            built["components"]["schemas"].update(definitions["$defs"])
            if has_keys:
                built["components"]["securitySchemes"] = {
                    "key": {"type": "http", "scheme": "bearer"}
                }
                built["security"] = [{"key": []}]
            app.openapi_schema = built
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _drop_impossible(document: dict[str, Any]) -> None:
    """FastAPI lists a 422 wherever there is a parameter, but a text in a path cannot be wrong.

    Bodies and query strings are read by :mod:`anabranch.api.body`, which answers 400.
    """
    operations = [each for path in document["paths"].values() for each in path.values()]
    for operation in operations:
        in_path = [one for one in operation.get("parameters", ()) if one["in"] == "path"]
        if all(one["schema"].get("type") == "string" for one in in_path):
            operation["responses"].pop("422", None)
    if not any("422" in operation["responses"] for operation in operations):
        for unused in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(unused, None)
