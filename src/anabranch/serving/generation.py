"""One request's answer on its way from the engine to whoever asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import torch

from anabranch.errors import RequestFailed
from anabranch.models.protocol import OutputDelta
from anabranch.serving.engine import StepOutput
from anabranch.serving.sequence import Request


class EngineGeneration:
    """One request's deltas as they are produced; see :class:`anabranch.models.Generation`.

    ``abort(id)`` stops the request, if it still runs.
    """

    def __init__(self, request: Request, abort: Callable[[str], None]) -> None:
        self.id = request.id
        self.prompt_tokens = len(request.prompt)
        self.cached_tokens = 0
        self._abort = abort
        self._unfinished = set(range(request.sampling.n))
        self._unread = request.sampling.n  # choices whose end was not yet handed out
        self._deltas: asyncio.Queue[OutputDelta] = asyncio.Queue()
        self._embedding: torch.Tensor | None = None

    async def __aiter__(self) -> AsyncIterator[OutputDelta]:
        while self._unread:
            delta = await self._deltas.get()
            if delta.finish_reason is not None:
                self._unread -= 1
            yield delta

    async def vector(self) -> list[float]:
        """The pooled vector of a pooling request, of unit length."""
        async for delta in self:
            if delta.finish_reason != "stop":
                raise RequestFailed(delta.error or f"the request ended with {delta.finish_reason}")
        assert self._embedding is not None
        return torch.nn.functional.normalize(self._embedding, dim=0).tolist()

    async def aclose(self) -> None:
        """Abort, unless it has finished."""
        self._abort(self.id)

    def take(self, output: StepOutput) -> bool:
        """Accept an output from the engine; returns whether it was the last one."""
        self.cached_tokens = max(self.cached_tokens, output.cached_tokens)
        if output.embedding is not None:
            self._embedding = output.embedding
        if output.delta.finish_reason is not None:
            self._unfinished.discard(output.delta.index)
        self._deltas.put_nowait(output.delta)
        return not self._unfinished

    def end(self) -> None:
        """Finish every choice that is still open, because the model stops serving."""
        for index in sorted(self._unfinished):
            self._deltas.put_nowait(OutputDelta(index, finish_reason="abort"))
        self._unfinished.clear()
