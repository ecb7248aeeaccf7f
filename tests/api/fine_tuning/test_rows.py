"""What becomes of a file's rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest

from anabranch.api.fine_tuning import dataset
from anabranch.training.filtering import RowPolicy
from anabranch.training.template import Template

from ..fake_trainer import TrainingModel
from ..test_files import ROW, jsonl
from .conftest import Server, messages_of


def test_tokens_are_those_of_the_training_code(server: Server) -> None:
    rows: list[Any] = [
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "one"},
                {"role": "assistant", "content": "wrong", "weight": 0},
                {"role": "user", "content": "two"},
                {"role": "assistant", "content": "right", "weight": 1},
            ]
        },
        {"prompt": "what", "completion": "that"},
        {"messages": [{"role": "developer", "content": "d"}, *ROW["messages"]]},
    ]
    server.wait(server.create(*rows))
    (asked,) = server.model.jobs
    trained, texts = [], []
    for (example,) in asked.items:
        marked = [t for t, on in zip(example.tokens, example.trained, strict=True) if on]
        trained.append(server.model.tokenizer.decode(marked))
        texts.append(server.model.tokenizer.decode(list(example.tokens)))
    assert trained == ["right</assistant>", "that</assistant>", "a</assistant>"]
    assert texts[0] == (
        "<system>s</system><user>one</user><assistant>wrong</assistant>"
        "<user>two</user><assistant>right</assistant>"
    )
    assert texts[2].startswith("<system>d</system>")
    assert [example.source for (example,) in asked.items] == [f"rows.jsonl:{n}" for n in (1, 2, 3)]


def test_long_rows_are_named_or_cut_as_asked(server: Server) -> None:
    long = {"prompt": "x" * 100, "completion": "y" * 100}
    with pytest.raises(openai.BadRequestError, match=r"2 rows \(rows.jsonl:2, rows.jsonl:4\)"):
        server.create(ROW, long, ROW, long, extras={"max_length": 60})
    job = server.create(
        ROW, long, ROW, long, extras={"max_length": 60, "overlong": "drop", "steps": 2}
    )
    server.wait(job)
    assert len(server.model.jobs[0].items) == 2
    assert any("2 rows: longer than max_length" in m for m in messages_of(server, job))
    job = server.create(ROW, long, extras={"max_length": 150, "overlong": "truncate"})
    server.wait(job)
    assert [len(e) for (e,) in server.model.jobs[1].items][1] == 150


def test_ten_thousand_rows_and_a_file_deleted_right_away(server: Server) -> None:
    file = server.upload(*({"prompt": f"p{n}", "completion": f"{n}"} for n in range(10_000)))
    job = server.jobs.create(
        model="base", training_file=file, hyperparameters={"n_epochs": 1, "batch_size": 500}
    )
    server.client.files.delete(file)
    done = server.wait(job)
    assert len(server.model.jobs[0].items) == 10_000
    assert done.training_file == file


def test_rows_come_back_as_they_were_saved(tmp_path: Path) -> None:
    rows = [{"prompt": f"é {n}", "completion": "y" * n} for n in range(50)]
    source = tmp_path / "rows.jsonl"
    source.write_bytes(jsonl(*rows))
    template = Template("chat", TrainingModel().tokenizer)
    made = dataset.render(source, "rows.jsonl", template, RowPolicy(), "training_file").items
    dataset.save(tmp_path / "x" / "rows.safetensors", made)
    assert dataset.load(tmp_path / "x" / "rows.safetensors") == list(made)
