"""The commands ``anabranch graph recommend`` and ``hash``."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

from anabranch.cli import app
from anabranch.cli.graph import hash as hash_command
from anabranch.graphs.recommend import MatrixFactorization, Popularity, read_interactions
from anabranch.graphs.recommend.hashing import GraphHash
from tests.graphs.recommend.samples import PLANTED

SMALL = ("--set", "dim=8", "--set", "epochs=3", "--set", "lr=0.05")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [f"u{u},i{i},{u % 5 + 1}" for u, i in zip(PLANTED.user, PLANTED.item, strict=True)]
    path = tmp_path / "pairs.csv"
    path.write_text("user,item,rating\n" + "\n".join(rows))
    return path


def run(*arguments: object, status: int = 0) -> str:
    ran = CliRunner().invoke(app, ["graph", *map(str, arguments)])
    assert ran.exit_code == status, ran.output
    return ran.stdout if status == 0 else ran.output


def test_recommend_measures_and_writes_what_the_library_gives(file: Path, tmp_path: Path) -> None:
    output, saved, plot = tmp_path / "r.npz", tmp_path / "m.npz", tmp_path / "p.svg"
    options = ("--model", "mf", *SMALL, "--top", 5, "--seed", 3)
    facts = json.loads(
        run("recommend", file, *options, "-o", output, "--save", saved, "--plot", plot, "--json")
    )
    whole = read_interactions(file)
    train, test = whole.split("random", 0.2, 3)
    train, validation = train.split("random", 0.1, 3, "validation")
    model = MatrixFactorization(dim=8, epochs=3, lr=0.05, seed=3).fit(train, validation=validation)
    assert facts["test"] == pytest.approx(model.evaluate(test, k=5).to_dict())
    assert facts["best_epoch"] == model.best_epoch_
    items, scores = model.recommend(range(whole.num_users), 5)
    assert whole.user_ids is not None
    assert whole.item_ids is not None
    with np.load(output) as found:
        np.testing.assert_array_equal(found["user"], np.repeat(whole.user_ids, 5))
        np.testing.assert_array_equal(found["item"], whole.item_ids[items.ravel()])
        np.testing.assert_array_equal(found["score"], scores.ravel())
    again = MatrixFactorization.load(saved)
    np.testing.assert_array_equal(again.item_factors_, model.item_factors_)
    assert again.ids_["user"] is not None
    assert ElementTree.fromstring(plot.read_text()).tag.endswith("svg")


def test_recommend_for_some_users_as_json_and_text(file: Path, tmp_path: Path) -> None:
    options = ("--model", "popularity", "--test", 0, "--top", 3, "-u", "u7", "-u", "u0")
    facts = json.loads(run("recommend", file, *options, "-o", tmp_path / "r.json", "--json"))
    whole = read_interactions(file)
    assert whole.user_ids is not None
    assert whole.item_ids is not None
    rows = [whole.user_ids.tolist().index(name) for name in ("u7", "u0")]
    items, _ = Popularity().fit(whole).recommend(rows, 3)
    assert facts["test"] is None
    assert [a["user"] for a in facts["recommendations"]] == ["u7", "u0"]
    expected = [whole.item_ids[row].tolist() for row in items]
    assert [a["items"] for a in facts["recommendations"]] == expected
    written = json.loads((tmp_path / "r.json").read_text())
    assert [a["items"] for a in written] == expected
    text = run("recommend", file, "--model", "lightgcn", *SMALL, "--budget", 0.5)
    assert "recall@20" in text
    text = run("recommend", file, "--preset", "ml-1m", *SMALL, "--set", "negatives=3")
    assert "ndcg@20" in text
    few = json.loads(run("recommend", file, "--model", "popularity", "--min-rating", 5, "--json"))
    assert few["interactions"] < len(PLANTED) / 3


def test_an_interrupted_run_is_continued(file: Path, tmp_path: Path) -> None:
    options = (
        "recommend",
        file,
        "--model",
        "mf",
        *SMALL,
        "--checkpoints",
        tmp_path / "c",
        "--json",
    )
    assert run(*options) == run(*options)
    assert (tmp_path / "c" / "checkpoints").is_dir()


def test_hash_writes_the_assignment(file: Path, tmp_path: Path) -> None:
    facts = json.loads(run("hash", file, "-o", tmp_path / "h.npz", "--budget", 0.4, "--json"))
    whole = read_interactions(file)
    mapper = GraphHash(budget=0.4).fit(whole)
    assert (facts["user_rows"], facts["item_rows"]) == mapper.num_rows_
    assert facts["reduction"] == pytest.approx(mapper.reduction_, abs=1e-4)
    assert facts["modularity"] == pytest.approx(mapper.modularity_, abs=1e-4)
    with np.load(tmp_path / "h.npz") as found:
        np.testing.assert_array_equal(found["item_rows"], mapper.items_.rows)
        np.testing.assert_array_equal(found["user"], whole.user_ids)
    idle = tmp_path / "idle.npz"
    np.savez(idle, user=[0, 1, 1], item=[0, 0, 1], num_users=4)
    ran = CliRunner().invoke(
        app, ["graph", "hash", str(idle), "-o", str(idle), "--resolution", "1"]
    )
    assert "warning: 2 ids have no interaction" in ran.stderr
    assert "fewer, modularity" in run("hash", file, "-o", tmp_path / "h.npz", "--resolution", 2)


def test_hash_to_parquet_and_a_plot(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(hash_command, "SIZES", (0.5,))
    plot = tmp_path / "p.svg"
    run("hash", file, "-o", tmp_path / "h.parquet", "--double", "--plot", plot)
    table = parquet.read_table(tmp_path / "h.parquet").to_pydict()
    assert len(table["row"]) == 2 * (PLANTED.num_users + PLANTED.num_items)
    assert set(table["side"]) == {"user", "item"}
    assert "GraphHash" in plot.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("recommend", "--model", "ultra"), "did you mean 'ultragcn'"),
        (("recommend", "--set", "lr"), "name=value"),
        (("recommend", "--set", "rate=1"), "no parameter of ultragcn named 'rate'"),
        (("recommend", "--set", "dim=1.5"), "whole number"),
        (("recommend", "--set", "lr=fast"), "a number is needed"),
        (("recommend", "--set", "exclude_self=1"), "true or false"),
        (("recommend", "--model", "mf", "--preset", "ml-1m"), "presets are for ultragcn"),
        (("recommend", "--model", "popularity", "--budget", "0.5"), "--budget cannot be used"),
        (("recommend", "--plot", "p.svg", "--validation", "0"), "above 0"),
        (("recommend", "-u", "nobody"), "no user 'nobody'"),
        (("recommend", "-o", "r.csv"), ".npz, .parquet or .json"),
        (("recommend", "--split", "time"), "needs times"),
        (("recommend", "--test", "1.5"), "test = 1.5"),
        (("hash", "-o", "h.json"), ".npz or .parquet"),
        (("hash", "-o", "h.npz", "--budget", "2"), "budget = 2"),
        (("hash", "-o", "h.npz", "--budget", "0.5", "--resolution", "2"), "either"),
    ],
)
def test_bad_input_ends_with_a_message(
    arguments: tuple[str, ...], message: str, file: Path
) -> None:
    command, *rest = arguments
    assert message in run(command, file, *rest, status=2)
