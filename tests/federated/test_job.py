"""A federation from a job file, by the command line."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from anabranch.cli import app
from anabranch.cli.federate import clients
from anabranch.errors import ConfigurationError
from anabranch.federated import Buffered, Deadline, Sync
from anabranch.federated.codecs import Chain, ErrorFeedback
from anabranch.federated.job import FederateJob, load_job
from anabranch.federated.replay import ReplayLog
from anabranch.federated.running import claim, deal
from anabranch.federated.scheduling import Uniform
from anabranch.federated.scheduling.compass import Compass
from anabranch.federated.shared import load_shared, shared_tensors
from anabranch.federated.strategies import FedAvgServer, FedProx
from anabranch.federated.strategies.fedpage import FullRounds
from anabranch.federated.strategies.warm_up import WarmUp
from anabranch.training.options import parse_options
from tests.federated.helpers import vectors
from tests.federated.tiny_recipe import write_recipe

runner = CliRunner()

JOB = """
federate: silos
recipe: tiny.yaml
clients: {count: 3, split: {name: iid}}
strategy: {name: fedprox, mu: 0.01}
schedule: {name: sync, rounds: 3}
local: {steps: 2}
devices: log_uniform
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    write_recipe(tmp_path)
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return path


def test_tasks_have_no_warm_up_unless_the_recipe_names_one(file: Path) -> None:
    job = load_job(file)
    assert job.recipe.train.warmup == 0
    assert parse_options(FederateJob, job.model_dump(mode="json")).recipe == job.recipe
    assert load_job(file, ["recipe.train.warmup=1"]).recipe.train.warmup == 1


@pytest.mark.parametrize(
    ("strategy", "schedule"),
    [
        ("fedavg", Sync),
        ("fedamd", WarmUp),
        ("fedpage", FullRounds),
        ("fedcompass", Compass),
        ("fedbuff", Buffered),
    ],
)
def test_without_a_name_the_schedule_is_the_methods_own(
    file: Path, strategy: str, schedule: type
) -> None:
    job = load_job(file, [f"strategy={strategy}", "schedule={rounds: 3}", "local={steps: 7}"])
    made = job.make_schedule()
    assert type(made) is schedule
    if schedule is not Compass:  # which says itself how much a task is
        assert made.work.steps == 7
    if schedule in (Sync, WarmUp, FullRounds):
        sampled = load_job(file, [f"strategy={strategy}", "schedule={rounds: 3, sample: 2}"])
        assert sampled.make_schedule().sampler == Uniform(2)
    else:
        with pytest.raises(ConfigurationError, match="no rounds"):
            load_job(file, [f"strategy={strategy}", "schedule={rounds: 3, decay: cosine}"])


def test_a_job_from_file_to_adapter(file: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = runner.invoke(app, ["federate", str(file), "-o", str(output), "--json"])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed["versions"] == 3 and printed["incidents"] == 0
    assert printed["clock"] == "virtual" and printed["seconds"] > 0 and printed["bytes"] > 10_000
    report = json.loads((output / "report.json").read_text())
    losses = [row["valid/loss"] for row in report["history"]]
    assert losses[-1] < losses[0]
    assert (output / "loss.svg").read_text().startswith("<svg")
    assert sum(row["messages"] for row in report["traffic"]) == 2 * 3 * 3
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert PeftModel.from_pretrained(base, printed["saved"]).active_adapter == "default"
    # The same command shows the same result; another job does not touch it.
    again = runner.invoke(app, ["federate", str(file), "-o", str(output)])
    assert again.exit_code == 0, again.output
    assert "3 versions" in again.stdout
    other = runner.invoke(app, ["federate", str(file), "seed=1", "-o", str(output)])
    assert other.exit_code == 2 and "seed: 0 -> 1" in other.stderr


def test_a_log_of_bytes_stands_for_the_adapter(file: Path, tmp_path: Path) -> None:
    overrides = ["strategy=just-one-byte", "schedule={rounds: 2}"]
    output = tmp_path / "run"
    done = runner.invoke(app, ["federate", str(file), *overrides, "-o", str(output)])
    assert done.exit_code == 0, done.output
    log = ReplayLog.load(output / "replay.log")
    setup, _, _ = deal(load_job(file, overrides))
    load_shared(setup.model, log.replay(shared_tensors(setup.model)))
    setup.save(tmp_path / "replayed")
    one, other = (
        (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        for folder in (output, tmp_path / "replayed")
    )
    assert one == other and len(one) > 10 * (output / "replay.log").stat().st_size


def test_an_interrupted_job_goes_on(file: Path, tmp_path: Path, monkeypatch) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert runner.invoke(app, ["federate", str(file), "-o", str(whole)]).exit_code == 0
    commit = FedAvgServer.commit
    calls = []

    def stop(self, acc):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return commit(self, acc)

    monkeypatch.setattr(FedAvgServer, "commit", stop)
    first = runner.invoke(app, ["federate", str(file), "-o", str(parts)])
    assert first.exit_code == 130 and "the same command goes on" in first.stderr
    assert runner.invoke(app, ["federate", str(file), "-o", str(parts)]).exit_code == 0
    one, other = (json.loads((folder / "report.json").read_text()) for folder in (whole, parts))
    assert one == other
    weights = [(f / "adapter" / "adapter_model.safetensors").read_bytes() for f in (whole, parts)]
    assert weights[0] == weights[1]


def test_keys_become_parts(file: Path) -> None:
    job = load_job(
        file,
        [
            "schedule={name: buffered, rounds: 5, size: 2}",
            "codec=[{name: top_k, keep: 0.1}, {name: quantise, bits: 8}]",
            "error_feedback=true",
            "tree=2",
            "aggregator=mean",
        ],
    )
    assert isinstance(job.make_schedule(), Buffered)
    codec = job.make_codec("up")
    assert isinstance(codec, ErrorFeedback) and isinstance(codec.codec, Chain)
    assert job.make_codec("down") is None
    strategy = job.make_strategy()
    assert isinstance(strategy, FedProx) and strategy.mu == 0.01
    deadline = load_job(file, ["schedule={name: deadline, seconds: 3, sample: 0.5}"])
    assert isinstance(deadline.make_schedule(), Deadline)
    assert isinstance(load_job(file).make_schedule(), Sync)
    shares = load_job(file, ["clients={count: 2, split: {name: shards, per_client: 1}}"])
    assert list(shares.clients.divide(["a", "a", "b", "b"], 0)) == ["client-0", "client-1"]
    category = load_job(file, ["clients={split: category}"])
    assert list(category.clients.divide(["a", "b", "a"], 0)) == ["a", "b"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("strategy=fedavgg", "did you mean 'fedavg'"),
        ("strategy=fedex", "merge the model"),
        ("strategy={name: fedprox, nu: 1}", "nu"),
        ("strategy={name: fedprox, mu: -1}", "mu is at least 0"),
        ("codec=[{name: quantise, bits: 1}]", "2 to 16 bits"),
        ("codec=[{name: quantise, bit: 4}]", "did you mean 'bits'"),
        ("codec=[gzip]", "no codecs named 'gzip'"),
        ("error_feedback=true", "corrects a codec"),
        ("clients={split: iid}", "count is needed"),
        ("clients={count: 2, split: random}", "split is one of iid"),
        ("schedule={name: sync, size: 3}", "sync has no size"),
        ("schedule={name: deadline}", "needs seconds"),
        ("local={steps: 1, epochs: 1}", "one of the two"),
        ("round=3", "no such option"),
        ("tree=1", "greater than or equal to 2"),
        ("aggregator=flagg", "did you mean 'flag'"),
        ("recipe=nowhere.yaml", "no recipe file"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(file: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        load_job(file, [override])


def test_the_live_table_shows_who_sent_what() -> None:
    federation = vectors(Sync(2), 25)
    seen = []
    federation.coordinator.watch = lambda coordinator: seen.append(clients(coordinator))
    federation.run()
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(seen[-1])
    text = console.export_text()
    assert "version 2" in text and "0 incidents" in text and "and 5 more" in text
    assert text.count(" 10 ") >= 20 and "c0" in text


def test_files_that_are_no_jobs(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_job(tmp_path / "nothing.yaml")
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / "mine").touch()
    with pytest.raises(ConfigurationError, match="not empty"):
        claim(folder, None)  # type: ignore[arg-type]
