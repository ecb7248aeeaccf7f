"""The built site: complete, and nothing in it is loaded from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
"""Elements that make a browser fetch something, and the attribute that says what."""


class Fetches(HTMLParser):
    """Collects the addresses that a page makes a browser fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.classes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.classes |= set((values.get("class") or "").split())
        if (address := values.get(LOADED.get(tag, ""))) and values.get("rel") != "canonical":
            self.addresses.append(address)


def fetches(html: str) -> Fetches:
    parser = Fetches()
    parser.feed(html)
    return parser


def from_elsewhere(address: str) -> bool:
    return bool(re.match(r"\s*([a-z][a-z0-9+.-]*:)?//", address, flags=re.IGNORECASE))


def test_addresses_from_elsewhere_are_found():
    page = fetches(
        '<script src="//cdn.example/x.js"></script><img src="a/b.png"><a href="http://x">'
    )
    assert [a for a in page.addresses if from_elsewhere(a)] == ["//cdn.example/x.js"]
    assert page.addresses == ["//cdn.example/x.js", "a/b.png"]


def build(folder: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]


@pytest.mark.slow
def test_the_site_is_complete_and_loads_nothing_from_elsewhere(tmp_path):
    build(tmp_path)  # once: this is one test
    assert len(list(tmp_path.rglob("*.html"))) > 40
    assert fetched_from_elsewhere(tmp_path) == []
    assert missing_from_the_reference(tmp_path / "reference") == []


def fetched_from_elsewhere(site: Path) -> list[tuple[str, str]]:
    """Page or sheet, and what it would make a browser fetch."""
    found = []
    for page in site.rglob("*.html"):
        seen = fetches(page.read_text())
        found += [(page.name, a) for a in seen.addresses if from_elsewhere(a)]
        # The theme would fetch the program that draws these.
        found += [(page.name, "mermaid")] * ("mermaid" in seen.classes)
    for sheet in site.rglob("*.css"):
        fetched = re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')\s]+)", sheet.read_text())
        found += [(sheet.name, a) for a in fetched if from_elsewhere(a)]
    return found


def missing_from_the_reference(reference: Path) -> list[tuple[str, str]]:
    """Page, and what it should say and does not, or the markup that was left in it."""
    missing = []
    for path, wanted in {
        "python/serving.html": 'id="anabranch.serving.Engine.step"',
        "python/models.html": 'id="anabranch.models.load"',  # imported when it is first used
        "http.html": "POST /v1/chat/completions",
        "cli.html": 'id="anabranch-federation-join"',
        "errors.html": "QueueFull",
        "plugins.html": "splitfuse",
        "openapi.json": '"openapi"',
    }.items():
        missing += [(path, wanted)] * (wanted not in (reference / path).read_text())
    for page in reference.rglob("*.html"):
        left = re.findall(r":(?:class|func|meth|mod|data):", page.read_text())
        missing += [(page.name, markup) for markup in left]
    return missing
