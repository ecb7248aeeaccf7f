"""The engine's model in the place of the fake one."""

from __future__ import annotations

import copy
import csv
import io
from dataclasses import replace
from pathlib import Path

from openai.types.fine_tuning import FineTuningJob

from anabranch.serving import EngineModel
from tests import tiny

from ..conftest import CARD
from ..fake_trainer import TEMPLATE
from ..test_files import ROW, exactly
from ..test_server import within
from .conftest import serving


def test_the_engine_in_the_place_of_the_fake_one(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny.byte_tokenizer())
    tokenizer.chat_template = TEMPLATE
    engine = tiny.engine(200, tokenizer=tokenizer)
    model = EngineModel("base", replace(CARD, name="base"), tokenizer, engine)
    with serving(tmp_path, model) as server:
        ask = {"model": "base:tone", "prompt": "<user>q", "max_tokens": 4, "temperature": 0}
        job = server.create(
            *[ROW] * 8,
            validation_file=server.upload(),
            suffix="tone",
            hyperparameters={"n_epochs": 2, "batch_size": 2},
            extras={"rank": 2, "lr": 1e-2, "publish_every": 3},
        )
        done = server.wait(job)
        exactly(FineTuningJob, done)
        ours = done.anabranch  # type: ignore[attr-defined]
        assert (ours["step"], ours["total_steps"], ours["version"]) == (8, 8, 3)
        assert done.trained_tokens == 608
        table = list(
            csv.DictReader(io.StringIO(server.client.files.content(done.result_files[0]).text))
        )
        losses = [float(row["train_loss"]) for row in table]
        assert len(losses) == 8
        assert losses[-1] < losses[0] - 1
        assert float(table[-1]["valid_loss"]) == ours["validation_loss"]
        assert [c.step_number for c in server.jobs.checkpoints.list(job.id)] == [8, 6, 3]
        answer = server.client.completions.create(**ask)  # type: ignore[call-overload]
        base = server.client.completions.create(**ask | {"model": "base"})  # type: ignore[call-overload]
        assert answer.choices[0].text != base.choices[0].text
        long = server.create(extras={"steps": 100_000})
        server.wait(long, "running")
        server.jobs.pause(long.id)
        server.wait(long, "paused")
        server.jobs.resume(long.id)
        server.wait(long, "running")
        refused = server.create(extras={"method": "prompt_tuning"})
        assert "prompt" in server.wait(refused, "failed").error.message  # type: ignore[union-attr]
    # The served adapter comes back, and the unfinished job goes on.
    engine = tiny.engine(200, tokenizer=tokenizer)
    model = EngineModel("base", replace(CARD, name="base"), tokenizer, engine)
    with serving(tmp_path, model) as server:
        again = server.client.completions.create(**ask)  # type: ignore[call-overload]
        assert again.choices[0].text == answer.choices[0].text
        at = server.jobs.retrieve(long.id).anabranch["step"] or 0  # type: ignore[attr-defined]
        assert within(10, lambda: (server.jobs.retrieve(long.id).anabranch["step"] or 0) > at)  # type: ignore[attr-defined]
        assert server.jobs.cancel(long.id).status == "cancelled"
