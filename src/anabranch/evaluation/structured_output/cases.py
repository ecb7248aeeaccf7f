"""Schemas with instances that are valid and invalid: the MaskBench sets and the official suite.

JSONSchemaBench (Geng et al. 2025) collected about ten thousand schemas from public sources;
MaskBench adds instances to each. Both are read below the folder that ``ANABRANCH_DATA`` names;
:func:`generated` makes schemas where there is none.
"""

from __future__ import annotations

import json
import lzma
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anabranch.errors import UnknownName
from anabranch.training.errors import DataError

BENCH, SUITE = "jsonschemabench", "json-schema-test-suite"
_SUFFIX = ".jsonl.xz"
_DRAFT_7 = "http://json-schema.org/draft-07/schema#"
_KEYS = ("id", "name", "größe", 'a "b"', "tags", "x/y", "z")
_EXAMPLES = {
    "date": "2024-02-29",
    "ipv4": "10.0.255.1",
    "uuid": "00000000-0000-4000-8000-ffffffffffff",
}


@dataclass(frozen=True)
class Instance:
    """A JSON value and whether the schema's authors call it valid."""

    data: Any
    valid: bool


@dataclass(frozen=True)
class SchemaCase:
    """One schema with its instances. ``category`` is the suite's file, else the data set."""

    name: str
    dataset: str
    category: str
    schema: dict[str, Any] | bool
    instances: tuple[Instance, ...]


def data_folder() -> Path:
    """The folder of built-in sets; :class:`DataError` if none is named."""
    root = os.environ.get("ANABRANCH_DATA")
    if not root:
        raise DataError(
            "the schemas are read from the folder that ANABRANCH_DATA names, which is not set; "
            "the data set 'generated' needs none"
        )
    return Path(root).expanduser()


def datasets() -> list[str]:
    """Names that :func:`load` knows: files of the benchmark and the suite, and ``generated``."""
    found = (
        [
            path.name.removesuffix(_SUFFIX)
            for folder in (BENCH, SUITE)
            for path in sorted((data_folder() / folder).glob(f"*{_SUFFIX}"))
        ]
        if os.environ.get("ANABRANCH_DATA")
        else []
    )
    return [*found, "generated"]


def load(
    names: Sequence[str] | None = None, limit: int | None = None, seed: int = 0
) -> list[SchemaCase]:
    """Cases of the data sets, or of all that there are; ``limit`` draws so many of each."""
    known = datasets()
    chosen: list[SchemaCase] = []
    for name in names or [n for n in known if n != "generated"] or ["generated"]:
        if name not in known:
            raise UnknownName("data set", name, known)
        if name == "generated":
            chosen += generated(limit or 100, seed)
            continue
        cases = list(_read(name))
        if limit is not None and limit < len(cases):
            cases = random.Random(seed).sample(cases, limit)
        chosen += cases
    return chosen


def _read(dataset: str) -> Iterator[SchemaCase]:
    folder = SUITE if dataset.startswith("draft") else BENCH
    path = data_folder() / folder / f"{dataset}{_SUFFIX}"
    with lzma.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            schema = row["schema"]
            if dataset == "draft7" and isinstance(schema, dict):
                schema = {"$schema": _DRAFT_7, **schema}  # the suite says it by the folder
            category = row.get("file", dataset)
            name = row["name"] if "name" in row else f"{category}: {row['description']}"
            tests = tuple(Instance(test["data"], test["valid"]) for test in row["tests"])
            yield SchemaCase(name, dataset, category, schema, tests)


def generated(count: int, seed: int = 0) -> list[SchemaCase]:
    """Random schemas of common keywords, with instances labelled by the validator."""
    from anabranch.evaluation.structured_output.judge import Judge

    cases = []
    for index in range(count):
        draw = random.Random(f"{seed}/{index}")
        schema = _schema(draw, depth=2)
        judge = Judge(schema)
        values = [_instance(schema, draw) for _ in range(3)]
        values += [_spoiled(value, draw) for value in values]
        tests = tuple(Instance(value, judge.error(json.dumps(value)) is None) for value in values)
        cases.append(
            SchemaCase(f"generated-{seed}-{index}", "generated", "generated", schema, tests)
        )
    return cases


def _schema(draw: random.Random, depth: int) -> dict[str, Any]:
    kinds = ["string", "length", "integer", "range", "number", "boolean", "enum", "format", "null"]
    kind = draw.choice(["object", "object", "array", *kinds] if depth else kinds)
    if kind == "object":
        names = draw.sample(
            ["id", "name", "größe", 'a "b"', "tags", "x/y", "z"], draw.randint(1, 4)
        )
        return {
            "type": "object",
            "properties": {name: _schema(draw, depth - 1) for name in names},
            "required": [name for name in names if draw.random() < 0.6],
            "additionalProperties": False,
        }
    if kind == "array":
        least = draw.randint(0, 2)
        limits = {"minItems": least, "maxItems": least + draw.randint(0, 2)}
        return {"type": "array", "items": _schema(draw, depth - 1), **limits}
    if kind == "length":
        least = draw.randint(0, 3)
        return {"type": "string", "minLength": least, "maxLength": least + draw.randint(0, 4)}
    if kind == "range":
        least = draw.randint(-50, 50)
        return {"type": "integer", "minimum": least, "maximum": least + draw.randint(0, 90)}
    if kind == "enum":
        return {"enum": draw.sample(["red", "grün", 3, None, True, "\n"], 3)}
    if kind == "format":
        return {"type": "string", "format": draw.choice(["date", "ipv4", "uuid"])}
    return {"type": kind}


def _instance(schema: dict[str, Any], draw: random.Random) -> Any:
    """A valid instance of a schema that :func:`_schema` made."""
    if "enum" in schema:
        return draw.choice(schema["enum"])
    kind = schema["type"]
    if kind == "object":
        return {
            name: _instance(inner, draw)
            for name, inner in schema["properties"].items()
            if name in schema["required"] or draw.random() < 0.5
        }
    if kind == "array":
        count = draw.randint(schema["minItems"], schema["maxItems"])
        return [_instance(schema["items"], draw) for _ in range(count)]
    if kind == "string":
        if "format" in schema:
            return _EXAMPLES[schema["format"]]
        count = draw.randint(schema.get("minLength", 0), schema.get("maxLength", 6))
        return "".join(draw.choice('ab é日😀"\\\n/') for _ in range(count))
    if kind == "integer":
        return draw.randint(schema.get("minimum", -(10**6)), schema.get("maximum", 10**6))
    return {"number": round(draw.uniform(-9, 9), 3), "boolean": draw.random() < 0.5, "null": None}[
        kind
    ]


def _spoiled(value: Any, draw: random.Random) -> Any:
    """Nearly the same value, often no longer valid."""
    if isinstance(value, dict) and value:
        name = draw.choice(list(value))
        if draw.random() < 0.4:
            return {key: each for key, each in value.items() if key != name}
        return {**value, name: _spoiled(value[name], draw)}
    if isinstance(value, list) and value:
        return [*value[:-1], _spoiled(value[-1], draw)]
    if isinstance(value, str):
        return draw.choice([value + "é" * 8, 7, ""])
    return draw.choice(["x", -(10**9), None, [], {"extra": 1}])
