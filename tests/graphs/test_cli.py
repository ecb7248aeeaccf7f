"""The commands ``anabranch graph embed`` and ``pagerank``."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import networkx
import numpy as np
import pytest
from typer.testing import CliRunner

from anabranch.cli import app
from anabranch.graphs import as_graph
from anabranch.graphs.embedding import FastRP
from anabranch.graphs.ppr import exact_ppr

KARATE = networkx.karate_club_graph()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "karate.txt"
    networkx.write_weighted_edgelist(KARATE, path)
    return path


def run(*arguments: object, status: int = 0) -> str:
    ran = CliRunner().invoke(app, ["graph", *map(str, arguments)])
    assert ran.exit_code == status, ran.output
    return ran.stdout if status == 0 else ran.output


def test_embed_writes_what_fastrp_gives(file: Path, tmp_path: Path) -> None:
    output, plot = tmp_path / "v.npz", tmp_path / "v.svg"
    facts = json.loads(run("embed", file, "-o", output, "--dim", 8, "--plot", plot, "--json"))
    assert (facts["nodes"], facts["edges"], facts["columns"]) == (34, 78, 8)
    with np.load(output) as found:
        np.testing.assert_array_equal(found["nodes"], np.arange(34))
        expected = FastRP(8).fit_transform(as_graph(file))
        np.testing.assert_array_equal(found["vectors"], expected)
    assert ElementTree.fromstring(plot.read_text()).tag.endswith("svg")
    assert "34 nodes, 78 edges" in run("embed", file, "-o", output, "--dim", 1, "--plot", plot)


def test_embed_to_parquet(file: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    run("embed", file, "-o", tmp_path / "v.parquet", "--dim", 8)
    table = parquet.read_table(tmp_path / "v.parquet")
    vectors = np.array(table.column("vector").to_pylist(), np.float32)
    np.testing.assert_array_equal(vectors, FastRP(8).fit_transform(as_graph(file)))


def test_pagerank_builds_an_index_once_and_ranks(file: Path, tmp_path: Path) -> None:
    index, output = tmp_path / "index", tmp_path / "s.npz"
    arguments = ("pagerank", file, "-s", 0, "-s", 33, "--walks", 400, "--index", index, "--json")
    first = json.loads(run(*arguments, "--top", 5, "-o", output))
    written = {path.name: path.stat().st_mtime_ns for path in index.iterdir()}
    assert json.loads(run(*arguments, "--top", 5))["answers"] == first["answers"]
    assert {path.name: path.stat().st_mtime_ns for path in index.iterdir()} == written
    exact = exact_ppr(as_graph(file), [0, 33])
    for answer, scores in zip(first["answers"], exact, strict=True):
        assert answer["nodes"][0] == answer["source"] == int(np.argmax(scores))
        np.testing.assert_allclose(answer["scores"], scores[answer["nodes"]], rtol=0.1)
    with np.load(output) as found:
        assert found["source"].tolist() == [0] * 5 + [33] * 5
    assert "score" in run("pagerank", file, "-s", 0)


def test_names_and_bad_input(file: Path, tmp_path: Path) -> None:
    named = tmp_path / "n.csv"
    named.write_text("a,b\nb,c\n")
    answers = json.loads(run("pagerank", named, "-s", "c", "--json"))["answers"]
    assert answers[0]["source"] == "c"
    assert "no node 'd'" in run("pagerank", named, "-s", "d", status=2)
    assert "are numbers, not x" in run("pagerank", file, "-s", "x", status=2)
    assert "no node 99" in run("pagerank", file, "-s", 99, status=2)
    assert ".npz or .parquet" in run("embed", file, "-o", "v.csv", status=2)
    assert "no numbers" in run("embed", file, "-o", "v.npz", "--weights", "a", status=2)
    assert "there is no file" in run("embed", tmp_path / "x.txt", "-o", "v.npz", status=2)
