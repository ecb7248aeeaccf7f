"""The engine on a thread of its own, which alone touches it.

Commands reach it through an inbox that it empties before every step; what a step produced goes back
to the event loop in one call, however many requests it belongs to.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from anabranch.serving.engine import Engine, StepOutput

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Deliver = Callable[[list[StepOutput]], None]


class EngineThread:
    """Runs an engine's steps from :meth:`start` to :meth:`stop`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Whether it was started and not stopped."""
        return self._thread is not None

    @property
    def idle(self) -> bool:
        """Whether nothing is asked of the engine."""
        return self._inbox.empty() and not self._engine.has_work

    def start(self, deliver: Deliver) -> None:
        """Begin; the running event loop calls ``deliver`` with what each step produced."""
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(
            target=self._work, args=(loop, deliver), name="anabranch-engine", daemon=True
        )
        self._thread.start()

    async def stop(self) -> None:
        """End after the step under way."""
        if self._thread is None:
            return
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)
        self._thread = None

    def do(self, command: Callable[[], None]) -> None:
        """Carry out a command before the next step. Any thread may call it."""
        self._inbox.put(command)

    def wake(self) -> None:
        """Let it look whether there is work."""
        self.do(lambda: None)

    async def ask(self, work: Callable[[], Result]) -> Result:
        """What ``work()`` returns or raises before the next step."""
        outcome: Future[Result] = Future()

        def command() -> None:
            try:
                outcome.set_result(work())
            except BaseException as error:
                outcome.set_exception(error)

        self.do(command)
        return await asyncio.wrap_future(outcome)

    def _work(self, loop: asyncio.AbstractEventLoop, deliver: Deliver) -> None:
        while self._take_commands():
            try:
                outputs = self._engine.step()
            except Exception:  # a defect of ours must not take the server down
                logger.exception("a step failed; its requests are given up")
                outputs = self._engine.abort_all()
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(deliver, outputs)

    def _take_commands(self) -> bool:
        """Carry out what arrived; sleep while there is nothing to compute. False to stop."""
        while True:
            try:
                command = self._inbox.get(block=not self._engine.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()


def in_passing_thread(work: Callable[[], Result]) -> Result:
    """Do work in a thread of its own that is gone afterwards.

    OpenMP keeps worker threads for every thread that ever computed. Once they are more than the
    cores, idle ones sleep at once instead of waiting a moment for more, which made the engine's
    thread 1.6 times slower when another thread had loaded the model.
    """
    outcome: Future[Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    # A daemon, so that an interrupt need not wait for a long conversion.
    thread = threading.Thread(target=run, name="anabranch-load", daemon=True)
    thread.start()
    result = outcome.result()
    thread.join()
    return result
