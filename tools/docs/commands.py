"""The command-line reference, from the typer application."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import cleandoc
from typing import Any

import typer

from anabranch.cli import app
from tools.docs.markdown import cell, code, plain, table

HEAD = """# Command line

Every command and option of the program `anabranch`, made from the program itself. Errors that a
user can cause end it with a message and a status of their own ([errors](errors.md));
`anabranch --debug COMMAND` shows the traceback. A variable that is named sets the option's default.

"""


def page() -> str:
    """A heading for each command, with its usage, arguments and options."""
    root = typer.main.get_command(app)
    return HEAD + "".join(_section(path, command) for path, command in walk(root, ("anabranch",)))


def walk(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The command and all below it, in the order of ``--help``, hidden ones left out."""
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        if not child.hidden:
            yield from walk(child, (*path, name))


def _section(path: tuple[str, ...], command: Any) -> str:
    context = command.make_context(" ".join(path), [], resilient_parsing=True)
    usage = " ".join([*path, *command.collect_usage_pieces(context)])
    shown = [p for p in command.params if p.name != "help" and not getattr(p, "hidden", False)]
    arguments = [p for p in shown if p.param_type_name == "argument"]
    options = [p for p in shown if p.param_type_name == "option"]
    commands = getattr(command, "commands", {})
    return (
        f"## `{' '.join(path)}`\n\n{plain(cleandoc(command.help or ''))}\n\n```\n{usage}\n```\n\n"
        + table(["command", ""], [_entry(path, name, c) for name, c in commands.items()])
        + table(["argument", ""], [[_spelling(a, context), _help(a)] for a in arguments])
        + table(
            ["option", "default", "variable", ""],
            [[_spelling(o, context), _default(o), _variable(o), _help(o)] for o in options],
        )
    )


def _entry(path: tuple[str, ...], name: str, command: Any) -> list[str]:
    anchor = "-".join([*path, name])
    return [f"[`{name}`](#{anchor})", command.get_short_help_str(limit=200)]


def _spelling(parameter: Any, context: Any) -> str:
    return code(parameter.get_help_record(context)[0])


def _default(option: Any) -> str:
    value = option.default
    if value is None or value is False or value == () or callable(value):
        return ""
    return code("on" if value is True else str(value))


def _variable(option: Any) -> str:
    return code(option.envvar) if isinstance(option.envvar, str) else ""


def _help(parameter: Any) -> str:
    return cell(parameter.help or "")
