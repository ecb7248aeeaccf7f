"""``run.json``: what a run is, how far it got, and what it found.

A run belongs to its folder. The same recipe in the same folder continues; another one is refused.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from anabranch.errors import ConfigurationError
from anabranch.files import write_json
from anabranch.training.errors import TrainingError
from anabranch.training.recipe_file import difference

NAME = "run.json"
_FORMAT = 1
AFTERWARDS = ("about", "deploy.", "monitor.")
"""Keys that decide what is done with a finished model; changing them trains nothing again."""


class RunRecord:
    """The contents of ``run.json``, written whole after every change."""

    def __init__(self, folder: Path, content: dict[str, Any]) -> None:
        self.folder = folder
        self.content = content

    @classmethod
    def open(cls, folder: Path, recipe: dict[str, Any], force: bool = False) -> RunRecord:
        """The run of this folder, or a new one.

        With ``force`` a run of another recipe is set aside in ``previous-N`` and a new one begins.
        Raises :class:`ConfigurationError` with the differences otherwise.
        """
        path = folder / NAME
        if not path.exists():
            if folder.is_dir() and any(folder.iterdir()):
                raise ConfigurationError(
                    f"{folder} is not empty and holds no run; choose another --output"
                )
            return cls(folder, {"format": _FORMAT, "recipe": recipe, "stages": {}})
        content = read_json(path)
        if content.get("format") != _FORMAT:
            raise TrainingError(f"{path} was written by another version; choose another --output")
        changes = difference(content["recipe"], recipe)
        if all(change.startswith(AFTERWARDS) for change in changes):
            if changes:
                content |= {"recipe": recipe, "status": "running"}
            return cls(folder, content)
        if not force:
            raise ConfigurationError(
                f"{folder} holds a run of another recipe:\n  " + "\n  ".join(changes) + "\n"
                "choose another --output, or set the earlier run aside with --force"
            )
        set_aside(folder)
        return cls(folder, {"format": _FORMAT, "recipe": recipe, "stages": {}})

    @property
    def status(self) -> str:
        """``new``, ``running``, ``interrupted``, ``refused`` or ``finished``."""
        return str(self.content.get("status", "new"))

    def update(self, **values: Any) -> None:
        """Set keys and write the file."""
        self.content.update(values)
        write_json(self.folder / NAME, self.content)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Note when a stage ended and how long it took."""
        began = time.perf_counter()
        yield
        now = datetime.now(UTC).isoformat(timespec="seconds")
        seconds = round(time.perf_counter() - began, 3)
        self.content["stages"][name] = {"finished": now, "seconds": seconds}
        self.update()

    def require_same(self, key: str, value: Mapping[str, str], what: str) -> None:
        """Remember fingerprints, or raise if they are not those that the run began with."""
        known = self.content.get(key)
        if known is not None and (changes := difference(known, dict(value))):
            raise TrainingError(
                f"{self.folder} holds a run whose {what} has changed since:\n  "
                + "\n  ".join(changes)
                + "\nchoose another --output, or set the earlier run aside with --force"
            )
        self.content[key] = dict(value)


def set_aside(folder: Path) -> Path:
    """Move what a folder holds into a new ``previous-N`` inside it."""
    number = 1
    while (folder / f"previous-{number}").exists():
        number += 1
    previous = folder / f"previous-{number}"
    previous.mkdir()
    for entry in sorted(folder.iterdir()):
        if not entry.name.startswith("previous-"):
            entry.rename(previous / entry.name)
    return previous


def read_json(path: Path) -> Any:
    """A JSON file; :class:`TrainingError` if it is damaged."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path} cannot be read: {error}") from error
