"""Query strings of the list routes; an unknown or repeated parameter is refused like a field."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.requests import Request

from anabranch.api.body import validate
from anabranch.errors import InvalidRequest

Query = TypeVar("Query", bound=BaseModel)

_LABEL = re.compile(r"metadata\[(.{1,64})\]", re.DOTALL)


def _integer(value: Any) -> Any:
    """Digits only: neither ``1.0`` nor ``+1`` nor other alphabets' digits."""
    return int(value) if re.fullmatch(r"-?[0-9]{1,9}", value, re.ASCII) else value


def _boolean(value: Any) -> Any:
    return {"true": True, "false": False}.get(value, value)


Integer = Annotated[int, BeforeValidator(_integer)]
Boolean = Annotated[bool, BeforeValidator(_boolean)]
Cursor = Annotated[str, Field(min_length=1, max_length=100)]


class _Query(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class FileQuery(_Query):
    """``GET /v1/files``."""

    after: Cursor = Field("", description="The id of the last file of the page before.")
    limit: Integer = Field(10_000, ge=1, le=10_000)
    order: Literal["asc", "desc"] = Field("desc", description="By age; desc: newest first.")
    purpose: Annotated[str, Field(min_length=1, max_length=64)] = ""


class JobQuery(_Query):
    """``GET /v1/fine_tuning/jobs``."""

    after: Cursor = Field("", description="The id of the last job of the page before.")
    limit: Integer = Field(20, ge=1, le=1000)


class CheckpointQuery(_Query):
    """``GET /v1/fine_tuning/jobs/{job}/checkpoints``."""

    after: Cursor = Field("", description="The id of the last one of the page before.")
    limit: Integer = Field(10, ge=1, le=1000)


class EventQuery(_Query):
    """``GET /v1/fine_tuning/jobs/{job}/events``."""

    after: Cursor = Field("", description="The id of the last event of the page before.")
    limit: Integer = Field(20, ge=1, le=1000)
    stream: Boolean = Field(
        False, description="All events from the first (or behind `after`), as they happen."
    )


METADATA = {
    "name": "metadata",
    "in": "query",
    "required": False,
    "style": "deepObject",
    "explode": True,
    "description": "Only jobs with these labels: metadata[key]=value.",
    "schema": {
        "type": "object",
        "propertyNames": {"pattern": r"^[A-Za-z0-9._ -]{1,64}$"},
        "additionalProperties": {"type": "string", "maxLength": 512},
    },
}


def read_query(request: Request, schema: type[Query]) -> Query:
    """The query string as ``schema``. Raises :class:`InvalidRequest`."""
    return validate(_single(request, lambda name: _LABEL.fullmatch(name) is None), schema)


def read_labels(request: Request) -> dict[str, str]:
    """What the query string says about ``metadata``."""
    given = _single(request, lambda name: _LABEL.fullmatch(name) is not None)
    labels = {name[len("metadata[") : -1]: value for name, value in given.items()}
    for label, value in labels.items():
        if len(value) > 512:
            raise InvalidRequest("metadata", f"{label!r} is searched for more than 512 characters")
        if not re.fullmatch(r"[A-Za-z0-9._ -]+", label, re.ASCII):
            raise InvalidRequest(
                "metadata", f"can be searched for keys of letters, digits, '. _-', not {label!r}"
            )
    return labels


def _single(request: Request, wanted: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if not wanted(name):
            continue
        if name in found:
            raise InvalidRequest(name[:100], "is given twice")
        found[name] = value
    return found
