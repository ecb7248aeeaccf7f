"""The HTTP reference, from the OpenAPI document of a server whose model has no weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from anabranch.api import ServerOptions, create_app
from anabranch.jobs import Workspace
from anabranch.models.card import ModelCard
from anabranch.models.protocol import Model
from tools.docs.markdown import cell, code, plain, table

HEAD = """# HTTP reference

Every route of a server that keeps files and jobs, made from its own
[OpenAPI document](openapi.json), which a running server has at `/openapi.json`. `/v1/adapters` and
`/v1/jobs` are ours, and so are fields that say *Extension*; the rest is OpenAI's.
[HTTP API](../api.md) explains it.

"""

REFERENCE = "#/components/schemas/"


class Weightless(Model):
    """A model that can be listed and nothing else: routes do not depend on what is served."""

    name = "model"
    card = ModelCard("model", "none", 0, 1, "none", "none", "none", "0" * 64, 0)


@cache
def document() -> dict[str, Any]:
    """The OpenAPI document of a server that offers everything and has no keys."""
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace.open(Path(folder))
        try:
            options = ServerOptions(workspace=workspace, run_jobs=True)
            return create_app([Weightless()], options).openapi()
        finally:
            workspace.close()


def page() -> str:
    """Routes by their first word, the statuses of errors, then every object by its name."""
    sections, group = [HEAD], ""
    for path, method, route in routes():
        first = path.removeprefix("/v1").split("/")[1]
        if first != group:
            group = first
            sections.append(f"## {group.replace('_', ' ').capitalize()}\n\n")
        sections.append(_route(path, method, route))
    objects = document()["components"]["schemas"]
    sections += ["## Errors\n\n", _statuses(), "## Objects\n\n"]
    sections += [_object(name, objects[name]) for name in sorted(objects)]
    return "".join(sections)


def routes() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """``(path, method, operation)``, those of one beginning together."""
    found = [
        (path, method.upper(), operation)
        for path, methods in document()["paths"].items()
        for method, operation in methods.items()
    ]
    order = list(dict.fromkeys(path.split("/")[:3][-1] for path, _, _ in found))
    yield from sorted(found, key=lambda route: order.index(route[0].split("/")[:3][-1]))


def _route(path: str, method: str, route: dict[str, Any]) -> str:
    parameters = table(
        ["parameter", "in", "type", ""],
        [
            [code(p["name"]), p["in"], type_of(p["schema"]), p.get("description", "")]
            for p in route.get("parameters", [])
        ],
    )
    text = f"### `{method} {path}`\n\n{plain(route.get('description', ''))}\n\n{parameters}"
    for kind, content in route.get("requestBody", {}).get("content", {}).items():
        if "$ref" in content["schema"]:
            text += f"Body, `{kind}`: {type_of(content['schema'])}\n\n"
        else:
            text += f"Body, `{kind}`:\n\n{_fields(content['schema'])}"
    answers = {int(status): answer for status, answer in route["responses"].items()}
    for status, answer in answers.items():
        if status < 400:
            kinds = [
                f"{type_of(content['schema'])} (`{kind}`)" if content.get("schema") else code(kind)
                for kind, content in answer.get("content", {}).items()
            ]
            text += f"Answer {status}: {' or '.join(kinds)}\n\n"
    failures = [f"[{status}](#errors)" for status in sorted(answers) if status >= 400]
    return text + (f"Errors: {', '.join(failures)}\n\n" if failures else "")


def _statuses() -> str:
    known = {
        (status, answer["description"])
        for _, _, route in routes()
        for status, answer in route["responses"].items()
        if int(status) >= 400
    }
    return table(["status", "when"], sorted(known))


def _object(name: str, schema: dict[str, Any]) -> str:
    text = f"### {name}\n\n"
    if schema.get("description"):
        text += plain(schema["description"]) + "\n\n"
    if "properties" not in schema:
        kind = type_of(schema)
        return text + (f"{kind}\n\n" if kind != "anything" else "Any JSON value.\n\n")
    return text + _fields(schema)


def _fields(schema: dict[str, Any]) -> str:
    required = schema.get("required", [])
    return table(
        ["field", "type", ""],
        [
            [
                code(name) + (" (required)" if name in required else ""),
                type_of(field),
                plain(field.get("description", "")),
            ]
            for name, field in schema.get("properties", {}).items()
        ],
    )


def type_of(schema: dict[str, Any]) -> str:
    """A JSON schema as a few words of Markdown, with a link for each named object in it."""
    if "$ref" in schema:
        name = schema["$ref"].removeprefix(REFERENCE)
        return f"[{name}](#{name.lower()})"
    if "const" in schema:
        return code(str(schema["const"]))
    if "enum" in schema:
        return ", ".join(code(str(value)) for value in schema["enum"])
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            parts = dict.fromkeys(type_of(s) for s in schema[key] if s.get("type") != "null")
            return " or ".join(parts) or "null"
    if schema.get("type") == "array":
        return f"list of {type_of(schema.get('items', {}))}"
    return cell(str(schema.get("type", "anything"))) + _bounds(schema)


def _bounds(schema: dict[str, Any]) -> str:
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    said = []
    if low is not None:
        said.append(f"{'above' if 'exclusiveMinimum' in schema else 'at least'} {low:g}")
    if high is not None and abs(high) < 2**31 - 1:
        said.append(f"{'below' if 'exclusiveMaximum' in schema else 'at most'} {high:g}")
    if low is not None and abs(low) > 2**31:
        said = said[1:]
    return f", {', '.join(said)}" if said else ""
