"""Where the commands print, and how numbers are shown."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from anabranch.models.progress import PROGRESS_FILE

# Names and messages may contain brackets: nothing is read as markup.
out = Console(markup=False, highlight=False, soft_wrap=True)
errors = Console(markup=False, highlight=False, soft_wrap=True, stderr=True)

SECONDS_A_LINE = 2.0
"""Between two lines that count the same thing, where there is no terminal for a bar."""

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{p}b": 1000 ** (i + 1) for i, p in enumerate("kmgt")}
_UNITS |= {f"{p}ib": 1024 ** (i + 1) for i, p in enumerate("kmgt")}


def show_error(error: Exception) -> None:
    """``error: message`` on standard error."""
    errors.print("error:", style="bold red", end=" ")
    errors.print(str(error))


def print_json(value: Any, indent: int | None = 2) -> None:
    """One JSON document on standard output, for programs."""
    typer.echo(json.dumps(value, indent=indent))


def bytes_text(count: int) -> str:
    """``"1.5 GiB"``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def count_text(count: int) -> str:
    """``"135 M"``, as parameters are counted."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return str(count)


def parse_bytes(text: str) -> int:
    """Bytes in ``"2GiB"``, ``"512MB"`` or ``"1000000"``; a usage error for anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text, re.ASCII)
    if match is None or match[2].lower() not in _UNITS:
        raise typer.BadParameter(f"{text!r} is not a size; write for example 2GiB, 512MB or 65536")
    size = int(float(match[1]) * _UNITS[match[2].lower()])
    if size < 1:
        raise typer.BadParameter(f"{text!r} is less than a byte")
    return size


@contextmanager
def progress() -> Iterator[Callable[[str, float | None], None]]:
    """Shows ``report(message, fraction)``: a bar on a terminal, else a line now and then.

    Where a program asked for it (:data:`PROGRESS_FILE`) it is told as well.
    """
    with _progress() as report:
        if (path := os.environ.get(PROGRESS_FILE)) is None:
            yield report
            return
        with Path(path).open("a", encoding="utf-8") as file:

            def report_both(message: str, fraction: float | None) -> None:
                report(message, fraction)
                file.write(json.dumps({"message": message, "fraction": fraction}) + "\n")
                file.flush()

            yield report_both


@contextmanager
def _progress() -> Iterator[Callable[[str, float | None], None]]:
    if not errors.is_terminal:
        last, printed = "", float("-inf")

        def report_line(message: str, fraction: float | None) -> None:
            nonlocal last, printed
            # Messages that count something up come by the hundred; others are stages.
            counting = re.sub(r"[0-9]+", "", message) == re.sub(r"[0-9]+", "", last)
            if message == last or (counting and time.monotonic() - printed < SECONDS_A_LINE):
                return
            errors.print(message)
            last, printed = message, time.monotonic()

        yield report_line
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn())
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def report_bar(message: str, fraction: float | None) -> None:
            total = None if fraction is None else 1.0
            bar.update(task, description=message, total=total, completed=fraction or 0.0)

        yield report_bar
