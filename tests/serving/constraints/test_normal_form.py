"""Schemas in normal form, and everything that is refused on the way to it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from anabranch.errors import InvalidConstraint, UnsatisfiableConstraint, UnsupportedConstraint
from anabranch.serving.constraints.keywords import ASSERTIONS
from anabranch.serving.constraints.normal_form import SchemaRules, UnsupportedKeyword, normal_form

EVERYTHING = SchemaRules("the test", ASSERTIONS)
CIRCLE = {
    "$ref": "#/$defs/a",
    "$defs": {
        "a": {"allOf": [{"$ref": "#/$defs/b"}]},
        "b": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/a"}]},
    },
}
DRAFT_4 = "http://json-schema.org/draft-04/schema#"
DRAFT_7 = "https://json-schema.org/draft-07/schema"


def normal(schema: Any, rules: SchemaRules = EVERYTHING) -> Any:
    return normal_form(json.dumps(schema), rules)


def test_annotations_and_empty_assertions_are_left_out() -> None:
    schema = {
        "title": "x", "default": 1, "x-vendor": {}, "x-guidance": {"lenient": True},
        "uniqueItems": False, "minLength": 0, "required": [], "additionalProperties": True,
        "not": False, "then": {"type": "null"}, "minContains": 2, "type": "string",
    }  # fmt: skip
    assert normal(schema) == {"type": "string"}


def test_one_and_true_are_different_values() -> None:
    assert normal({"minItems": 1, "uniqueItems": True}) == {"minItems": 1, "uniqueItems": True}
    assert normal({"minItems": 2.0}) == {"minItems": 2}
    assert normal({"maxItems": 1, "uniqueItems": True}) == {"maxItems": 1}


def test_older_drafts_are_said_in_the_newest() -> None:
    schema = {
        "$schema": DRAFT_4, "minimum": 3, "exclusiveMinimum": True, "maximum": 9,
        "exclusiveMaximum": False,
        "items": [{"type": "null"}], "additionalItems": False,
        "dependencies": {"a": ["b"], "c": {"required": ["d"]}},
    }  # fmt: skip
    assert normal(schema) == {
        "maximum": 9,
        "exclusiveMinimum": 3,
        "prefixItems": [{"type": "null"}],
        "items": False,
        "dependentRequired": {"a": ["b"]},
        "dependentSchemas": {"c": {"required": ["d"]}},
    }


def test_what_stands_beside_a_reference_counts_from_2019_on() -> None:
    schema = {"$ref": "#/definitions/a", "minLength": 2, "definitions": {"a": {"type": "string"}}}
    assert normal({"$schema": DRAFT_7, **schema}) == {
        "$ref": "#/$defs/a_0",
        "$defs": {"a_0": {"type": "string"}},
    }
    assert normal(schema)["minLength"] == 2


@pytest.mark.parametrize("reference", ["#/$defs/a~1b", "#here", "https://x.example/inner"])
def test_references_by_pointer_anchor_and_id(reference: str) -> None:
    target = {"$id": "https://x.example/inner", "type": "null"}
    if reference == "#here":
        target = {"$anchor": "here", "type": "null"}
    schema = {"items": {"$ref": reference}, "$defs": {"a/b": target, "unused": {"not": {}}}}
    found = normal(schema)
    assert list(found["$defs"].values()) == [{"type": "null"}]
    assert found["items"] == {"$ref": f"#/$defs/{next(iter(found['$defs']))}"}


def test_a_schema_may_contain_itself() -> None:
    schema = {"properties": {"next": {"$ref": "#"}}, "required": ["value"]}
    found = normal(schema)
    assert found["properties"]["next"] == {"$ref": "#/$defs/root_0"}
    assert found["$defs"]["root_0"] == {k: v for k, v in found.items() if k != "$defs"}


def test_a_reference_may_be_to_true_or_false() -> None:
    assert normal({"$ref": "#/$defs/a", "$defs": {"a": True}})["$defs"] == {"root_0": {}}
    with pytest.raises(UnsatisfiableConstraint):
        normal({"$ref": "#/$defs/a", "$defs": {"a": False}})


def test_enumerations_lose_what_the_rest_excludes() -> None:
    schema = {"enum": ["a", 1, "abc", None], "type": "string", "not": {"maxLength": 1}}
    assert normal(schema) == {"enum": ["abc"]}
    assert normal({"const": {"b": 1, "a": [True]}}) == {"enum": [{"b": 1, "a": [True]}]}


def test_formats_become_patterns_and_ranges() -> None:
    assert set(normal({"type": "string", "format": "date"})) == {"type", "pattern"}
    both = normal({"format": "uuid", "pattern": "^a"})
    assert both["pattern"] != both["allOf"][0]["pattern"]
    assert normal({"format": "int32", "minimum": 0}) == {"minimum": 0, "maximum": 2**31 - 1}
    assert normal({"type": "number", "format": "double"}) == {"type": "number"}


def test_schemas_without_an_instance_become_false() -> None:
    endless = {"type": "object", "properties": {"x": {"$ref": "#/$defs/e"}}, "required": ["x"]}
    schema = {
        "properties": {
            "endless": {"$ref": "#/$defs/e"},
            "empty": {"enum": []},
            "crossed": {"type": "integer", "minimum": 3, "maximum": 2},
            "listed": {"type": "array", "items": {"enum": []}, "minItems": 1},
            "one_of_two": {"anyOf": [{"enum": []}, {"type": "null"}]},
            "or_null": {"type": ["string", "null"], "minLength": 3, "maxLength": 2},
        },
        "$defs": {"e": endless},
    }
    found = normal(schema)["properties"]
    for name in ("endless", "empty", "crossed", "listed"):
        assert found[name] is False
    assert found["one_of_two"] == {"anyOf": [{"type": "null"}]}
    assert found["or_null"] is not False


@pytest.mark.parametrize(
    "schema",
    [
        False,
        {"enum": []},
        {"type": "string", "minLength": 3, "maxLength": 2},
        {"type": "integer", "minimum": 1, "maximum": 0},
        {"allOf": [{"type": "string"}, False]},
        {"const": 3, "type": "string"},
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    ],
)
def test_what_nothing_satisfies_is_refused(schema: Any) -> None:
    with pytest.raises(UnsatisfiableConstraint):
        normal(schema)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "strin"}, "#/type: 'strin'"),
        ({"properties": {"a/b": {"minLength": -1}}}, "#/properties/a~1b/minLength: -1"),
        ({"items": [{}]}, "#/items"),
        ([], "#: "),
        ({"$ref": "#"}, "refers to itself without progress"),
        (CIRCLE, "without progress"),
        ({"pattern": "("}, "#/pattern: '\\(' is no pattern"),
    ],
)  # fmt: skip
def test_what_is_no_schema_is_refused_with_its_pointer(schema: Any, message: str) -> None:
    with pytest.raises(InvalidConstraint, match=message) as error:
        normal(schema)
    assert not isinstance(error.value, UnsupportedConstraint)


def test_text_that_is_not_json_and_depth_are_refused() -> None:
    with pytest.raises(InvalidConstraint, match="not JSON"):
        normal_form("{", EVERYTHING)
    deep = '{"items":' * 5000 + "{}" + "}" * 5000
    with pytest.raises(InvalidConstraint, match="nested too deeply"):
        normal_form(deep, EVERYTHING)


@pytest.mark.parametrize(
    ("schema", "keyword", "pointer"),
    [
        ({"$ref": "https://x.example/s"}, "$ref", "#/$ref"),
        ({"properties": {"a": {"$ref": "#/nowhere"}}}, "$ref", "#/properties/a/$ref"),
        ({"items": {"format": "colour"}}, "format", "#/items/format"),
        ({"$schema": DRAFT_7, "contentEncoding": "base64"}, "contentEncoding", "#/contentEncoding"),
    ],
)
def test_what_cannot_be_brought_into_normal_form(schema: Any, keyword: str, pointer: str) -> None:
    with pytest.raises(UnsupportedKeyword) as error:
        normal(schema)
    assert (error.value.keyword, error.value.pointer) == (keyword, pointer)


def test_a_keyword_that_is_not_honoured_is_named_by_what_the_schema_calls_it() -> None:
    rules = SchemaRules("the test", ASSERTIONS - {"dependentRequired", "prefixItems"})
    for schema, pointer in (
        ({"$schema": DRAFT_4, "dependencies": {"a": ["b"]}}, "#/dependencies"),
        ({"$schema": DRAFT_4, "anyOf": [{"items": [{}, {"type": "null"}]}]}, "#/anyOf/0/items"),
        ({"prefixItems": [{}]}, "#/prefixItems"),
    ):
        with pytest.raises(UnsupportedKeyword, match="the test does not honour") as error:
            normal(schema, rules)
        assert error.value.pointer == pointer


def test_dialects_that_nobody_knows_are_refused() -> None:
    with pytest.raises(UnsupportedConstraint, match=r"#/\$schema"):
        normal({"$schema": "https://example.com/mine", "type": "null"})
    assert normal({"$schema": "http://json-schema.org/schema#", "type": "null"})
