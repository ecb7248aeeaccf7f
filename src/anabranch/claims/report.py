"""The report over all claims that were run here: one HTML page, one Markdown file.

Pure functions of the stored results; :mod:`anabranch.claims.store` has the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment

from anabranch import registry
from anabranch.claims.base import Claim, ClaimResult
from anabranch.claims.report_page import HTML, MARKDOWN
from anabranch.claims.store import Unreadable, history
from anabranch.errors import AnabranchError
from anabranch.evaluation.plotting import svg
from anabranch.files import write_text
from anabranch.models.cache import slug

_MIDDLE_GREY = "#808080"
"""Readable on white and on black: an SVG that Markdown links to cannot follow the page."""


@dataclass(frozen=True)
class Figure:
    """One value of a result, and the least and the greatest of the earlier runs."""

    name: str
    value: str
    earlier: str


@dataclass(frozen=True)
class Entry:
    """A claim's newest result with what the earlier ones add."""

    result: ClaimResult
    runs: int
    held: int
    figures: Sequence[Figure]
    drawings: Sequence[str]


def write_report(output: Path) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.md`` (with its plots) into a folder; returns both paths.

    The page is self-contained. Without any result it lists what could be run.
    """
    results, unreadable = history()
    claims = sorted(registry.available("claims").values(), key=lambda claim: claim.id)
    entries = [entry(runs) for runs in results.values()]
    html, markdown = output / "report.html", output / "report.md"
    try:
        output.mkdir(parents=True, exist_ok=True)
        # Plots first: the text may not link to what is not there yet.
        for one in entries:
            for number, plot in enumerate(one.result.plots):
                write_text(output / _plot_name(one, number), svg(plot, _MIDDLE_GREY))
        write_text(html, render(HTML, entries, claims, unreadable))
        write_text(markdown, render(MARKDOWN, entries, claims, unreadable))
    except OSError as error:
        raise AnabranchError(
            f"cannot write the report to {output}: {error}; choose another folder with --output"
        ) from error
    return html, markdown


def entry(runs: Sequence[ClaimResult]) -> Entry:
    """The newest of a claim's runs (oldest first), compared with the earlier ones."""
    newest, earlier = runs[-1], [dict(flatten(run.figures)) for run in runs[:-1]]
    figures = [
        Figure(name, shown(value), spread([e[name] for e in earlier if name in e]))
        for name, value in flatten(newest.figures)
    ]
    return Entry(
        newest,
        runs=len(runs),
        held=sum(run.holds for run in runs),
        figures=figures,
        drawings=[svg(plot) for plot in newest.plots],
    )


def render(
    template: str,
    entries: Sequence[Entry],
    claims: Sequence[type[Claim]],
    unreadable: Sequence[Unreadable],
) -> str:
    """Fill a template of :mod:`anabranch.claims.report_page`."""
    environment = Environment(
        autoescape=template is HTML,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    done = {one.result.id for one in entries}
    return environment.from_string(template).render(
        entries=entries,
        missing=[claim for claim in claims if claim.id not in done],
        unreadable=unreadable,
        plot_name=_plot_name,
    )


def flatten(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested figures as ``"outer: inner"`` -> value."""
    for name, value in figures.items():
        label = prefix + str(name).replace("_", " ")
        if isinstance(value, Mapping):
            yield from flatten(value, label + ": ")
        else:
            yield label, value


def shown(value: Any) -> str:
    """A figure as text: numbers short, lists joined."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(shown, value))
    return str(value)


def spread(values: Sequence[Any]) -> str:
    """``"0.81 to 0.92"`` of the numbers among the values; empty without any."""
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if not numbers:
        return ""
    low, high = shown(min(numbers)), shown(max(numbers))
    return low if low == high else f"{low} to {high}"


def _plot_name(one: Entry, number: int) -> str:
    return f"{slug(one.result.id.lower())}-{number + 1}.svg"


def _cell(text: str) -> str:
    """Text that cannot end a cell of a Markdown table."""
    return str(text).replace("|", "\\|").replace("\n", " ")
