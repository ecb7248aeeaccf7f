"""A run that was cut off ends as if it had not been."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model

from anabranch.training.errors import CheckpointError
from anabranch.training.language import LanguageObjective
from anabranch.training.losses.causal import Causal
from anabranch.training.metrics_log import read_metrics
from anabranch.training.trainer import Trainer
from tests import tiny
from tests.training import crashing
from tests.training.helpers import Regression, line, options, points, sequences


@pytest.mark.slow
def test_killed_twenty_times_at_random_moments(tmp_path):
    command = [sys.executable, "-m", "tests.training.crashing", str(tmp_path), "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert len(outcome["left_at"]) >= 10
    assert len(set(outcome["left_at"])) >= 5, "the kills were not spread over the run"
    assert outcome["killed"] == outcome["whole"]
    assert outcome["steps"] == list(range(1, crashing.STEPS + 1))


def language_trainer(output, **values):
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear")
    model = get_peft_model(tiny.llama(), config)
    made = options(
        **{"epochs": 3, "batch": 6, "lr": 1e-2, "micro_batch_tokens": 100, "evaluate_every": 2}
        | values
    )
    objective = LanguageObjective.from_options(Causal(), made)
    items = sequences(20)
    return Trainer(model, objective, made, items, validation=items[:4], output=output)


@pytest.mark.parametrize("at", [1, 4, 5, 11])
def test_a_language_model_resumes_bit_exactly(tmp_path, at):
    """In the middle of an epoch and at its end, with dropout and accumulation."""
    whole = language_trainer(tmp_path / "whole")
    whole.fit()
    first = language_trainer(tmp_path / "parts")
    first.progress = lambda *_: first.stop() if first.steps_done == at else None
    assert first.fit().stopped_because == "stopped"
    second = language_trainer(tmp_path / "parts")
    result = second.fit()
    assert (result.resumed_from, result.steps) == (at, 12)
    assert crashing.digest(second) == crashing.digest(whole)
    curves = [
        [e["loss"] for e in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in e]
        for name in ("whole", "parts")
    ]
    assert curves[0] == curves[1]


def test_state_dict_continues_another_trainer():
    one = Trainer(line(), Regression(noise=0.2), options(), points(9))
    for _ in range(4):
        one.step(one.next_items())
    state = one.state_dict()
    after = [one.step(one.next_items()).loss for _ in range(5)]
    other = Trainer(line(), Regression(noise=0.2), options(), points(9))
    other.load_state_dict(state)
    assert [other.step(other.next_items()).loss for _ in range(5)] == after
    one.load_state_dict(state)
    assert [one.step(one.next_items()).loss for _ in range(5)] == after


def test_sigterm_checkpoints_at_the_next_step(tmp_path):
    made = Trainer(line(), Regression(), options(steps=50), points(9), output=tmp_path)
    made.progress = lambda *_: os.kill(os.getpid(), signal.SIGTERM) if made.steps_done == 7 else 0
    before = signal.getsignal(signal.SIGTERM)
    result = made.fit()
    assert (result.stopped_because, result.steps) == ("terminated", 7)
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "checkpoints" / "step-7").is_dir()
    again = Trainer(line(), Regression(), options(steps=50), points(9), output=tmp_path)
    assert (again.fit().resumed_from, again.steps_done) == (7, 50)


def test_fit_works_outside_the_main_thread(tmp_path):
    results = []
    made = Trainer(line(), Regression(), options(), points(9), output=tmp_path)
    thread = threading.Thread(target=lambda: results.append(made.fit()))
    thread.start()
    thread.join()
    assert results[0].stopped_because == "finished"


def finished(output, **values):
    made = Trainer(line(), Regression(), options(**values), points(9), output=output)
    return made, made.fit()


def test_a_finished_run_is_not_trained_again(tmp_path):
    made, result = finished(tmp_path)
    again, same = finished(tmp_path)
    assert same.resumed_from == same.steps == result.steps == 20
    assert same.metrics == result.metrics
    assert torch.equal(again.model.weight, made.model.weight)


def test_changed_options_are_refused_with_the_difference(tmp_path, caplog):
    finished(tmp_path)
    changed = Trainer(line(), Regression(), options(lr=0.2, steps=25), points(9), output=tmp_path)
    with pytest.raises(CheckpointError) as raised:
        changed.fit()
    assert "options.lr: 0.1 in the checkpoint, 0.2 now" in str(raised.value)
    assert "options.steps: 20 in the checkpoint, 25 now" in str(raised.value)
    assert changed.steps_done == 0
    with caplog.at_level(logging.WARNING):
        assert changed.fit(resume="force").steps == 25
    assert "resuming with a change: options.lr" in caplog.text


def test_other_data_is_refused(tmp_path):
    finished(tmp_path)
    other = Trainer(line(), Regression(), options(), points(8), output=tmp_path)
    with pytest.raises(CheckpointError, match="items: '9 items' in the checkpoint, '8 items' now"):
        other.fit()


def test_another_base_model_is_refused(tmp_path):
    def made(value):
        model = torch.nn.Sequential(line(), line().requires_grad_(False))
        torch.nn.init.constant_(model[1].weight, value)
        return Trainer(model, Regression(), options(), points(9), output=tmp_path)

    made(1.0).fit()
    with pytest.raises(CheckpointError, match="base: "):
        made(2.0).fit()
    assert made(1.0).fit().resumed_from == 20


def test_never_resume(tmp_path):
    finished(tmp_path)
    again = Trainer(line(), Regression(), options(), points(9), output=tmp_path)
    with pytest.raises(CheckpointError, match="has checkpoints up to step 20"):
        again.fit(resume="never")


def test_the_log_forgets_what_came_after_the_checkpoint(tmp_path):
    made = Trainer(
        line(), Regression(), options(checkpoint={"every": 5}), points(9), output=tmp_path
    )

    def crash(*_):
        if made.steps_done == 8:
            raise KeyboardInterrupt

    made.progress = crash
    with pytest.raises(KeyboardInterrupt):
        made.fit()
    log = tmp_path / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 9, "lo')  # cut off in the middle of a line
    _, result = finished(tmp_path, checkpoint={"every": 5})
    assert result.resumed_from == 5
    assert [entry["step"] for entry in read_metrics(log)] == list(range(1, 21))
    assert log.read_text().count("\n") == 20


def test_a_damaged_newest_checkpoint_costs_only_its_steps(tmp_path, caplog):
    made, _ = finished(tmp_path, checkpoint={"every": 6, "keep": 3})
    weights = tmp_path / "checkpoints" / "step-20" / "state.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        again, result = finished(tmp_path, checkpoint={"every": 6, "keep": 3})
    assert "step-20" in caplog.text
    assert result.resumed_from == 18
    assert torch.equal(again.model.weight, made.model.weight)


def test_a_full_disk_in_the_middle_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    made = Trainer(
        line(), Regression(), options(checkpoint={"every": 5}), points(9), output=tmp_path
    )
    real = os.fsync

    def fsync(descriptor):
        if made.steps_done == 10:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with caplog.at_level(logging.WARNING):
        result = made.fit()
    assert result.failed_checkpoints == 1
    assert "No space left on device; checkpoints kept: step 5; training goes on" in caplog.text
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-15", "step-20"]


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    made = Trainer(line(), Regression(), options(), points(9), output=tmp_path)
    with pytest.raises(CheckpointError, match="step 20 could not be written"):
        made.fit()
