"""A job's evaluations: benchmarks and the recipe's own, of everyone's model and of clients'."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from anabranch.cli import app
from anabranch.cli.federation_compare import by_client, table
from anabranch.errors import ConfigurationError
from anabranch.federated.compare import MODES, ModeResult
from anabranch.federated.job import load_job
from anabranch.federated.running import deal_out
from tests.evaluation.benchmarks.helpers import write_rows
from tests.training.tiny_base import write_base

RECIPE = """
recipe: tiny
base: {base}
data:
  - name: sums
    source: generator:arithmetic
    options: {{rows: 60}}
    task: arithmetic
    filters: {{duplicates: false, near_duplicates: null}}
    split: {{train: 0.6, valid: 0.2, test: 0.2}}
contamination: {{action: ignore}}
adapter: {{method: lora, r: 4}}
train: {{steps: 6, batch: 8, lr: 1.0e-2, schedule: constant}}
evaluate:
  - {{name: heldout, on: test, rows: 6, generate: {{rows: 3, max_tokens: 4}}}}
"""

JOB = """
federate: asked
recipe: tiny.yaml
clients: {count: 2, split: {name: iid}, held_out: 0.2}
schedule: {name: sync, rounds: 2}
local: {steps: 2}
evaluations:
  - recipe
  - {name: choices, path: rows.jsonl, limit: 5}
"""


@pytest.fixture
def file(tmp_path):
    base = write_base(tmp_path / "base", spread=0.2)
    (tmp_path / "tiny.yaml").write_text(RECIPE.format(base=base))
    rows = [
        {"prompt": f"{i} is", "choices": ["odd", "even"], "answer": 1 - i % 2} for i in range(9)
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path / "job.yaml"


def run(*arguments):
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_federation_is_asked_before_and_after(file, tmp_path):
    output = tmp_path / "run"
    printed = json.loads(run("federate", file, "-o", output, "--json"))
    found = printed["evaluations"]
    assert set(found) == {"before", "after"}
    for figures in (found["before"]["figures"], found["after"]["figures"]):
        assert figures["task/rows/rows"] == 5 and figures["task/rows/chance"] == 0.5
        assert 0 <= figures["task/rows"] <= 1 and 0 <= figures["task/rows/normalised"] <= 1
        assert figures["task/heldout/rows"] == 3 and "task/heldout" in figures
    assert found["after"]["figures"]["nll/heldout"] < found["before"]["figures"]["nll/heldout"]
    assert set(found["after"]["clients"]) == {"client-0", "client-1"}
    for name, before in found["before"]["clients"].items():
        assert found["after"]["clients"][name]["loss/own"] < before["loss/own"]
    assert json.loads((output / "report.json").read_text())["evaluations"] == found
    # Asked again, nothing is computed again.
    before = (output / "evaluations.json").stat().st_mtime_ns
    shown = run("federate", file, "-o", output)
    assert "loss/own, client-1" in shown and "rows/chance" in shown and "nll/heldout" in shown
    assert (output / "evaluations.json").stat().st_mtime_ns == before


def test_the_five_modes_have_a_column_for_each_task(file, tmp_path):
    command = ["federation", "compare", file, "-o", tmp_path / "modes"]
    first = json.loads(run(*command, "--mode", "zero-shot", "--mode", "federated", "--json"))
    assert list(first) == ["federated", "zero-shot"]
    printed = json.loads(run(*command, "--json"))
    assert list(printed) == list(MODES)
    assert {mode: printed[mode] for mode in first} == first
    unknown = CliRunner().invoke(app, [*map(str, command), "--mode", "alone"])
    assert unknown.exit_code == 2 and "no mode 'alone'" in unknown.stderr
    for mode, result in printed.items():
        figures = result["figures"]
        assert {"loss", "loss/own", "task/rows", "task/heldout", "nll/heldout"} <= set(figures)
        assert set(result["clients"]) == {"client-0", "client-1"}
        own = mode in ("local", "personal")
        assert all(("task/rows" in client) == own for client in result["clients"].values())
    assert printed["personal"]["figures"]["loss/own"] < printed["zero-shot"]["figures"]["loss/own"]
    shown = run(*command)
    assert "chance 50 %" in shown and "±" in shown and "heldout" in shown
    assert shown.count("client-1") == 5
    # Cut off after some modes, the rest is as it was, and the federation is not run again.
    stored = json.loads((tmp_path / "modes" / "modes.json").read_text())
    del stored["personal"], stored["global"]
    (tmp_path / "modes" / "modes.json").write_text(json.dumps(stored))
    assert json.loads(run(*command, "--json")) == printed


def test_clients_do_not_train_on_what_they_hold_out(file):
    job = load_job(file)
    dealt = deal_out(job)
    for name, site in dealt.runtime.sites.items():  # type: ignore[attr-defined]
        trained, own = ({id(item) for item in rows} for rows in (site.data, dealt.own[name]))
        assert not trained & own and len(own) == round(0.2 * (len(trained) + len(own)))
    everything = deal_out(load_job(file, ["clients={count: 2}"]))
    assert not any(everything.own.values())
    assert sum(len(s.data) for s in everything.runtime.sites.values()) == len(everything.items)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("evaluations=[arc-eazy]", "did you mean 'arc-easy'"),
        ("evaluations=[{name: gsm8k, shot: 1}]", "did you mean 'shots'"),
        ("evaluations=[{name: gsm8k, shots: -1}]", "shots is at least 0"),
        ("evaluations=[{name: choices}]", "path"),
        ("evaluations=[{name: recipe, limit: 1}]", "recipe has no options"),
        ("evaluations=[boolq, {name: boolq, limit: 3}]", "two are called 'boolq'"),
        ("evaluations=boolq", "list"),
        ("clients={count: 2, held_out: 1.0}", "less than 1"),
        ("runtime=flower", "clients.held_out: nothing is evaluated"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(file, override, says):
    with pytest.raises(ConfigurationError, match=says):
        load_job(file, [override])


def test_what_is_not_there_is_missed_before_anything_is_trained(file, tmp_path, monkeypatch):
    monkeypatch.delenv("ANABRANCH_DATA", raising=False)
    missing = ["federate", file, "evaluations=[boolq]", "-o", tmp_path / "run"]
    done = CliRunner().invoke(app, [*map(str, missing)])
    assert done.exit_code == 2 and "needs the environment variable ANABRANCH_DATA" in done.stderr
    assert not (tmp_path / "run" / "run").exists()
    without = ["federate", file, "recipe.evaluate=[]", "-o", tmp_path / "other"]
    done = CliRunner().invoke(app, [*map(str, without)])
    assert done.exit_code == 2 and "there are none here" in done.stderr
    served = ["federation", "serve", file, "-o", tmp_path / "third"]
    done = CliRunner().invoke(app, [*map(str, served)])
    assert done.exit_code == 2 and "clients.held_out" in done.stderr


def test_a_score_near_chance_is_shown_beside_chance():
    tasks = {"task/arc": 0.27, "task/arc/chance": 0.25, "task/arc/error": 0.03, "loss": 2.0}
    clients = {f"c{i}": {**tasks, "task/arc": 0.2 + 0.1 * i} for i in range(2)}
    found = {
        "zero-shot": ModeResult(tasks),
        "local": ModeResult(tasks, clients=clients),
        "federated": ModeResult({"loss": 1.0}, clients={"c0": {"loss/own": 0.5}}),
    }
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table(found), by_client(found))
    text = console.export_text()
    lines = [line.split() for line in text.splitlines()]
    assert ["arc", "27.0", "%", "27.0", "%"] in lines
    assert ["chance", "25", "%", "±", "3.0", "20.0", "%", "to", "30.0", "%"] in lines
    assert ["c0", "federated", "0.5000"] in lines
