"""How the console gets onto a server: its path, its extra, and nothing from elsewhere."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from anabranch.api import create_app
from anabranch.cli.serve import announce, install_console
from anabranch.console import install
from anabranch.errors import MissingExtra
from tests.api.conftest import EchoModel

from .simulation import Visit, visit

ROOT = Path(__file__).parents[2]


def test_without_nicegui_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "nicegui", None)
    app = create_app([EchoModel()])
    with pytest.raises(MissingExtra, match=r"anabranch\[console\]"):
        install(app)
    reason = install_console(app)
    announce([EchoModel()], "http://127.0.0.1:80", needs_key=False, console=reason)
    assert "console  not installed; pip install 'anabranch[console]'" in capsys.readouterr().out
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert any(each.startswith("nicegui") for each in extras["optional-dependencies"]["console"])


def test_pages_ask_no_other_host_for_anything() -> None:
    async def story(at: Visit) -> None:
        for page in ("", "models", "jobs", "engine", "federation", "claims", "sign-in"):
            html = (await at.http.get(f"/console/{page}")).text
            loaded = re.findall(r"""(?:src|href)=["']?([^"'\s>]+)|url\(["']?([^"')]+)""", html)
            for source in (first or second for first, second in loaded):
                assert not source.startswith(("http:", "https:", "//")), source

    visit(story)


def test_the_api_is_as_it_was_and_does_not_list_the_pages() -> None:
    async def story(at: Visit) -> None:
        assert (await at.http.get("/")).headers["location"] == "/console/"
        assert (await at.http.get("/console")).headers["location"] == "/console/"
        paths = (await at.http.get("/openapi.json")).json()["paths"]
        assert "/v1/chat/completions" in paths
        assert not any(path == "/" or path.startswith("/console") for path in paths)
        assert (await at.http.get("/v1/nothing")).json()["error"]["code"] == "unknown_url"

    visit(story)
