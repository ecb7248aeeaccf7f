from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import typer
from typer.testing import CliRunner

from anabranch import __version__, models
from anabranch.cli import app
from anabranch.cli.output import bytes_text, count_text, parse_bytes
from anabranch.errors import ModelNotFound
from anabranch.models.card import ModelCard

CARD = ModelCard(
    name="tiny[x]",
    architecture="LlamaForCausalLM",
    parameters=134_515_008,
    context_length=8192,
    dtype="bfloat16",
    licence="Apache-2.0",
    provenance="tests",
    fingerprint="ab" * 32,
    size_bytes=3 * 2**19,
)
runner = CliRunner()


def test_version_and_help() -> None:
    assert runner.invoke(app, ["--version"]).output == f"anabranch {__version__}\n"
    output = runner.invoke(app, ["--help"]).output
    assert all(name in output for name in ("up", "chat", "models", "list"))


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom anabranch.cli import app\n"
        "bad = {'torch', 'transformers', 'fastapi', 'httpx', 'numpy'} & set(sys.modules)\n"
        "sys.exit(', '.join(bad) or 0)"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - started < 5


def test_list_kinds_and_plugins() -> None:
    kinds = json.loads(runner.invoke(app, ["list", "--json"]).output)
    assert "policies" in [kind["name"] for kind in kinds]
    assert "policies" in runner.invoke(app, ["list"]).output
    wrong = runner.invoke(app, ["list", "policy"])
    assert wrong.exit_code == 2
    assert "did you mean 'policies'?" in wrong.stderr


def test_models_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "available", lambda: [CARD])
    output = runner.invoke(app, ["models", "list"]).output
    assert "tiny[x]" in output
    assert "135 M" in output
    assert json.loads(runner.invoke(app, ["models", "list", "--json"]).output) == [CARD.to_dict()]


def test_models_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "card", lambda name: replace(CARD, name=name))
    output = runner.invoke(app, ["models", "show", "other"]).output
    assert "other" in output
    assert "1.5 MiB" in output
    shown = runner.invoke(app, ["models", "show", "other", "--json"]).output
    assert json.loads(shown)["name"] == "other"


def test_models_pull(monkeypatch: pytest.MonkeyPatch) -> None:
    def pull(name: str, progress: Callable[[str, float | None], None]) -> ModelCard:
        progress("downloading", None)
        progress("downloading", 0.5)
        progress("converting", 1.0)
        return CARD

    monkeypatch.setattr(models, "pull", pull)
    done = runner.invoke(app, ["models", "pull", "x", "--json"])
    assert json.loads(done.stdout)["name"] == "tiny[x]"
    assert done.stderr.splitlines() == ["downloading", "converting"]


def test_models_remove_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[str] = []
    monkeypatch.setattr(models, "remove", lambda name: removed.append(name) or 2048)
    assert runner.invoke(app, ["models", "remove", "x"], input="n\n").exit_code == 1
    assert removed == []
    assert runner.invoke(app, ["models", "remove", "x"], input="y\n").exit_code == 0
    assert "2.0 KiB freed" in runner.invoke(app, ["models", "remove", "x", "--yes"]).output
    done = runner.invoke(app, ["models", "remove", "x", "--yes", "--json"])
    assert json.loads(done.output) == {"name": "x", "freed_bytes": 2048}
    assert removed == ["x"] * 3


def test_errors_have_a_message_and_a_status_but_no_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def card(name: str) -> ModelCard:
        raise ModelNotFound(f"no model [{name}]")

    monkeypatch.setattr(models, "card", card)
    done = runner.invoke(app, ["models", "show", "x"])
    assert done.exit_code == 1
    assert done.stderr == "error: no model [x]\n"
    assert done.stdout == ""
    debug = runner.invoke(app, ["--debug", "models", "show", "x"])
    assert isinstance(debug.exception, ModelNotFound)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 * 2**30),
        ("512MB", 512 * 10**6),
        ("65536", 65536),
        ("1.5 kib", 1536),
        ("3B", 3),
        ("1tb", 10**12),
    ],
)
def test_parse_bytes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "0", "2 apples", "1e9", "GiB", "\u0665"])
def test_parse_bytes_refuses(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_bytes(text)


def test_numbers() -> None:
    assert [bytes_text(n) for n in (0, 1023, 1024, 5 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.0 TiB",
    ]
    assert [count_text(n) for n in (12, 1500, 22_700_000, 7 * 10**9)] == [
        "12",
        "1.5 k",
        "22.7 M",
        "7 B",
    ]
