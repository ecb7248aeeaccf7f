"""``anabranch label`` from end to end, with a crowd that needs no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from anabranch.cli import app, label
from anabranch.training.annotation import LabelScores
from anabranch.training.pipeline import check
from anabranch.training.recipe_file import load_recipe

runner = CliRunner()


class Guesses:
    """Says what the text says, or bad."""

    def scores(self, texts: Sequence[str]) -> LabelScores:
        p = np.array([[0.1, 0.9] if "good" in text else [0.7, 0.3] for text in texts])
        return LabelScores(("bad", "good"), np.log(p))


@pytest.fixture(autouse=True)
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label, "_load", lambda name, report: None)
    monkeypatch.setattr(label, "_asker", lambda *arguments: Guesses())


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.jsonl"
    texts = ["a good film", "a dull film", "good food", "a long day"]
    path.write_text(
        "".join(json.dumps({"id": f"r{i}", "text": t}) + "\n" for i, t in enumerate(texts))
    )
    return path


def run(*arguments: Any, keys: str = "", status: int = 0) -> str:
    result = runner.invoke(app, ["label", *map(str, arguments)], input=keys)
    assert result.exit_code == status, result.output
    return result.output if status else result.stdout


def test_propose_review_export_and_apply(table: Path, tmp_path: Path) -> None:
    queue = tmp_path / "q.db"
    made = run("propose", table, "-q", queue, "--labels", "bad, good", "--coder", "ann")
    assert "ann: 4 rows" in made
    run("propose", table, "-q", queue, "--labels", "bad,good", "--coder", "ann", status=2)
    # Right, wrong, undo the wrong, stop; then the rest.
    assert "took back" in run("review", queue, "-c", "ann", keys="\nx\nu\nq\n")
    assert "everything is judged" in run("review", queue, "-c", "ann", keys="?\n\n\nx\n")
    assert "no coder named 'bob'" in run("review", queue, "-c", "bob", status=2)

    rows = tmp_path / "rows.jsonl"
    figures = json.loads(run("export", queue, "-o", rows, "--json"))
    assert (figures["rows"], figures["unlabelled"], figures["fleiss_kappa"]) == (3, 1, None)
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    assert all(row["label"] == ("good" if "good" in row["text"] else "bad") for row in written)

    labels = tmp_path / "labels.jsonl"
    done = json.loads(run("apply", queue, table, "-o", labels, "--json"))
    assert done["rows"] == 4 and done["labels"] == {"good": 2, "bad": 2}
    assert len((tmp_path / "labels.jsonl.audit.jsonl").read_text().splitlines()) == 1


def test_train_hands_the_reviewed_rows_to_a_recipe(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = tmp_path / "q.db"
    run("propose", table, "-q", queue, "--labels", "bad,good", "--coder", "ann")
    assert "4 are waiting" in run("train", queue, "-o", tmp_path / "run", status=1)
    run("review", queue, "-c", "ann", keys="\n\n\n\n")

    given: dict[str, Any] = {}

    def finetune(recipe: str, overrides: list[str], output: Path, **options: Any) -> None:
        resolved = load_recipe(recipe, overrides)
        check(resolved)
        given.update(recipe=resolved, output=output)

    monkeypatch.setattr("anabranch.cli.finetune.finetune", finetune)
    run("train", queue, "-o", tmp_path / "run", "train.lr=1e-4")
    recipe = given["recipe"]
    assert recipe.train.lr == 1e-4
    assert recipe.data[0].task.options["labels"] == ["bad", "good"]
    assert len(Path(recipe.data[0].path).read_text().splitlines()) == 4
