"""The engine behind asyncio: many clients, disconnects, full queues, poisoned requests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from anabranch.errors import Draining, InvalidRequest, QueueFull, RequestFailed, RequestTooLong
from anabranch.models import ModelCard
from anabranch.models.protocol import OutputDelta, SamplingParameters
from anabranch.serving import EngineModel
from tests import tiny

CARD = ModelCard("tiny", "llama", 1, tiny.CONTEXT, "float32", "none", "a test", "0" * 64, 4)
TEMPLATE = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"


@contextlib.asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[EngineModel]:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = EngineModel("tiny", CARD, tokenizer, tiny.engine(tokenizer=tokenizer, **options))
    await model.start()
    try:
        yield model
    finally:
        await model.close()
        model.engine.cache.check_integrity()


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), timeout=60))  # type: ignore[arg-type]


async def text_of(generation: Any) -> str:
    return "".join([delta.text async for delta in generation])


async def until_idle(model: EngineModel) -> None:
    async with asyncio.timeout(10):
        while not model._thread.idle or model.engine.cache.usage:
            await asyncio.sleep(0.005)


def greedy(max_tokens: int, **more: Any) -> SamplingParameters:
    return SamplingParameters(max_tokens=max_tokens, temperature=0.0, **more)


def test_chat_applies_the_template() -> None:
    async def scenario() -> None:
        async with serving() as model:
            messages = [{"role": "user", "content": "hé"}]
            chat = await model.chat(messages, greedy(8))
            plain = await model.complete("user:hé\n", greedy(8))
            assert chat.prompt_tokens == plain.prompt_tokens == len("user:hé\n".encode())
            assert await text_of(chat) == await text_of(plain)

    run(scenario)


def test_200_streams_at_once_all_complete() -> None:
    async def scenario() -> None:
        async with serving(token_budget=256) as model:
            prompts = [[i % 200, 3, 5, 7] for i in range(200)]
            streams = [await model.complete(prompt, greedy(20)) for prompt in prompts]
            texts = await asyncio.gather(*(text_of(stream) for stream in streams))
            alone = await text_of(await model.complete(prompts[17], greedy(20)))
            assert texts[17] == alone
            assert model.statistics().generated_tokens == 201 * 20
            await until_idle(model)

    run(scenario)


def test_closing_a_stream_frees_its_pages_within_one_step() -> None:
    async def scenario() -> None:
        async with serving(token_budget=8) as model:
            stream = await model.complete([1] * 300, greedy(500))
            async for _ in stream:
                break
            await stream.aclose()
            # The abort is in the inbox: at most the step under way ends before it is carried out.
            steps = model.statistics().steps
            await until_idle(model)
            assert model.statistics().steps <= steps + 1
            await stream.aclose()  # harmless

    run(scenario)


def test_a_full_queue_refuses_before_anything_starts() -> None:
    async def scenario() -> None:
        async with serving(max_sequences=1, max_queue=3) as model:
            streams = [await model.complete([1, 2], greedy(400)) for _ in range(3)]
            with pytest.raises(QueueFull, match="holds 3"):
                for _ in range(3):
                    streams.append(await model.complete([1, 2], greedy(400)))
            for stream in streams:
                await stream.aclose()
            await until_idle(model)
            assert await text_of(await model.complete([1, 2], greedy(2))) is not None

    run(scenario)


def test_a_million_characters_are_refused_without_tokenizing_them() -> None:
    async def scenario() -> None:
        async with serving() as model:
            with pytest.raises(RequestTooLong, match=r"1000000 characters.*at most 1024"):
                await model.complete("a" * 1_000_000, greedy(5))
            with pytest.raises(RequestTooLong, match=r"2000 tokens.*at most 1023"):
                await model.complete([1] * 2000, greedy(5))

    run(scenario)


def test_a_template_that_refuses_is_the_clients_error() -> None:
    async def scenario() -> None:
        async with serving() as model:
            model._tokenizer.chat_template = "{{ raise_exception('only users may speak') }}"
            with pytest.raises(InvalidRequest, match="only users may speak"):
                await model.chat([{"role": "user", "content": "x"}], greedy(1))
            model._tokenizer.chat_template = None
            with pytest.raises(InvalidRequest, match="no chat template"):
                await model.chat([{"role": "user", "content": "x"}], greedy(1))

    run(scenario)


def test_a_defect_in_a_step_ends_its_requests_and_the_next_one_works() -> None:
    async def scenario() -> None:
        async with serving() as model:
            schedule = model.engine.scheduler.schedule

            def broken() -> None:
                model.engine.scheduler.schedule = schedule  # type: ignore[method-assign]
                raise ZeroDivisionError

            model.engine.scheduler.schedule = broken  # type: ignore[method-assign,assignment]
            deltas = [delta async for delta in await model.complete([1], greedy(5, n=2))]
            assert [(d.index, d.finish_reason) for d in deltas] == [(0, "error"), (1, "error")]
            assert "ZeroDivision" not in (deltas[0].error or "")
            assert [d async for d in await model.complete([1], greedy(2))][-1].finish_reason
            await until_idle(model)

    run(scenario)


def test_embeddings_are_unit_vectors_in_order_whatever_else_runs() -> None:
    async def scenario() -> None:
        async with serving(token_budget=16) as model:
            stream = await model.complete([1, 2, 3], greedy(60))
            texts = ["a", "bb" * 40, [5, 6, 7]]
            together = await model.embed(texts)
            alone = [(await model.embed([text]))[0] for text in texts]
            for first, second, tokens in zip(together, alone, (1, 80, 3), strict=True):
                assert first.tokens == tokens
                assert torch.tensor(first.vector).norm() == pytest.approx(1.0, abs=1e-5)
                assert first.vector == pytest.approx(second.vector, abs=1e-5)
            assert len(await text_of(stream)) > 0
            with pytest.raises(RequestTooLong):
                await model.embed(["ok", [1] * 2000])
            await until_idle(model)

    run(scenario)


def test_a_failing_embedding_names_no_internals() -> None:
    async def scenario() -> None:
        async with serving() as model:

            def broken(plan: Any) -> Any:
                raise RuntimeError("secret")

            model.engine.runner.execute = broken  # type: ignore[method-assign]
            with pytest.raises(RequestFailed, match="server's log") as caught:
                await model.embed(["a"])
            assert "secret" not in str(caught.value)

    run(scenario)


def test_closing_the_model_ends_every_choice() -> None:
    async def scenario() -> None:
        async with serving() as model:
            stream = await model.complete([1, 2], greedy(900, n=3))
            await model.close()
            ends: list[OutputDelta] = [d async for d in stream if d.finish_reason]
            assert {d.index for d in ends} == {0, 1, 2}
            assert {d.finish_reason for d in ends} == {"abort"}
            with pytest.raises(Draining):
                await model.complete([1], greedy(1))

    run(scenario)


def test_loading_by_name_picks_options(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    model = tiny.llama()
    model.save_pretrained(folder)
    tiny.byte_tokenizer().save_pretrained(folder)
    loaded = EngineModel.load(str(folder), served_name="other")
    assert loaded.name == "other"
    assert loaded.card.context_length == tiny.CONTEXT
    assert loaded.kv_memory == loaded.engine.cache.num_pages * loaded.engine.runner.page_bytes
