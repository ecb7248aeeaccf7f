"""What a newcomer does: start the server with its default model and talk to it as to OpenAI."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
MODEL = "smollm2"


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        found = re.search(rf'^anabranch_{name}{{[^}}]*model="{MODEL}"[^}}]*}} (\S+)$', text, re.M)
        assert found, f"{name} is not among the metrics:\n{text}"
        return float(found[1])


@contextlib.contextmanager
def running(*options: str, state: Path | None = None) -> Iterator[Server]:
    scratch = tempfile.TemporaryDirectory()
    command = [sys.executable, "-m", "anabranch", "up", "--port", "0"]
    command += ["--state", str(state or scratch.name), *options]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout is not None
        url = None
        for line in process.stdout:
            if found := re.search(r"listening on (http://\S+)", line):
                url = found[1]
            if line.startswith("curl"):
                break
        assert url, "the server ended before it listened"
        yield Server(process, url)
    finally:
        process.kill()
        process.wait()
        scratch.cleanup()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running("--embedding-model", "all-minilm-l6-v2", "--max-model-len", "2048") as started:
        yield started


def test_chat_answers_what_the_model_knows(server: Server) -> None:
    answer = server.client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_stream_has_the_same_text_and_usage(server: Server) -> None:
    stream = server.client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 5


def test_logprobs_choices_seed_and_stop(server: Server) -> None:
    create = server.client.chat.completions.create
    likely = create(
        model=MODEL, messages=QUESTION, temperature=0, logprobs=True, top_logprobs=2, max_tokens=3
    )
    assert likely.choices[0].logprobs is not None
    content = likely.choices[0].logprobs.content or []
    assert "".join(entry.token for entry in content) == "The capital of"
    assert all(entry.top_logprobs[0].token == entry.token for entry in content)

    poem = [{"role": "user", "content": "Write a line about rivers."}]
    two = [
        create(model=MODEL, messages=poem, temperature=1.2, seed=11, n=2, max_tokens=16)
        for _ in range(2)
    ]
    texts = [[choice.message.content for choice in answer.choices] for answer in two]
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]

    stopped = create(model=MODEL, messages=QUESTION, temperature=0, stop=[" is"])
    assert stopped.choices[0].message.content == "The capital of France"


def test_completions_continue_a_text(server: Server) -> None:
    answer = server.client.completions.create(
        model=MODEL, prompt="1, 2, 3, 4,", max_tokens=6, temperature=0
    )
    assert answer.choices[0].text.replace(" ", "").startswith("5,6")


def test_embeddings_of_both_models_place_similar_texts_together(server: Server) -> None:
    texts = ["The cat sat on the mat.", "A kitten rests on a rug.", "Interest rates rose by 2%."]
    for model in (MODEL, "all-minilm-l6-v2"):
        data = server.client.embeddings.create(model=model, input=texts).data
        cat, kitten, rates = (entry.embedding for entry in data)
        similar, different = (
            sum(a * b for a, b in zip(cat, other, strict=True)) for other in (kitten, rates)
        )
        assert similar > different
        assert sum(a * a for a in cat) == pytest.approx(1.0, abs=1e-4)


def test_models_are_listed(server: Server) -> None:
    assert [m.id for m in server.client.models.list()] == [MODEL, "all-minilm-l6-v2"]


def test_errors_are_the_clients_exceptions(server: Server) -> None:
    create = server.client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="smollm3"):
        create(model="smollm3", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        create(model=MODEL, messages=QUESTION, temperature=9)
    with pytest.raises(openai.BadRequestError, match=r"(?s)3\d\d\d tokens.*2047"):
        create(model=MODEL, messages=[{"role": "user", "content": "word " * 3000}])


def test_200_streams_at_once_complete(server: Server) -> None:
    def ask(number: int) -> str:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", timeout=240) as client:
            stream = client.completions.create(
                model=MODEL,
                prompt=f"{number} plus {number} equals",
                max_tokens=8,
                temperature=0,
                stream=True,
            )
            ended = [chunk.choices[0].finish_reason for chunk in stream][-1]
            assert ended is not None
            return ended

    with concurrent.futures.ThreadPoolExecutor(200) as pool:
        ends = list(pool.map(ask, range(200)))
    assert len(ends) == 200
    assert server.metric("cache_usage_ratio") == 0


def test_a_client_killed_in_mid_stream_frees_its_pages(server: Server) -> None:
    body = {"model": MODEL, "prompt": "Once upon", "max_tokens": 1500, "stream": True}
    script = (
        "import httpx, sys\n"
        f"with httpx.stream('POST', '{server.url}/v1/completions', json={body!r}) as answer:\n"
        "    for line in answer.iter_lines():\n"
        "        print(line, flush=True)\n"
    )
    client = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    client.stdout.readline()
    assert server.metric("cache_usage_ratio") > 0
    client.send_signal(signal.SIGKILL)
    client.wait()
    deadline = time.monotonic() + 20
    while server.metric("running_requests") > 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.metric("cache_usage_ratio") == 0


POISON = {
    "a grammar": {"response_format": {"type": "json_schema", "json_schema": {"schema": "{"}}},
    "a bias that is not a number": '{"logit_bias": {"5": NaN}}',
    "invalid UTF-8": b'{"prompt": "\xff\xfe"}',
    "a megabyte of prompt": {"prompt": "a " * 500_000},
    "an id outside the vocabulary": {"prompt": [10**6]},
    "half a surrogate pair": '{"prompt": "\\ud800"}',
}


@pytest.mark.parametrize("poison", POISON.values(), ids=POISON)
def test_a_poisoned_request_fails_alone(server: Server, poison: dict | str | bytes) -> None:
    body = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 4}
    with server.client.completions.create(**body, temperature=0, stream=True) as stream:
        chunks = iter(stream)
        text = next(chunks).choices[0].text
        if isinstance(poison, dict):
            content: bytes = json.dumps(body | poison).encode()
        else:
            content = poison if isinstance(poison, bytes) else poison.encode()
            content = content.replace(b"{", b'{"model": "smollm2", ', 1)
        answer = httpx.post(
            f"{server.url}/v1/completions",
            content=content,
            headers={"content-type": "application/json"},
            timeout=60,
        )
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["message"]
        text += "".join(chunk.choices[0].text for chunk in chunks)
    assert text.startswith(" Paris")


def test_sigterm_lets_streams_finish_and_refuses_new_requests() -> None:
    with running("--max-model-len", "512") as server:
        stream = server.client.completions.create(
            model=MODEL, prompt="Count: 1, 2,", max_tokens=60, temperature=0, stream=True
        )
        chunks = iter(stream)
        next(chunks)
        server.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while httpx.get(f"{server.url}/health").status_code != 503:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(openai.InternalServerError) as refused:
            server.client.completions.create(model=MODEL, prompt="x")
        assert refused.value.status_code == 503
        ends = [chunk.choices[0].finish_reason for chunk in chunks]
        assert ends[-1] == "length"
        assert server.process.wait(timeout=20) == 0
