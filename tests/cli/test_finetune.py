"""``anabranch finetune``: what it prints, how it ends, and what a signal leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from anabranch.cli import app
from anabranch.training.trainer import Trainer
from tests.training.tiny_base import write_base

runner = CliRunner()

RECIPE = """
recipe: tiny
base: ./base
data:
  - source: generator:instructions
    options: {rows: 60}
    split: {train: 0.8, test: 0.2}
adapter: {method: lora, r: 4}
train: {steps: 6, batch: 8, lr: 3.0e-2, checkpoint: {every: 2}}
evaluate: [{rows: 6}]
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.set_num_threads(1)
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("anabranch.training.report._curve", lambda *_: None)
    write_base(tmp_path / "base")
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def test_a_run_for_people_and_again(file: Path, tmp_path: Path) -> None:
    call = ["finetune", str(file), "-o", str(tmp_path / "run"), "train.lr=2e-2"]
    done = runner.invoke(app, call)
    assert done.exit_code == 0, done.output
    assert "nll" in done.stdout
    assert "finished; see" in done.stdout
    assert "tokens/s" in done.stderr
    assert "left" in done.stderr  # the time to go
    again = runner.invoke(app, [*call, "--json"])
    assert again.exit_code == 0
    printed = json.loads(again.stdout)
    assert printed["status"] == "finished"
    assert printed["figures"]["heldout"]["nll"]["difference"]["value"] < 0
    other = runner.invoke(app, [*call, "train.lr=1e-2"])
    assert other.exit_code == 2
    assert "train.lr: 0.02 -> 0.01" in other.stderr
    assert "--force" in other.stderr


def test_dry_run_shows_rows_and_cost_and_writes_nothing(file: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = runner.invoke(app, ["finetune", str(file), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert done.stdout.count("<|im_start|>assistant\n[[Result: ") == 3
    for part in ("recipe: tiny", "lr: 0.03", "6 steps in about", "of memory", "6 heldout;"):
        assert part in done.stdout, part
    assert sorted(tmp_path.rglob("*")) == before
    machine = json.loads(runner.invoke(app, ["finetune", str(file), "--dry-run", "--json"]).stdout)
    assert machine["steps"] == 6
    assert {span["trained"] for span in machine["rows"][0][0]} == {True, False}


def test_a_refused_deployment_is_a_failure(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = Trainer.fit

    def spoiled(trainer: Trainer) -> object:  # type: ignore[type-arg]
        result = fit(trainer)
        with torch.no_grad():
            for parameter in trainer.trainable.values():
                parameter.normal_(std=10.0)
        return result

    monkeypatch.setattr(Trainer, "fit", spoiled)
    call = ["finetune", str(file), "-o", str(tmp_path / "run"), "deploy.register_as=bad"]
    done = runner.invoke(app, call)
    assert done.exit_code == 1
    assert "not deployed: nll of heldout went from" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["missing.yaml"], 2, "there is no recipe file"),
        (["shakespear"], 2, "did you mean 'shakespeare'"),
        (["arithmetic", "train.stepz=1"], 2, "did you mean 'steps'"),
        (["arithmetic", "adapter=loral"], 2, "adapter.method"),
        (["arithmetic", "train.steps"], 2, "is not key=value"),
    ],
)
def test_mistakes_are_messages(arguments: list[str], status: int, message: str) -> None:
    done = runner.invoke(app, ["finetune", *arguments])
    assert done.exit_code == status
    assert message in done.stderr
    assert done.stdout == ""


def test_recipes_are_listed() -> None:
    names = [
        row["name"] for row in json.loads(runner.invoke(app, ["list", "recipes", "--json"]).stdout)
    ]
    assert {"instruct", "dpo", "gsm8k"} <= set(names)
    assert "gsm8k" in runner.invoke(app, ["list", "recipes"]).stdout
    tasks = json.loads(runner.invoke(app, ["list", "tasks", "--json"]).stdout)
    assert {"chat", "text", "arithmetic", "preference"} <= {row["name"] for row in tasks}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on(
    file: Path, tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "run"
    call = [sys.executable, "-m", "anabranch", "finetune", str(file), "-o", str(output)]
    long = [*call, "train.steps=4000", "train.checkpoint.every=4000"]
    process = subprocess.Popen(long, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = output / "training" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (log.exists() and log.read_text().count("\n") >= 2) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, number)
    printed, errors = process.communicate(timeout=100)
    assert process.returncode == 130, errors
    assert "the same command goes on from it" in printed
    assert list((output / "training" / "checkpoints").glob("step-*"))
    assert json.loads((output / "run.json").read_text())["status"] == "interrupted"
