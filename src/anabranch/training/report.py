"""The report of a run: one document, written as Markdown and as a page of its own."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anabranch.errors import MissingExtra
from anabranch.files import write_text
from anabranch.training.data.report import DataReport
from anabranch.training.plots import plot_losses
from anabranch.training.recipe_file import dump_yaml

Table = Sequence[Sequence[str]]
"""Rows of cells; the first row is the head."""

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .8rem;text-align:left;"
    "border-bottom:1px solid #8884}pre{overflow-x:auto;background:#8881;padding:1rem}"
    "svg{max-width:100%;height:auto;background:#fff}"
)


@dataclass
class Section:
    """A heading with what stands under it, in this order."""

    title: str
    lines: Sequence[str] = ()
    table: Table = ()
    verbatim: str = ""
    picture: Path | None = None


@dataclass
class Document:
    """A title, a summary, and sections."""

    title: str
    summary: str
    sections: list[Section] = field(default_factory=list)

    def markdown(self) -> str:
        """As Markdown; pictures are linked."""
        parts = [f"# {self.title}", self.summary]
        for section in self.sections:
            parts.append(f"## {section.title}")
            parts += section.lines
            if section.table:
                rows = ["| " + " | ".join(map(_cell, row)) + " |" for row in section.table]
                parts.append("\n".join([rows[0], "|" + "---|" * len(section.table[0]), *rows[1:]]))
            if section.picture is not None:
                parts.append(f"![{section.title}]({section.picture.name})")
            if section.verbatim:
                # A longer fence than any inside, so that answers may contain code.
                fence = "`" * max(3, _longest_run(section.verbatim, "`") + 1)
                parts.append(f"{fence}\n{section.verbatim.rstrip()}\n{fence}")
        return "\n\n".join(parts) + "\n"

    def page(self) -> str:
        """As HTML that needs no other file; pictures are inside."""
        body = [f"<h1>{html.escape(self.title)}</h1>", f"<p>{html.escape(self.summary)}</p>"]
        for section in self.sections:
            body.append(f"<h2>{html.escape(section.title)}</h2>")
            body += [f"<p>{html.escape(line)}</p>" for line in section.lines]
            if section.table:
                body.append("<table>" + "".join(_rows(section.table)) + "</table>")
            if section.picture is not None:
                svg = section.picture.read_text("utf-8")
                body.append(svg[svg.index("<svg") :])
            if section.verbatim:
                body.append(f"<pre>{html.escape(section.verbatim)}</pre>")
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8">'
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style>"
            f"<body>{''.join(body)}</body></html>\n"
        )


def write_report(
    folder: Path, run: Mapping[str, Any], data: DataReport, samples: Sequence[Mapping[str, str]]
) -> str:
    """Write report.md, report.html and the loss curve; returns the Markdown."""
    document = describe(folder, run, data, samples)
    text = document.markdown()
    write_text(folder / "report.html", document.page())
    write_text(folder / "report.md", text)
    return text


def describe(
    folder: Path, run: Mapping[str, Any], data: DataReport, samples: Sequence[Mapping[str, str]]
) -> Document:
    """What a run did and found."""
    recipe, result = run["recipe"], run["result"]
    verdict = "passed" if run["gate"]["passed"] else "not passed"
    document = Document(
        f"Fine-tuning report: {recipe['recipe']}",
        f"{recipe['about']} Gate {verdict}: {run['gate']['reason']}.".strip(),
    )
    add = document.sections.append
    for name, figures in run["figures"].items():
        add(Section(f"Held-out rows: {name}", table=_figures(figures)))
    if samples:
        add(Section("Answers", verbatim="\n\n".join(map(_sample, samples))))
    notes = [f"{source.name}: {source.note}." for source in data.sources if source.note]
    if data.boilerplate_ngrams:
        notes.append(
            f"{data.boilerplate_ngrams} runs of words that held-out rows share with more than ten "
            f"training rows count as wording of the data set, not as leaks."
        )
    add(Section("Data", notes, _sources(data)))
    add(Section("Training", [_training(run)], picture=_curve(folder, recipe["recipe"])))
    if result["dropped"]:
        rows = [["reason", "rows"], *([why, str(n)] for why, n in result["dropped"].items())]
        add(Section("Rows left out or cut by the trainer", table=rows))
    surroundings = {key: run[key] for key in ("versions", "machine", "git", "base")}
    add(Section("Surroundings", verbatim=dump_yaml(surroundings)))
    add(Section("Recipe", verbatim=dump_yaml(recipe)))
    return document


def _figures(figures: Mapping[str, Any]) -> Table:
    rows = [["figure", "rows", "base", "tuned", "tuned - base (95 % interval)", "p (McNemar)"]]
    for name, figure in figures.items():
        better = "higher" if figure["higher_is_better"] else "lower"
        p = figure.get("mcnemar_p")
        rows.append(
            [
                f"{name} ({better} is better)",
                str(figure["rows"]),
                _value(figure["base"]),
                _value(figure["tuned"]),
                _value(figure["difference"]),
                "" if p is None else f"{p:.3g}",
            ]
        )
    return rows


def _value(value: Mapping[str, float]) -> str:
    text = f"{value['value']:.4f}"
    return f"{text} [{value['low']:.4f}, {value['high']:.4f}]" if "low" in value else text


def _sources(data: DataReport) -> Table:
    rows = [["source", "rows read", "train", "valid", "test", "left out", "sha256"]]
    for source in data.sources:
        removed = ", ".join(f"{count} {why}" for why, count in source.removed.items())
        splits = [str(source.splits.get(name, 0)) for name in ("train", "valid", "test")]
        rows.append(
            [
                f"{source.name} ({source.source})",
                str(source.read),
                *splits,
                removed or "0",
                source.fingerprint[:12],
            ]
        )
    return rows


def _training(run: Mapping[str, Any]) -> str:
    result = run["result"]
    speed = result["tokens"] / result["seconds"] if result["seconds"] else 0.0
    share = run["trainable"] / run["parameters"]
    text = (
        f"{result['steps']} steps, {result['tokens']:,} tokens in {result['seconds']:.0f} s "
        f"({speed:,.0f} tokens/s); {run['trainable']:,} of {run['parameters']:,} weights trained "
        f"({share:.2%}); ended because: {result['stopped_because']}."
    )
    if result["best"]:
        best = result["best"]
        text += f" Best {best['metric']} {best['value']:.4f} after step {best['step']}."
    if result["skipped"]:
        text += f" {result['skipped']} steps were skipped because they were not finite."
    return text


def _curve(folder: Path, title: str) -> Path | None:
    """The loss curve; without matplotlib the report has none, and the log has the figures."""
    try:
        plot_losses(folder / "training" / "metrics.jsonl", folder / "loss", title)
    except MissingExtra:
        return None
    return folder / "loss.svg"


def _sample(sample: Mapping[str, str]) -> str:
    return "\n".join(f"{key}: {value}" for key, value in sample.items())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _rows(table: Table) -> Iterator[str]:
    for index, row in enumerate(table):
        tag = "th" if index == 0 else "td"
        cells = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        yield f"<tr>{cells}</tr>"


def _longest_run(text: str, character: str) -> int:
    longest = current = 0
    for c in text:
        current = current + 1 if c == character else 0
        longest = max(longest, current)
    return longest
