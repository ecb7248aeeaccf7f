"""A schema in the one form that back-ends are given.

Drafts differ, references reach anywhere in the document, and back-ends know parts of both. The
normal form is Draft 2020-12 with every referenced schema under ``$defs``, no annotations, formats
as patterns, patterns in the common dialect, enumerations without values that the rest of their
schema excludes, and no keywords that say nothing. What cannot be brought into it, and what the
back-end does not honour, is refused with the keyword and where it stands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from anabranch.errors import InvalidConstraint, UnsupportedConstraint
from anabranch.serving.constraints import formats
from anabranch.serving.constraints.drafts import (
    draft_of,
    pointer,
    require_schema,
    specification,
    validator_class,
)
from anabranch.serving.constraints.keywords import ONE_SCHEMA, SCHEMA_LIST, SCHEMA_MAP
from anabranch.serving.constraints.modern import modern
from anabranch.serving.constraints.patterns import portable_pattern
from anabranch.serving.constraints.possible import Schema, without_impossible

FIELD = "response_format"
Path = tuple[str | int, ...]
Refuse = Callable[[str, str], "UnsupportedKeyword"]

_NAMELESS = "urn:anabranch:schema"
"""Base of a document without an id."""


class UnsupportedKeyword(UnsupportedConstraint):
    """A keyword that the back-end does not honour, and why where that is not all."""

    def __init__(self, where: str, keyword: str, backend: str, why: str = "") -> None:
        because = f": {why}" if why else ""
        super().__init__(FIELD, f"{where}: {backend} does not honour {keyword!r}{because}")
        self.pointer = where
        self.keyword = keyword


@dataclass(frozen=True)
class SchemaRules:
    """What a back-end honours in normal form.

    ``check`` gets each schema object and a maker of errors from a keyword and a reason, for what
    only some values or combinations of honoured keywords make impossible.
    """

    backend: str
    honoured: frozenset[str]
    check: Callable[[Mapping[str, Any], Refuse], None] = lambda schema, refuse: None


def normal_form(text: str, rules: SchemaRules) -> Schema:
    """The normal form of a schema given as JSON.

    Raises :class:`InvalidConstraint` if it is no schema or refers to itself without progress,
    :class:`UnsupportedConstraint` for what is not honoured, and
    :class:`UnsatisfiableConstraint` if no instance exists.
    """
    try:
        schema = json.loads(text)
        draft = draft_of(schema, FIELD)
        require_schema(schema, draft, FIELD)
        return without_impossible(_Document(schema, draft, rules).normal())
    except json.JSONDecodeError as error:
        raise InvalidConstraint(FIELD, f"the schema is not JSON: {error}") from error
    except RecursionError as error:
        raise InvalidConstraint(FIELD, "the schema is nested too deeply") from error


class _Document:
    """One schema document on its way to normal form."""

    def __init__(self, schema: Any, draft: str, rules: SchemaRules) -> None:
        from referencing import Registry

        self._schema, self._draft, self._rules = schema, draft, rules
        self._specification = specification(draft)
        resource = self._specification.create_resource(schema)
        self._base = resource.id() or _NAMELESS
        self._registry = Registry().with_resource(self._base, resource)
        self._path_of = dict(_paths(schema, ()))
        self._names: dict[int, str] = {}
        self._booleans: list[dict[str, Any]] = []  # alive, so that their ids stay theirs
        self._waiting: list[tuple[str, Any, Any]] = []

    def normal(self) -> Schema:
        """The root, and under its ``$defs`` whatever is referenced."""
        root = self._normal(self._schema, self._registry.resolver(self._base), ())
        definitions: dict[str, Schema] = {}
        while self._waiting:
            name, schema, resolver = self._waiting.pop()
            definitions[name] = self._normal(schema, resolver, self._path_of[id(schema)])
        return {**root, "$defs": definitions} if isinstance(root, dict) and definitions else root

    def _normal(self, schema: Any, resolver: Any, path: Path) -> Schema:
        if isinstance(schema, bool):
            return schema
        if path:
            resolver = resolver.in_subresource(self._specification.create_resource(schema))
        known = modern(schema, self._draft)
        if "enum" in known or "const" in known:
            return {"enum": self._possible_values(known, path)}
        self._check(schema, known, path)
        normal: dict[str, Any] = {}
        for keyword, value in known.items():
            where = (*path, _written_as(keyword, schema))
            if keyword in ONE_SCHEMA:
                normal[keyword] = self._normal(value, resolver, where)
            elif keyword in SCHEMA_LIST:
                normal[keyword] = [
                    self._normal(each, resolver, (*where, i)) for i, each in enumerate(value)
                ]
            elif keyword in SCHEMA_MAP:
                normal[keyword] = {
                    self._key(keyword, key, where): self._normal(each, resolver, (*where, key))
                    for key, each in value.items()
                }
            elif keyword == "$ref":
                normal["$ref"] = self._reference(value, resolver, where)
            elif keyword == "pattern":
                _add_pattern(normal, portable_pattern(value, self._named(where)))
            elif keyword == "format":
                self._add_format(normal, value, known, where)
            else:
                normal.setdefault(keyword, value)
        return normal

    def _possible_values(self, known: Mapping[str, Any], path: Path) -> list[Any]:
        """The values listed that all other keywords allow too."""
        cls = validator_class(self._draft)
        validator = cls(
            {"$ref": f"{self._base.split('#')[0]}{pointer(*path)}"},
            registry=self._registry,
            format_checker=cls.FORMAT_CHECKER,
        )
        values = known["enum"] if "enum" in known else [known["const"]]
        if len(known) == 1:
            return list(values)
        return [value for value in values if validator.is_valid(value)]

    def _check(self, schema: Mapping[str, Any], known: Mapping[str, Any], path: Path) -> None:
        def refuse(keyword: str, why: str = "") -> UnsupportedKeyword:
            where = pointer(*path, _written_as(keyword, schema))
            return UnsupportedKeyword(where, keyword, self._rules.backend, why)

        for keyword in ("contentEncoding", "contentMediaType"):
            if keyword in schema and self._draft == "07":
                raise refuse(keyword, "draft 07 asserts it; newer drafts do not")
        for keyword in known:
            if keyword not in self._rules.honoured:
                raise refuse(keyword)
        self._rules.check(known, refuse)

    def _reference(self, reference: str, resolver: Any, where: Path) -> str:
        from referencing.exceptions import Unresolvable

        try:
            found = resolver.lookup(reference)
        except (Unresolvable, ValueError) as error:
            raise UnsupportedKeyword(
                pointer(*where),
                "$ref",
                self._rules.backend,
                f"{reference!r} is not in the schema, and nothing is fetched",
            ) from error
        target = found.contents
        if isinstance(target, bool):
            target = self._boolean(target)
        elif id(target) not in self._path_of:
            raise InvalidConstraint(FIELD, f"{pointer(*where)}: {reference!r} is no schema")
        name = self._names.get(id(target))
        if name is None:
            last = str((self._path_of[id(target)] or ("root",))[-1])
            name = f"{re.sub('[^A-Za-z0-9]+', '_', last)}_{len(self._names)}"
            self._names[id(target)] = name
            self._waiting.append((name, target, found.resolver))
        return f"#/$defs/{name}"

    def _boolean(self, value: bool) -> dict[str, Any]:
        """``true`` or ``false`` as an object, so that it can be referred to."""
        schema: dict[str, Any] = {} if value else {"enum": []}
        self._path_of[id(schema)] = ()
        self._booleans.append(schema)
        return schema

    def _key(self, keyword: str, key: str, where: Path) -> str:
        if keyword == "patternProperties":
            return portable_pattern(key, self._named((*where, key)))
        return key

    def _add_format(
        self, normal: dict[str, Any], name: str, known: Mapping[str, Any], where: Path
    ) -> None:
        if name in formats.PATTERNS:
            _add_pattern(normal, f"^(?:{formats.PATTERNS[name]})$")
        elif name in formats.INTEGER_RANGES:
            least, most = formats.INTEGER_RANGES[name]
            normal["minimum"] = max(least, known.get("minimum", least))
            normal["maximum"] = min(most, known.get("maximum", most))
        elif name not in formats.UNRESTRICTED:
            why = f"no back-end knows the format {name!r}"
            raise UnsupportedKeyword(pointer(*where), "format", self._rules.backend, why)

    def _named(self, where: Path) -> str:
        return f"{FIELD}: {pointer(*where)}"


def _paths(value: Any, path: Path) -> list[tuple[int, Path]]:
    """Where each object of the document stands."""
    found: list[tuple[int, Path]] = []
    waiting = [(value, path)]
    while waiting:
        value, path = waiting.pop()
        if isinstance(value, dict):
            found.append((id(value), path))
            waiting += [(inner, (*path, key)) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(inner, (*path, index)) for index, inner in enumerate(value)]
    return found


def _written_as(keyword: str, schema: Mapping[str, Any]) -> str:
    """What the document calls a keyword of the newest draft."""
    if keyword in schema:
        return keyword
    older = {"prefixItems": "items", "items": "additionalItems"}
    return older.get(keyword, "dependencies" if keyword.startswith("dependent") else keyword)


def _add_pattern(normal: dict[str, Any], pattern: str) -> None:
    """A second pattern of the same schema goes into ``allOf``."""
    if "pattern" in normal:
        normal["allOf"] = [*normal.get("allOf", ()), {"pattern": pattern}]
    else:
        normal["pattern"] = pattern
