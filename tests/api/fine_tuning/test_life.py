"""``/v1/fine_tuning/jobs`` from creation to result."""

from __future__ import annotations

import csv
import io

import pytest
from openai.types import FileObject
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint

from ..test_files import ROW, exactly
from .conftest import Server


def test_the_life_of_a_job(server: Server) -> None:
    validation = server.upload(ROW, ROW)
    job = server.create(
        *[ROW] * 10,
        validation_file=validation,
        suffix="tone",
        seed=7,
        metadata={"team": "a"},
        method={
            "type": "supervised",
            "supervised": {
                "hyperparameters": {
                    "n_epochs": 2,
                    "batch_size": 4,
                    "learning_rate_multiplier": 0.5,
                }
            },
        },
        extras={"rank": 4, "weight": 2.0, "publish_every": 2},
    )
    exactly(FineTuningJob, job)
    assert (job.status, job.fine_tuned_model, job.trained_tokens) == ("queued", None, None)
    assert (job.seed, job.model, job.metadata) == (7, "base", {"team": "a"})
    assert job.hyperparameters.model_dump() == {
        "n_epochs": 2,
        "batch_size": 4,
        "learning_rate_multiplier": 0.5,
    }
    done = server.wait(job)
    exactly(FineTuningJob, done)
    assert done.fine_tuned_model == "base:tone"
    assert done.finished_at is not None
    assert done.estimated_finish is None
    (asked,) = server.model.jobs
    assert (asked.adapter, asked.method, asked.method_options) == (
        "tone",
        "lora",
        {"r": 4, "lora_alpha": 8},
    )
    assert (asked.weight, asked.publish_every, len(asked.validation)) == (2.0, 2, 2)
    assert (asked.options.batch, asked.options.epochs, asked.options.lr) == (4, 2, 1e-4)
    assert (asked.options.seed, asked.options.evaluate_every) == (7, 3)
    assert len(asked.items) == 10
    # Two epochs of the same ten rows.
    assert done.trained_tokens == 2 * sum(len(example) for (example,) in asked.items)

    answer = server.client.chat.completions.create(
        model="base:tone", messages=[{"role": "user", "content": "x y"}]
    )
    assert answer.choices[0].message.content == "x y "

    events = list(server.jobs.list_events(job.id, limit=4))
    for event in events:
        exactly(FineTuningJobEvent, event)
    assert events[0].message == "The job has successfully completed"
    assert events[1].message == "New fine-tuned model created: base:tone"
    assert events[-1].message == f"Created fine-tuning job: {job.id}"
    steps = [e for e in events if e.type == "metrics" and "train_loss" in e.data]  # type: ignore[operator]
    assert [e.data["step"] for e in steps] == [6, 5, 4, 3, 2, 1]  # type: ignore[index]
    assert steps[-1].message == "Step 1/6: training loss=3.0000"

    checkpoints = list(server.jobs.checkpoints.list(job.id, limit=2))
    for checkpoint in checkpoints:
        exactly(FineTuningJobCheckpoint, checkpoint)
    assert [c.step_number for c in checkpoints] == [6, 4, 2]
    assert {c.fine_tuned_model_checkpoint for c in checkpoints} == {"base:tone"}
    assert checkpoints[0].metrics.valid_loss == pytest.approx(1.0)

    (result,) = done.result_files
    kept = server.client.files.retrieve(result)
    exactly(FileObject, kept)
    assert (kept.purpose, kept.filename) == ("fine-tune-results", "step_metrics.csv")
    table = list(csv.DictReader(io.StringIO(server.client.files.content(result).text)))
    assert [row["step"] for row in table] == list("123456")
    assert [float(row["train_loss"]) for row in table] == pytest.approx(
        [3 / n for n in range(1, 7)]
    )
    assert [row["valid_loss"] for row in table] == ["", "", "1.5", "", "", "1.0"]


def test_auto_is_a_default_for_adapters(server: Server) -> None:
    auto = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    job = server.create(hyperparameters=auto)
    assert job.hyperparameters.model_dump() == {
        "n_epochs": 3,
        "batch_size": 1,
        "learning_rate_multiplier": 1.0,
    }
    done = server.wait(job)
    assert done.fine_tuned_model == f"base:{job.id.removeprefix('ftjob-')}"
    (asked,) = server.model.jobs
    assert (asked.options.lr, asked.method_options, asked.options.max_length) == (
        2e-4,
        {"r": 16, "lora_alpha": 32},
        512,
    )
    assert asked.validation == ()
