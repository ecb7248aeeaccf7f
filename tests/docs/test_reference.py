"""The pages that are made from the code."""

from __future__ import annotations

import re

import pytest
import typer

from anabranch import registry
from anabranch.cli import app
from anabranch.errors import AnabranchError, QueueFull
from tools.docs import commands, failures, http, plugins, python
from tools.docs.markdown import cell, first_paragraph, plain, table


def headings(page: str) -> list[str]:
    return re.findall(r"^#+ (.*)$", page, flags=re.MULTILINE)


def test_a_table_keeps_its_cells_apart():
    made = table(["a", "b"], [["1 | 2", "two\nlines"]])
    assert made == "| a | b |\n| --- | --- |\n| 1 \\| 2 | two lines |\n\n"
    assert table(["a"], []) == ""
    assert cell("") == ""


@pytest.mark.parametrize(
    ("docstring", "markdown"),
    [
        ("Raises :class:`anabranch.errors.QueueFull`.", "Raises `QueueFull`."),
        ("See :func:`~a.b.run` and :py:meth:`go`.", "See `run` and `go`."),
        ("Like this::\n\n    x = 1", "Like this:\n\n    x = 1"),
        ("::\n\n    x = 1", "\n\n    x = 1"),
        ("``a::b`` and a ratio of 1:2.", "``a::b`` and a ratio of 1:2."),
    ],
)
def test_docstrings_become_markdown(docstring, markdown):
    assert plain(docstring) == markdown


def test_the_first_paragraph_is_one_line():
    assert first_paragraph("One\ntwo.\n\nThree.") == "One two."
    assert first_paragraph(None) == ""


def test_every_route_is_a_heading_with_its_errors():
    page = http.page()
    wanted = {
        f"`{method.upper()} {path}`"
        for path, methods in http.document()["paths"].items()
        for method in methods
    }
    assert wanted <= set(headings(page))
    chat = page.split("### `POST /v1/chat/completions`")[1].split("\n### ")[0]
    assert "[ChatCompletionRequest](#chatcompletionrequest)" in chat
    assert "[429](#errors)" in chat


def test_every_object_that_is_linked_is_described():
    page = http.page()
    linked = set(re.findall(r"\]\(#(\w+)\)", page))
    assert linked <= {re.sub(r"\W", "", heading).lower() for heading in headings(page)}
    assert len(linked) > 30


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "string"}, "string"),
        ({"type": "integer", "minimum": 1, "maximum": 20}, "integer, at least 1, at most 20"),
        ({"type": "number", "exclusiveMinimum": 0}, "number, above 0"),
        ({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, "integer"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "string"),
        ({"type": "array", "items": {"enum": ["a", "b"]}}, "list of `a`, `b`"),
        ({"const": "x"}, "`x`"),
        ({"$ref": "#/components/schemas/Usage"}, "[Usage](#usage)"),
        ({}, "anything"),
    ],
)
def test_schemas_in_words(schema, words):
    assert http.type_of(schema) == words


def test_every_command_and_option_is_in_the_reference():
    page = commands.page()
    sections = dict(re.findall(r"^## `([^`]*)`\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    root = typer.main.get_command(app)
    for path, command in commands.walk(root, ("anabranch",)):
        section = sections[" ".join(path)]
        for parameter in command.params:
            for name in parameter.opts if parameter.param_type_name == "option" else ():
                assert name in section or name == "--help"
    assert "| `--port <int range>` | `8000` | `ANABRANCH_PORT` | 0: any free one. |" in page


def test_links_between_commands_lead_to_their_headings():
    page = commands.page()
    slugs = {heading.strip("`").replace(" ", "-") for heading in headings(page)}
    assert set(re.findall(r"\]\(#([^)]*)\)", page)) <= slugs


def test_every_plugin_is_listed():
    page = plugins.page()
    assert headings(page)[1:] == [kind.capitalize() for kind in sorted(registry.KINDS)]
    for kind in registry.KINDS:
        assert all(f"| `{name}` | " in page for name in registry.available(kind))


def test_errors_show_what_programs_see():
    listed = list(failures.errors())
    assert listed[0] is AnabranchError
    assert len(listed) == len(set(listed)) > 30
    for error in listed[1:]:
        assert listed.index(error.__bases__[0]) < listed.index(error)
    assert QueueFull in listed
    assert "| `QueueFull` | 429 | 1 | `queue_full` | More requests wait" in failures.page()


def test_python_pages_name_modules_that_exist():
    pages = python.pages()
    assert set(pages) == {"index.md", *(f"{name}.md" for name in python.PACKAGES)}
    assert "::: anabranch.serving\n" in pages["serving.md"]
