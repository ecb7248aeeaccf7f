"""The reference of errors, from the one exception tree."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import anabranch
from anabranch.errors import AnabranchError
from tools.docs.markdown import code, first_paragraph, table

HEAD = """# Errors

Everything that a user can cause is an `AnabranchError`. Its message says what was wrong, where, and
what would be right ([troubleshooting](../troubleshooting.md) has the frequent ones); its class says
how the command line exits and what the server answers. `code` is the field of that name in the
server's `error` object.

"""


def page() -> str:
    """A table of the classes, each followed by its subclasses."""
    rows = [
        [
            code(error.__name__),
            str(error.status),
            str(error.exit_code),
            code(error.code or ""),
            first_paragraph(error.__doc__),
        ]
        for error in errors()
    ]
    return HEAD + table(["error", "HTTP status", "exit status", "code", "when"], rows)


def errors() -> Iterator[type[AnabranchError]]:
    """Every error of the modules named ``errors``, a base before its subclasses."""
    package = Path(anabranch.__path__[0])
    for file in sorted(package.rglob("errors.py")):
        importlib.import_module(".".join(file.relative_to(package.parent).with_suffix("").parts))
    yield AnabranchError
    yield from _below(AnabranchError)


def _below(base: type[AnabranchError]) -> Iterator[type[AnabranchError]]:
    for error in sorted(base.__subclasses__(), key=lambda cls: (cls.__module__, cls.__name__)):
        if error.__bases__[0] is base and error.__module__.endswith("errors"):
            yield error
            yield from _below(error)
