"""One HTTP request's generations, as one stream of deltas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any

from anabranch.api.metrics import RequestTimer
from anabranch.errors import RequestFailed
from anabranch.models.protocol import Generation, OutputDelta


class Answer:
    """Iterate over it for ``(choice, delta)``; close it to abort.

    A request may have several prompts; choice ``i * n + j`` is the j-th answer to prompt i.
    """

    def __init__(self, generations: Sequence[Generation], n: int, timer: RequestTimer) -> None:
        self.generations = generations
        self.choices = len(generations) * n
        self.timer = timer
        self._n = n

    @classmethod
    async def admit(
        cls, starts: Sequence[Awaitable[Generation]], n: int, timer: RequestTimer
    ) -> Answer:
        """Start all prompts; if one is refused, abort the others and raise its error."""
        tasks = [asyncio.ensure_future(start) for start in starts]
        try:
            generations = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if not isinstance(outcome, BaseException):
                    await outcome.aclose()
            raise
        return cls(generations, n, timer)

    async def __aiter__(self) -> AsyncIterator[tuple[int, OutputDelta]]:
        """Every delta as it comes. Raises :class:`RequestFailed` if a choice does not finish."""
        unfinished = self.choices
        source = self._merged() if len(self.generations) > 1 else self._single()
        async for choice, delta in source:
            if delta.finish_reason is not None:
                if delta.finish_reason in ("error", "abort"):
                    raise RequestFailed(delta.error or "the request was aborted by the server")
                unfinished -= 1
            self.timer.delta(choice, delta)
            yield choice, delta
        if unfinished:
            raise RequestFailed(f"the model ended with {unfinished} unfinished choices")
        self.timer.finished(self.prompt_tokens)

    async def aclose(self) -> None:
        """Abort what still runs. Harmless when everything has finished."""
        await asyncio.gather(*(generation.aclose() for generation in self.generations))

    @property
    def prompt_tokens(self) -> int:
        """All prompts together."""
        return sum(generation.prompt_tokens for generation in self.generations)

    def usage(self) -> dict[str, Any]:
        """Token counts so far, in OpenAI's shape."""
        prompt, output = self.prompt_tokens, self.timer.output_tokens
        cached = sum(generation.cached_tokens for generation in self.generations)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    async def _single(self) -> AsyncIterator[tuple[int, OutputDelta]]:
        async for delta in self.generations[0]:
            yield delta.index, delta

    async def _merged(self) -> AsyncIterator[tuple[int, OutputDelta]]:
        """Deltas of all prompts in order of arrival."""
        # The bound makes a slow client slow down the readers, not fill the memory.
        queue: asyncio.Queue[tuple[int, OutputDelta] | BaseException | None]
        queue = asyncio.Queue(maxsize=64)

        async def forward(prompt: int, generation: Generation) -> None:
            try:
                async for delta in generation:
                    await queue.put((prompt * self._n + delta.index, delta))
                await queue.put(None)
            except Exception as error:
                await queue.put(error)

        tasks = [asyncio.create_task(forward(i, g)) for i, g in enumerate(self.generations)]
        try:
            running = len(tasks)
            while running:
                item = await queue.get()
                if item is None:
                    running -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
