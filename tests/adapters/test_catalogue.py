"""The catalogue as documentation and as commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from anabranch import adapters
from anabranch.cli import app

DOCUMENT = Path(__file__).parents[2] / "docs" / "adapters.md"


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_the_documents_table_is_the_catalogue() -> None:
    generated = DOCUMENT.read_text().partition("coverage_markdown -->\n")[2].lstrip()
    assert generated == adapters.coverage_markdown(), "regenerate it with coverage_markdown()"


def test_list_shows_where_each_method_stands() -> None:
    for arguments in (("list", "adapters"), ("adapters", "list")):
        lines = run(*arguments).stdout.splitlines()
        (lora,) = [index for index, line in enumerate(lines) if line.startswith("  lora ")]
        assert lines[lora].split()[1:5] == ["peft", "yes", "batched", "Adds"]
        assert "reparameterised, low rank" in lines[:lora]
        (prompt,) = [line.split() for line in lines if line.startswith("  prompt_tuning ")]
        assert prompt[1:4] == ["peft", "no", "no"]


def test_list_for_programs_has_every_entry() -> None:
    entries = {
        entry["name"]: entry for entry in json.loads(run("list", "adapters", "--json").stdout)
    }
    assert entries.keys() == adapters.catalogue().keys()
    assert entries["houlsby"]["options"]["target_modules"] == ["attention-output", "mlp-output"]
    assert entries["lora_sb"]["engine"] == "batched"
    assert entries["poly"]["inputs"] == ["task_ids"]


@pytest.mark.slow
def test_show_counts_on_the_packaged_model() -> None:
    shown = json.loads(run("adapters", "show", "pfeiffer", "--json").stdout)
    assert shown["counts"]["trainable"] == 30 * 256 * 2 * 576
    text = run("adapters", "show", "lora").stdout
    assert "trains   2,442,240 of 135 M weights" in text
    assert any(line.split()[:2] == ["r", "8"] for line in text.splitlines())


@pytest.mark.slow
def test_show_says_why_it_cannot_be_counted() -> None:
    shown = json.loads(run("adapters", "show", "bitfit", "--json").stdout)
    assert shown["counts"]["trainable"] is None
    assert "has none in its linear and norm modules" in shown["obstacle"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("adapters", "show", "loora"), "did you mean 'lora'"),
        (("adapters", "compare", "--methods", "lora,nope"), "no adapter method named 'nope'"),
        (("adapters", "compare", "--budget", "many"), "no number of weights"),
        (("adapters", "compare", "--budget", "0"), "less than one weight"),
    ],
)
def test_refusals(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.slow
def test_compare_runs_methods_on_equal_terms() -> None:
    options = ["--methods", "ssf,lora,ln_tuning", "--budget", "9760", "--steps", "2"]
    result = run("adapters", "compare", *options, "--pretraining", "2", "--json")
    assert result.exit_code == 0, result.output
    compared = json.loads(result.stdout)
    rows = {row["method"]: row for row in compared["rows"]}
    assert list(rows) == ["full", "lora"] or list(rows) == ["full", "ssf", "lora"]
    assert rows["full"]["gap_closed"] == 1.0
    assert abs(rows["lora"]["trainable"] - 9760) <= 0.2 * 9760
    assert rows["lora"]["saved_bytes"] < rows["full"]["saved_bytes"] / 20
    assert rows["lora"]["base_intact"] and rows["lora"]["merged_tokens_per_second"] > 0
    assert "ln_tuning cannot train 9,760" in compared["refused"]["ln_tuning"]
