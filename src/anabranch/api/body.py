"""Reads a request's body: strict UTF-8, strict JSON, strict schema; every defect is a 400."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request

from anabranch.api.errors import UnsupportedMediaType
from anabranch.errors import InvalidRequest, did_you_mean

Body = TypeVar("Body", bound=BaseModel)

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


async def read(request: Request, schema: type[Body]) -> Body:
    """The body as ``schema``. Raises :class:`InvalidRequest` with the field's path."""
    # Browsers send other types across sites without asking; this one they ask for first.
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaType(
            f"the content-type must be application/json, not {media_type or 'absent'!r}"
        )
    return validate(parse(await request.body()), schema)


def parse(raw: bytes) -> Any:
    """JSON without Python's leniency: no NaN or Infinity, no lone surrogates, no overflow."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest("body", f"byte {error.start} is not valid UTF-8") from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except InvalidRequest:
        raise
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InvalidRequest("body", f"not valid JSON: {error.msg} ({where})") from None
    except RecursionError:
        raise InvalidRequest("body", "the JSON is nested too deeply") from None
    except ValueError:  # Python refuses to convert integers of thousands of digits
        raise InvalidRequest("body", "contains a number with too many digits") from None
    if _SURROGATE_ESCAPE.search(raw):
        _refuse_surrogates(value)
    return value


def validate(value: Any, schema: type[Body]) -> Body:
    """``value`` as ``schema``; reports the defect that lies deepest in the first bad field."""
    if not isinstance(value, dict):
        raise InvalidRequest("body", f"must be a JSON object, not {_kind(value)}")
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        # A union reports every alternative; the one that got furthest is the one that was meant.
        errors = error.errors(include_url=False, include_context=True)
        paths = [_path(item, value) for item in errors]
        field = paths[0][:1]
        best = max(
            (i for i, path in enumerate(paths) if path[:1] == field), key=lambda i: len(paths[i])
        )
        raise InvalidRequest(
            _dotted(paths[best]), _message(errors[best], paths[best], schema)
        ) from None


def problems(value: dict[str, Any], schema: type[BaseModel]) -> dict[str, str]:
    """Everything that is wrong, by the field's place; one message for a field. For forms."""
    try:
        schema.model_validate(value)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=True)
        paths = [_path(item, value) for item in errors]
        best: dict[tuple[str | int, ...], int] = {}
        for i, path in enumerate(paths):
            field = tuple(path[:2])
            if field not in best or len(path) > len(paths[best[field]]):
                best[field] = i
        return {_dotted(paths[i]): _message(errors[i], paths[i], schema) for i in best.values()}
    return {}


def _message(error: ErrorDetails, path: list[str | int], schema: type[BaseModel]) -> str:
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        known = schema.model_fields if len(path) == 1 else _nested_fields(schema)
        return f"unknown field{did_you_mean(str(path[-1]), known)}"
    if kind == "missing":
        return "is required"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        context = error["ctx"]
        wanted = context.get("expected_tags") or "given"
        tag = context.get("tag")
        return f"must be {wanted}" + (f", not {_short(tag)}" if tag is not None else "")
    if kind == "none_required":
        return "is not supported by this server"
    if kind == "literal_error":
        expected = error["ctx"]["expected"]
        return f"must be {expected}, not {_short(value)}; nothing else is supported by this server"
    return f"{error['msg'].replace('Input should', 'must')}, not {_short(value)}"


def _path(error: ErrorDetails, body: Any) -> list[str | int]:
    """The error's place in the body, without the names of union members and key markers."""
    path: list[str | int] = []
    here = body
    for part in error["loc"]:
        inside = (isinstance(here, dict) and part in here) or (
            isinstance(here, list) and isinstance(part, int) and part < len(here)
        )
        if inside:
            here = here[part]
            path.append(part)
    if error["type"] == "missing":
        path.append(error["loc"][-1])
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        path.append(error["ctx"]["discriminator"].strip("'"))
    return path


def _dotted(path: list[str | int]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")[:200]


@cache
def _nested_fields(schema: type[BaseModel]) -> frozenset[str]:
    definitions = schema.model_json_schema().get("$defs", {}).values()
    return frozenset(name for each in definitions for name in each.get("properties", ()))


def _refuse_surrogates(body: Any) -> None:
    stack: list[tuple[list[str | int], Any]] = [([], body)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, str):
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                message = f"character {error.start} is a lone surrogate, which is not text"
                raise InvalidRequest(_dotted(path) or "body", message) from None
        elif isinstance(value, dict):
            stack.extend((path, key) for key in value)
            stack.extend(([*path, key], item) for key, item in value.items())
        elif isinstance(value, list):
            stack.extend(([*path, i], item) for i, item in enumerate(value))


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequest("body", f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise InvalidRequest("body", f"the number {text[:40]} is too large")
    return value


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"an array of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
