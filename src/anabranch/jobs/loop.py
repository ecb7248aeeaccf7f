"""The thread that runs jobs of a store: it collects what happened, writes, obeys and claims.

It alone writes about the jobs that it runs. Requests from clients reach it through the store, so
that it is the same whether they came to this process or to another one on the same store.

What happens when something dies: a job of a process that was killed is claimed again and goes on
after its last checkpoint; a store that cannot be written to is tried again, while the work goes
on; a lease that was lost (the machine slept for longer than ``lease_seconds``) means that another
process has the job, so it is given up here.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Collection

from sqlalchemy.exc import SQLAlchemyError

from anabranch.jobs.store import JobStore

RETRY_SECONDS = 1.0


class JobLoop(ABC):
    """Runs the jobs of some ``kinds`` until it is stopped.

    ``poll_seconds`` is how long a request that came to another process may go unnoticed.
    """

    def __init__(
        self,
        store: JobStore,
        kinds: Collection[str],
        logger: logging.Logger,
        poll_seconds: float = 1.0,
    ) -> None:
        self._store = store
        self._kinds = kinds
        self._logger = logger
        self._poll_seconds = min(poll_seconds, store.lease_seconds / 3)
        self._closing = self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, with what is queued and what a killed process has left."""
        self._thread = threading.Thread(target=self._work, name="anabranch-jobs", daemon=True)
        self._thread.start()

    @abstractmethod
    def poke(self) -> None:
        """Look at the store now: something was asked."""

    def close(self) -> None:
        """Start no more jobs."""
        self._closing = True

    def stop(self) -> None:
        """Write what is still to be written, and give the leases back."""
        self._stopping = self._closing = True
        if self._thread is not None:
            self.poke()
            self._thread.join()
            self._thread = None

    @abstractmethod
    def _collect(self, timeout: float) -> None:
        """Wait for something to happen, or until :meth:`poke` is called; write nothing yet."""

    @abstractmethod
    def _write(self) -> None:
        """Put what was collected into the store. What could not be written is kept."""

    @abstractmethod
    def _obey(self) -> None:
        """Carry out what clients asked of the jobs that are held here."""

    @abstractmethod
    def _fill(self) -> None:
        """Start queued jobs while there is room, unless this is closing."""

    def _interrupt(self) -> None:
        """The loop ends now: leave what runs so that it can go on elsewhere."""

    def _work(self) -> None:
        beaten = float("-inf")
        while True:
            stopping = self._stopping
            self._collect(self._poll_seconds)
            try:
                if stopping:
                    self._interrupt()
                self._write()
                if stopping:
                    self._store.release(self._kinds)
                    return
                if time.monotonic() - beaten >= self._store.lease_seconds / 3:
                    self._store.beat()
                    beaten = time.monotonic()
                self._obey()
                self._fill()
            except SQLAlchemyError:
                self._logger.exception("the job store does not answer; trying again")
                if stopping:
                    return  # the leases expire by themselves
                time.sleep(RETRY_SECONDS)
            except Exception:  # a defect of ours must not end the jobs of all clients
                self._logger.exception("running jobs failed; going on")
                time.sleep(RETRY_SECONDS)
