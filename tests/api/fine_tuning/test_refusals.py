"""Jobs that cannot be created, and why."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from ..test_files import ROW, jsonl
from .conftest import Server


@pytest.mark.parametrize(
    ("options", "status", "param", "words"),
    [
        ({"model": "bse"}, 404, "model", "did you mean 'base'"),
        ({"model": "echo"}, 400, "model", "cannot be fine-tuned here; models that can: base"),
        ({"model": "base:nothing"}, 404, "model", "nor the result of a succeeded job"),
        ({"training_file": "file-nothing"}, 400, "training_file", "no file"),
        ({"validation_file": "file-nothing"}, 400, "validation_file", "no file"),
        ({"suffix": "a:b"}, 400, "suffix", "suffix"),
        ({"suffix": "x" * 65}, 400, "suffix", "suffix"),
        ({"seed": -1}, 400, "seed", "seed"),
        ({"method": {"type": "dpo"}}, 400, "method.type", "'supervised'"),
        ({"method": {"type": "reinforcement"}}, 400, "method.type", "'supervised'"),
        ({"hyperparameters": {"n_epochs": 0}}, 400, "hyperparameters.n_epochs", "greater"),
        ({"hyperparameters": {"epochs": 1}}, 400, "hyperparameters.epochs", "n_epochs"),
        (
            {
                "hyperparameters": {"n_epochs": 1},
                "method": {"type": "supervised", "supervised": {"hyperparameters": {}}},
            },
            400,
            "hyperparameters",
            "one place",
        ),
        ({"integrations": [{"type": "wandb"}]}, 400, "integrations", "at most 0"),
        ({"metadata": {str(n): "" for n in range(17)}}, 400, "metadata", "at most 16"),
        ({"extras": {"rnk": 4}}, 400, "anabranch.rnk", "did you mean 'rank'"),
        ({"extras": {"method": "lorra"}}, 400, "anabranch.method", "did you mean 'lora'"),
        ({"extras": {"method": "ia3", "rank": 4}}, 400, "anabranch.rank", "has no rank"),
        ({"extras": {"options": {"alpha": 1}}}, 400, "anabranch.options.alpha", "lora_alpha"),
        ({"extras": {"rank": 10**6}}, 400, "anabranch.rank", "1024"),
        ({"extras": {"options": {"r": 10**6}}}, 400, "anabranch.options.r", "1 to 1024"),
        ({"extras": {"rank": 4, "options": {"r": 4}}}, 400, "anabranch.rank", "also given"),
        ({"extras": {"max_length": 513}}, 400, "anabranch.max_length", "at most 512 tokens"),
        ({"extras": {"max_length": 10}}, 400, "training_file", "rows.jsonl:1"),
        ({"extras": {"max_length": 10, "overlong": "drop"}}, 400, "training_file", "no row left"),
        ({"extras": {"evaluate_every": 1}}, 400, "anabranch.evaluate_every", "validation_file"),
        (
            {"extras": {"lr": 1e-3}, "hyperparameters": {"learning_rate_multiplier": 2.0}},
            400,
            "anabranch.lr",
            "learning_rate_multiplier",
        ),
        (
            {"extras": {"steps": 3}, "hyperparameters": {"n_epochs": 2}},
            400,
            "anabranch.steps",
            "n_epochs",
        ),
        ({"extras": {"template": "/etc/passwd"}}, 400, "anabranch.template", "alpaca"),
    ],
)
def test_refusals(
    shared: Server, options: dict[str, Any], status: int, param: str, words: str
) -> None:
    with pytest.raises(openai.APIStatusError, match=words) as refused:
        shared.create(**options)
    assert (refused.value.status_code, refused.value.param) == (status, param)
    assert list(shared.jobs.list()) == []
    folder = shared.workspace.folder / "jobs"
    assert not folder.exists() or list(folder.iterdir()) == []


def test_a_file_of_another_purpose_cannot_be_trained_on(shared: Server) -> None:
    file = shared.client.files.create(file=("x", jsonl(ROW)), purpose="batch")
    with pytest.raises(openai.BadRequestError, match="purpose 'batch'"):
        shared.jobs.create(model="base", training_file=file.id)


def test_unknown_jobs(shared: Server) -> None:
    jobs = shared.jobs
    for method in (
        jobs.retrieve,
        jobs.cancel,
        jobs.pause,
        jobs.resume,
        jobs.list_events,
        jobs.checkpoints.list,
    ):
        with pytest.raises(openai.NotFoundError) as missing:
            method("ftjob-nothing")
        assert missing.value.code == "job_not_found"


def test_names_are_not_taken_from_others(server: Server) -> None:
    done = server.wait(server.create(suffix="tone"))
    with pytest.raises(openai.ConflictError, match="base:tone is served already"):
        server.create(suffix="tone")
    server.model.go.clear()
    waiting = server.create(suffix="other")
    with pytest.raises(openai.ConflictError, match="unfinished job already makes 'other'"):
        server.create(suffix="other")
    server.jobs.cancel(waiting.id)
    server.model.go.set()
    # Going on from a result: its method, its folder.
    more = server.wait(server.create(model="base:tone", suffix="more"))
    assert (more.model, more.fine_tuned_model) == ("base:tone", "base:more")
    asked = server.model.jobs[-1]
    assert asked.start_from == server.workspace.job_folder(done.id) / "output" / "adapter"
    assert asked.method_options == {"r": 16, "lora_alpha": 32}
    with pytest.raises(openai.BadRequestError, match="leave it out"):
        server.create(model="base:tone", extras={"rank": 2})
    server.client.models.delete("base:tone")
    server.wait(server.create(suffix="tone"))
