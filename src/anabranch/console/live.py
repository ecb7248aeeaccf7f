"""Values that many tabs watch and that are read once for all of them.

No page polls. A :class:`Topic` reads its value at a steady pace while somebody watches it and hands
it to every watcher, so that twenty tabs cost one reading and twenty short messages.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

logger = logging.getLogger("anabranch.console")

Value = TypeVar("Value")
Unwatch = Callable[[], None]


class Watchers(Generic[Value]):
    """Who wants to be told. One that raises is logged and taken off; the others are told."""

    def __init__(self) -> None:
        self._watchers: list[Callable[[Value], None]] = []

    def __len__(self) -> int:
        return len(self._watchers)

    def add(self, watcher: Callable[[Value], None]) -> Unwatch:
        """Tell ``watcher`` from now on; the function that is returned ends it, also twice."""
        self._watchers.append(watcher)

        def remove() -> None:
            if watcher in self._watchers:
                self._watchers.remove(watcher)

        return remove

    def tell(self, value: Value) -> None:
        """Call all of them."""
        for watcher in list(self._watchers):
            try:
                watcher(value)
            except Exception:
                logger.exception("a page could not be updated")
                if watcher in self._watchers:
                    self._watchers.remove(watcher)


class Topic(Generic[Value]):
    """A value that is read every ``seconds`` while it is watched, once for all watchers.

    A reading that fails is logged, and tried again at the next turn.
    """

    def __init__(self, read: Callable[[], Awaitable[Value]], seconds: float = 1.0) -> None:
        self._read = read
        self._seconds = seconds
        self._watchers: Watchers[Value] = Watchers()
        self._task: asyncio.Task[None] | None = None

    def watch(self, watcher: Callable[[Value], None]) -> Unwatch:
        """Call ``watcher`` with every reading until the returned function is called."""
        unwatch = self._watchers.add(watcher)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return unwatch

    @property
    def watched(self) -> bool:
        """Whether anybody watches."""
        return len(self._watchers) > 0

    async def refresh(self) -> None:
        """Read now and tell everybody."""
        self._watchers.tell(await self._read())

    async def _run(self) -> None:
        while self._watchers:
            await asyncio.sleep(self._seconds)
            try:
                await self.refresh()
            except Exception:
                logger.exception("a page's values could not be read")
