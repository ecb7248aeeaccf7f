"""Writing to disk without holding up the engine's steps."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

Action = Callable[[], None]


class BackgroundWriter:
    """Runs one write at a time on a thread of its own. A write that waits is replaced by a newer.

    Everything else happens on the thread that owns the writer: ``then`` is called by :meth:`poll`
    once its write has ended well.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="anabranch-finetune-writer")
        self._running: tuple[Future[None], Action] | None = None
        self._waiting: tuple[Action, Action] | None = None

    def submit(self, write: Action, then: Action) -> None:
        """Write soon."""
        self._waiting = write, then
        self.poll()

    def poll(self) -> None:
        """Take note of a write that has ended, and start the next. Raises what a write raised."""
        ended = None
        if self._running is not None and self._running[0].done():
            ended, self._running = self._running, None
        if self._running is None and self._waiting is not None:
            write, then = self._waiting
            self._running, self._waiting = (self._pool.submit(write), then), None
        if ended is not None:
            future, then = ended
            future.result()
            then()

    @property
    def idle(self) -> bool:
        """Whether everything is written."""
        return self._running is None and self._waiting is None

    def close(self) -> None:
        """Give up what waits, and let what is being written end on its own."""
        self._waiting = None
        self._pool.shutdown(wait=False)
