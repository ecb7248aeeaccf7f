"""The search over a job: pausing, going on, and what it finds."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from anabranch.cli import app
from anabranch.errors import ConfigurationError
from anabranch.federated import Buffered, Sync
from anabranch.federated.errors import FederationError
from anabranch.federated.search import TABLE, combinations, search
from anabranch.federated.strategies import FedAvgServer
from anabranch.jobs.kinds.search import Search
from tests.federated.helpers import fingerprint, vectors
from tests.federated.tiny_recipe import write_recipe

JOB = """
federate: sought
recipe: tiny.yaml
clients: {count: 2, split: {name: iid}}
schedule: {name: sync, rounds: 4}
local: {steps: 3}
"""
RATES = "recipe.train.lr=1e-9,1e-2,1e-8,1e-7"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    write_recipe(folder)
    path = folder / "job.yaml"
    path.write_text(JOB)
    return path


@pytest.mark.parametrize("schedule", [lambda: Sync(6), lambda: Buffered(6, 2)])
@pytest.mark.parametrize("stops", [(1,), (2, 3), (1, 2, 3, 4, 5, 6)])
def test_a_federation_that_pauses_ends_as_one_that_does_not(tmp_path, schedule, stops):
    whole = vectors(schedule(), store=tmp_path / "whole")
    whole.run()
    parts = tmp_path / "parts"
    for number, stop in enumerate(stops):
        federation = vectors(schedule(), store=parts, until=stop)
        result = federation.resume() if number else federation.run()
        assert result.version == stop and len(result.history) == stop
        again = vectors(schedule(), store=parts, until=stop).resume()
        assert again.history == result.history, "where it is already, it does nothing"
    last = vectors(schedule(), store=parts)
    last.resume()
    assert fingerprint(last) == fingerprint(whole)


def test_the_best_rate_is_found_for_half_of_the_rounds(file, tmp_path):
    found = search(file, [RATES], tmp_path / "s", factor=2)
    assert [(rung.trials, rung.rounds) for rung in found.rungs] == [(4, 1), (2, 2), (1, 4)]
    assert found.best is not None and found.best.values == {"recipe.train.lr": 1e-2}
    assert found.rounds == 2 * 1 + 1 * 2 + 1 * 4
    # A trial that was paused twice is the run that nobody paused.
    plain = ["federate", str(file), "recipe.train.lr=1e-2", "evaluate_every=1"]
    done = CliRunner().invoke(app, [*plain, "-o", str(tmp_path / "whole"), "--json"])
    assert done.exit_code == 0, done.output
    best = tmp_path / "s" / "trials" / "001"
    one, other = (json.loads((f / "report.json").read_text()) for f in (best, tmp_path / "whole"))
    assert one == other
    scores = [row["valid/loss"] for row in one["history"]]
    assert found.best.scores == {1: scores[0], 2: scores[1], 4: scores[3]}
    # Once more, nothing is run.
    before = (tmp_path / "s" / TABLE).stat().st_mtime_ns
    again = search(file, [RATES], tmp_path / "s", factor=2)
    assert again.to_dict() == found.to_dict()
    assert (tmp_path / "s" / TABLE).stat().st_mtime_ns == before


def test_a_search_is_a_kind_of_job(file, tmp_path):
    kind = Search()
    spec = kind.check(kind.from_words([str(file), RATES, "seed=0,1"]) | {"trials": 2})
    assert kind.title(spec) == "sought: recipe.train.lr, seed"
    command = kind.command(spec, tmp_path)
    words = command[command.index("federation") :]
    at = words.index("job.yaml")
    words[at], words[-2] = str(tmp_path / "job.yaml"), str(tmp_path / "output")
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["trials"]) == 2
    with pytest.raises(ConfigurationError, match="rounds cannot be varied"):
        kind.check(spec.model_dump() | {"vary": ["schedule.rounds=1,2"]})
    with pytest.raises(ConfigurationError, match="what is varied"):
        kind.from_words([])


DYING = """
import os, signal, sys
from pathlib import Path
from anabranch.federated.search import search
from anabranch.federated.strategies import FedAvgServer

commit, calls = FedAvgServer.commit, []

def dying(self, acc):
    calls.append(1)
    if len(calls) == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return commit(self, acc)

FedAvgServer.commit = dying
file, vary, folder = sys.argv[1:]
for at in (1, 3, 4, 0):  # this process never computes, so that its children may
    if not (child := os.fork()):
        search(file, [vary], Path(folder), factor=3)
        os._exit(0)
    print(os.waitpid(child, 0)[1])
"""


def test_killed_at_any_commit_and_started_again(file, tmp_path):
    vary = "recipe.train.lr=1e-9,1e-2,1e-8"
    command = [sys.executable, "-c", DYING, str(file), vary, str(tmp_path / "parts")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    killed = str(int(signal.SIGKILL))
    assert done.stdout.split() == [killed, killed, killed, "0"], done.stderr
    whole = search(file, [vary], tmp_path / "whole", factor=3)
    parts = search(file, [vary], tmp_path / "parts", factor=3)
    one, other = whole.to_dict(), parts.to_dict()
    assert one["best"].pop("output") != other["best"].pop("output")
    assert one == other


def test_a_trial_that_fails_goes_no_further(file, tmp_path, monkeypatch):
    commit = FedAvgServer.commit

    def failing(self, acc):
        if self.options.server_lr == 2.0:
            raise FederationError("lost its mind")
        return commit(self, acc)

    monkeypatch.setattr(FedAvgServer, "commit", failing)
    vary = ["strategy.server_lr=2.0,1.0"]
    found = search(file, vary, tmp_path / "s", ["strategy=fedavg"], factor=2)
    assert found.trials[0].error == "lost its mind" and math.isnan(found.trials[0].score(1))
    assert found.best is found.trials[1]
    alone = search(file, ["strategy.server_lr=2.0"], tmp_path / "t", ["strategy=fedavg"])
    assert alone.best is None
    command = ["federation", "search", str(file), "strategy=fedavg", "--vary"]
    failed = CliRunner().invoke(
        app, [*command, "strategy.server_lr=2.0", "-o", str(tmp_path / "t")]
    )
    assert failed.exit_code == 1 and "all trials failed" in failed.stderr


def test_the_command_shows_a_table_and_json(file, tmp_path):
    command = ["federation", "search", str(file), "seed=1", "--vary", "recipe.train.lr=1e-2,1e-9"]
    command += ["--vary", "recipe.adapter.r=2,4", "--rounds", "2", "--factor", "2"]
    command += ["--trials", "2", "-o", str(tmp_path / "s")]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert len(printed["trials"]) == 2 and printed["rungs"][-1] == {"trials": 1, "rounds": 2}
    assert printed["best"]["output"].startswith(str(tmp_path / "s"))
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0 and "best" in shown.stdout and "round 2" in shown.stdout
    other = CliRunner().invoke(app, [*command, "--metric", "loss"])
    assert other.exit_code == 2 and "metric: 'valid/loss' -> 'loss'" in other.stderr


def test_combinations():
    assert combinations(["a=1,2", "b.c=x,[1,2]"]) == [
        {"a": 1, "b.c": "x"},
        {"a": 1, "b.c": [1, 2]},
        {"a": 2, "b.c": "x"},
        {"a": 2, "b.c": [1, 2]},
    ]
    assert combinations(["a=1e-4,{name: top_k, keep: 0.1}"]) == [
        {"a": 1e-4},
        {"a": {"name": "top_k", "keep": 0.1}},
    ]


@pytest.mark.parametrize(
    ("vary", "says"),
    [
        ([], "nothing is varied"),
        (["seed"], "is not KEY=VALUE,VALUE"),
        (["seed="], "is not KEY=VALUE,VALUE"),
        (["seed=1", "seed=2"], "seed is varied twice"),
        (["recipe.train.rate=1"], "train.rate: there is no such option"),
        (["schedule.rounds=4,5"], "rounds cannot be varied"),
        (["runtime=flower"], "not on Flower"),
        (["strategy=fedavgg"], "did you mean 'fedavg'"),
    ],
)
def test_mistakes_are_named_before_anything_runs(file, tmp_path, vary, says):
    with pytest.raises(ConfigurationError, match=says):
        search(file, vary, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_metric_that_is_not_there_and_a_folder_that_is_used(file, tmp_path):
    with pytest.raises(ConfigurationError, match="no figure 'accuracy'; they have"):
        search(file, ["seed=1"], tmp_path / "s", metric="accuracy")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").touch()
    with pytest.raises(ConfigurationError, match="holds no search"):
        search(file, ["seed=1"], tmp_path / "used")
