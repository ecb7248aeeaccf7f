"""Topics: read once for all, and only while somebody watches."""

from __future__ import annotations

import asyncio

import pytest

from anabranch.console.live import Topic


def test_many_watchers_cost_one_reading_and_none_cost_nothing() -> None:
    readings = 0
    seen: list[int] = []

    async def read() -> int:
        nonlocal readings
        readings += 1
        return readings

    async def story() -> None:
        topic = Topic(read, seconds=0.01)
        unwatch = [topic.watch(seen.append) for _ in range(20)]
        await asyncio.sleep(0.055)
        assert 2 <= readings <= 6 and len(seen) == 20 * readings
        for each in unwatch:
            each()
        assert not topic.watched
        await asyncio.sleep(0.03)
        before = readings
        await asyncio.sleep(0.05)
        assert readings == before  # the last reading was under way when they left
        topic.watch(seen.append)
        await asyncio.sleep(0.05)
        assert readings > before

    asyncio.run(story())


def test_a_reading_that_fails_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    outcomes = [OSError("the database is busy"), "good"]
    seen: list[str] = []

    async def read() -> str:
        outcome = outcomes.pop(0) if len(outcomes) > 1 else outcomes[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def story() -> None:
        topic = Topic(read, seconds=0.01)
        topic.watch(seen.append)
        await asyncio.sleep(0.06)

    asyncio.run(story())
    assert set(seen) == {"good"} and "could not be read" in caplog.text
