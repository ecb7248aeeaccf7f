"""What MkDocs calls: adds the pages that are made from the code to those of ``docs/``.

Run as ``python -m mkdocs`` from the root of the repository, so that ``tools`` can be imported.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from tools.docs import commands, failures, http, plugins, python

PAGES: dict[str, Callable[[], str]] = {
    "reference/http.md": http.page,
    "reference/openapi.json": lambda: json.dumps(http.document(), indent=2),
    "reference/cli.md": commands.page,
    "reference/plugins.md": plugins.page,
    "reference/errors.md": failures.page,
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """MkDocs has collected the files of ``docs/``; the made ones come behind them."""
    made = {path: page() for path, page in PAGES.items()}
    made |= {f"reference/python/{name}": text for name, text in python.pages().items()}
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files
