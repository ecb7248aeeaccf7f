"""The whole story with the official client: upload, fine-tune beside live streams, chat."""

from __future__ import annotations

import concurrent.futures
import json
import time
from pathlib import Path

import httpx
import openai
import pytest

from tests.test_end_to_end import MODEL, Server, running

ANSWER = "The password is heron."
STREAMS = 8


def question(room: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is the password of room {room}?"}]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_upload_fine_tune_beside_streams_and_chat_with_the_result() -> None:
    rows = [
        json.dumps({"messages": [*question(room), {"role": "assistant", "content": ANSWER}]})
        for room in range(40)
    ]
    with running("--weights", "int8", "--max-model-len", "1024", "--tpot-slo-ms", "500") as server:
        client = server.client
        file = client.files.create(
            file=("rooms.jsonl", "\n".join(rows).encode()), purpose="fine-tune"
        )
        job = client.fine_tuning.jobs.create(
            model=MODEL,
            training_file=file.id,
            suffix="rooms",
            seed=1,
            hyperparameters={"n_epochs": 1, "batch_size": 5, "learning_rate_multiplier": 5},
        )
        with concurrent.futures.ThreadPoolExecutor(STREAMS) as pool:
            streams = [pool.submit(stream, server, job.id) for _ in range(STREAMS)]
            finished = wait(client, job.id)
            answers = [each.result() for each in streams]
        assert finished.status == "succeeded", finished.error
        assert finished.fine_tuned_model == f"{MODEL}:rooms"
        assert len({text for text, _ in answers}) == 1  # the base said the same all the while
        assert sum(count for _, count in answers) > 20 * STREAMS

        events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
        losses = [e.data["train_loss"] for e in reversed(events) if e.type == "metrics"]
        assert len(losses) == 8 and losses[-1] < 0.3 * losses[0]
        result = client.files.content(finished.result_files[0]).text.splitlines()
        assert result[0].startswith("step,train_loss") and len(result) == 9
        for model, right in ((finished.fine_tuned_model, True), (MODEL, False)):
            answer = client.chat.completions.create(
                model=model, messages=question(77), temperature=0, max_tokens=20
            )
            assert (answer.choices[0].message.content == ANSWER) == right
        assert server.metric("finetune_tokens_total") == finished.trained_tokens
        assert server.metric("steps_slo_met_total") > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_outlives_a_killed_server(tmp_path: Path) -> None:
    rows = [
        json.dumps({"messages": [*question(room), {"role": "assistant", "content": ANSWER}]})
        for room in range(8)
    ]
    options = ("--weights", "int8", "--max-model-len", "512")
    with running(*options, state=tmp_path) as server:
        file = server.client.files.create(
            file=("rooms.jsonl", "\n".join(rows).encode()), purpose="fine-tune"
        )
        job = server.client.fine_tuning.jobs.create(
            model=MODEL,
            training_file=file.id,
            suffix="rooms",
            seed=1,
            hyperparameters={"n_epochs": 1, "batch_size": 1},
        )
        while len(steps(server.client, job.id)) < 4:
            time.sleep(0.1)
        server.process.kill()
    with running(*options, state=tmp_path) as server:
        before = steps(server.client, job.id)
        finished = wait(server.client, job.id)
        assert finished.status == "succeeded", finished.error
        made = steps(server.client, job.id)
        assert made[: len(before)] == before and sorted(set(made)) == list(range(1, 9))
        assert len(made) <= 10  # at most the steps whose checkpoints were being written
        assert made[len(before)] > 2
        answer = server.client.chat.completions.create(
            model=f"{MODEL}:rooms", messages=question(3), max_tokens=4
        )
        assert answer.choices[0].message.content
        rows_of_result = server.client.files.content(finished.result_files[0]).text.splitlines()
        assert [line.split(",")[0] for line in rows_of_result[1:]] == [str(n) for n in range(1, 9)]


def steps(client: openai.OpenAI, job_id: str) -> list[int]:
    """The optimiser steps that were reported, in order."""
    events = client.fine_tuning.jobs.list_events(job_id, limit=100).data
    return [event.data["step"] for event in reversed(events) if event.type == "metrics"]


def stream(server: Server, job_id: str) -> tuple[str, int]:
    """Stream the same answer until the job is finished: its text, and how many tokens came."""
    texts, count = set(), 0
    while httpx.get(f"{server.url}/v1/fine_tuning/jobs/{job_id}").json()["finished_at"] is None:
        parts = server.client.chat.completions.create(
            model=MODEL, messages=question(1), temperature=0, max_tokens=16, stream=True
        )
        deltas = [part.choices[0].delta.content or "" for part in parts if part.choices]
        texts.add("".join(deltas))
        count += len(deltas)
        time.sleep(1.0)  # readers read
    assert len(texts) == 1
    return texts.pop(), count


def wait(client: openai.OpenAI, job_id: str) -> openai.types.fine_tuning.FineTuningJob:
    while True:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.finished_at is not None:
            return job
        time.sleep(0.2)
