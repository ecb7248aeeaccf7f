"""Kept results, and the report over them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from anabranch.claims.base import ClaimResult
from anabranch.claims.report import entry, flatten, shown, spread, write_report
from anabranch.claims.store import folder, history, save
from anabranch.cli import app
from anabranch.errors import AnabranchError
from anabranch.evaluation.plotting import Plot, svg

PLOT = Plot("loss <&>", "step", "nats", {"one": [(1, 2.0), (2, 1.5)], "two": [(1, 3.0)]})
RESULT = ClaimResult(
    id="S99",
    name="nothing",
    system="Nothing <script>alert(1)</script>",
    paper="2x",
    baseline="none",
    method="all",
    threshold=">= 1 | 2",
    verdict="holds",
    figures={"ratio": 2.0, "parts": {"a_b": {"c": 1}}, "list": [0.123456, 2], "same": True},
    note="",
    seconds=1.5,
    seeds=(0, 1),
    versions={"torch": "2"},
    machine={"cores": 2, "gpu": None},
    finished="2026-01-02T03:04:05.000006+00:00",
    plots=(PLOT,),
)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "cache"))


def test_results_come_back_as_they_were_and_none_replaces_another() -> None:
    later = replace(RESULT, finished="2026-02-02T03:04:05.000006+00:00", verdict="falls short")
    paths = {save(later), save(RESULT), save(RESULT)}
    assert len(paths) == 3
    results, unreadable = history()
    assert results == {"S99": [RESULT, RESULT, later]}
    assert not unreadable
    assert not list(folder().rglob("*.partial"))


def test_a_killed_writer_leaves_no_result() -> None:
    code = (
        "import os, sys; from pathlib import Path\n"
        "from anabranch.claims import store; from tests.claims.test_report import RESULT\n"
        "Path.hardlink_to = lambda *a: os.kill(os.getpid(), 9)\n"
        "store.save(RESULT)"
    )
    killed = subprocess.run([sys.executable, "-c", code], env=os.environ, timeout=120)
    assert killed.returncode == -9
    assert list(folder().rglob("*.partial"))
    assert history() == ({}, [])


def test_what_cannot_be_read_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    save(RESULT)
    for name, text in (("half.json", '{"id": "S'), ("other.json", "{}"), ("list.json", "[1]")):
        (folder() / "S99" / name).write_text(text)
    results, unreadable = history()
    assert len(results["S99"]) == 1
    assert {found.path.name for found in unreadable} == {"half.json", "other.json", "list.json"}
    html, markdown = write_report(tmp_path / "report")
    assert "half.json" in html.read_text() and "half.json" in markdown.read_text()


def test_the_cache_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(AnabranchError, match="ANABRANCH_CACHE"):
        save(RESULT)
    with pytest.raises(AnabranchError, match="--output"):
        write_report(tmp_path / "file" / "report")


class Balance(HTMLParser):
    """Checks that elements close in order, and collects the text."""

    VOID = ("meta", "br", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_self_contained_and_escapes(tmp_path: Path) -> None:
    save(RESULT)
    save(
        replace(
            RESULT,
            finished="2027-01-01T00:00:00.000000+00:00",
            verdict="falls short",
            figures={"ratio": 1.0, "parts": {"a_b": {"c": 4}}},
        )
    )
    html, markdown = write_report(tmp_path)
    page = Balance()
    page.feed(html.read_text())
    assert not page.open
    assert page.seen.count("svg") == 1
    assert not {"script", "img", "link"} & set(page.seen)
    for text in ("falls short", "1 of 2", "2x", "parts: a b: c", "seeds", "Not run here yet"):
        assert text in page.text
    assert "S46" in page.text
    assert "prefers-color-scheme: dark" in html.read_text() and "currentColor" in html.read_text()
    written = markdown.read_text()
    assert "| ratio | 1 | 2 |" in written
    assert "![loss <&>](s99-1.svg)" in written
    assert (tmp_path / "s99-1.svg").read_text().startswith("<svg")
    rows = [line for line in written.splitlines() if line.startswith("| parts")]
    assert rows == ["| parts: a b: c | 4 | 1 |"]
    write_report(tmp_path)  # again, over the old one
    assert not list(tmp_path.glob("*.partial"))


def test_without_results_the_report_lists_what_could_be_run(tmp_path: Path) -> None:
    html, markdown = write_report(tmp_path)
    for path in (html, markdown):
        text = path.read_text()
        assert "No claim has been run" in text and "S46" in text


def test_figures_are_flattened_shortened_and_compared() -> None:
    assert dict(flatten(RESULT.figures))["parts: a b: c"] == 1
    assert shown([0.123456, 2]) == "0.1235, 2"
    assert shown(True) == "yes"
    assert spread([]) == spread(["text", True]) == ""
    assert spread([1.0, 3, 2]) == "1 to 3"
    assert spread([2.0]) == "2"
    older = replace(RESULT, figures={"ratio": "none"}, verdict="falls short")
    made = entry([older, RESULT])
    assert (made.runs, made.held) == (2, 1)
    assert made.figures[0].earlier == ""


def test_plots_survive_json_and_are_the_same_each_time() -> None:
    again = Plot.from_dict(json.loads(json.dumps(RESULT.to_dict()))["plots"][0])
    assert svg(again) == svg(PLOT)
    assert "loss &lt;&amp;&gt;" in svg(PLOT)
    assert "#808080" in svg(PLOT, "#808080")


def test_the_command_writes_and_names_both_files(tmp_path: Path) -> None:
    ran = CliRunner().invoke(app, ["claims", "report", "--output", str(tmp_path / "r"), "--json"])
    assert ran.exit_code == 0, ran.output
    written = json.loads(ran.stdout)
    assert Path(written["html"]).is_file() and Path(written["markdown"]).is_file()
