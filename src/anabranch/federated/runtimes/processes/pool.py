"""Worker processes that outlive a run: started when there is work, gone when there is none."""

from __future__ import annotations

import logging
import multiprocessing
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from anabranch.closing import Closing
from anabranch.errors import ConfigurationError
from anabranch.federated.errors import FederationError
from anabranch.federated.messages import Reply, Task
from anabranch.federated.runtimes.processes.segments import Segments
from anabranch.federated.runtimes.processes.worker import Assigned, Done, Open, serve

logger = logging.getLogger(__name__)

PATIENCE_S = 5.0
"""How long a worker that was told to stop may take before it is killed."""
MOST_STILLBORN = 3


@dataclass(frozen=True)
class Errand:
    """A task on its way through a worker, and whom to tell what became of it."""

    run: int
    task: Task
    replied: Callable[[Reply], None]
    lost: Callable[[str], None]


class Pool(Closing):
    """``workers`` processes for any number of runs, one after the other.

    A worker is started, never forked, when it gets its first task, and exits after ``keep_alive``
    seconds without one (None: never). ``threads`` are torch's in each.

    Example::

        with Pool(2) as pool:
            for strategy in strategies:
                Federation(..., runtime=Processes(sites, model, pool)).run()
    """

    def __init__(
        self, workers: int = 1, *, keep_alive: float | None = None, threads: int = 1
    ) -> None:
        self.check(workers, keep_alive, threads)
        self.segments = Segments.owned()
        self.workers = [Worker(n, self.segments, keep_alive, threads) for n in range(workers)]

    @staticmethod
    def check(workers: int, keep_alive: float | None, threads: int) -> None:
        """Raise :class:`ConfigurationError` unless a pool of these can be made."""
        if workers < 1 or threads < 1:
            raise ConfigurationError(f"at least 1 worker and thread, not {workers} and {threads}")
        if keep_alive is not None and not keep_alive > 0:
            raise ConfigurationError(f"keep_alive is above 0 seconds, not {keep_alive}")

    def close(self) -> None:
        """Stop all workers, and kill those that are at work; nothing is left of them."""
        for worker in self.workers:
            worker.stop()
        self.segments.close()

    @property
    def pids(self) -> list[int]:
        """Of the workers that run now."""
        return [worker.pid for worker in self.workers if worker.pid is not None]

    @property
    def starts(self) -> int:
        """How often a process was started."""
        return sum(worker.starts for worker in self.workers)

    @property
    def cpu_seconds(self) -> float:
        """Processor time of all workers there ever were, until their last reply."""
        return sum(worker.cpu_seconds for worker in self.workers)


class Worker:
    """The coordinator's end of one worker, whichever process that is at the moment."""

    def __init__(
        self, number: int, segments: Segments, keep_alive: float | None, threads: int
    ) -> None:
        self.number = number
        self.starts = 0
        self._segments = segments
        self._keep_alive = keep_alive
        self._threads = threads
        self._lock = threading.RLock()
        self._errands: dict[tuple[int, int], Errand] = {}
        self._opened: Open | None = None
        self._process: SpawnProcess | None = None
        self._pipe: Connection | None = None
        self._listener: threading.Thread | None = None
        self._leaving = False
        """Whether the process was told to go for want of work."""
        self._stillborn = 0
        """Processes in a row that died before they finished a task."""
        self._cpu_before = self._cpu_now = 0.0

    @property
    def pid(self) -> int | None:
        """Of the process, if there is one."""
        process = self._process
        return process.pid if process is not None else None

    @property
    def cpu_seconds(self) -> float:
        """Processor time of all its processes, until the last reply of each."""
        return self._cpu_before + self._cpu_now

    def open(self, opened: Open) -> None:
        """A run begins; what is left of an earlier one is of no interest any more."""
        with self._lock:
            self._errands.clear()
            self._opened = opened
            self._send(opened)

    def do(self, errand: Errand, body: Path) -> None:
        """Send a task whose body lies in a segment, to a new process if there is none.

        Raises :class:`FederationError` if processes die again and again before they do anything.
        """
        if self._leaving and (listener := self._listener) is not None:
            listener.join()
        with self._lock:
            if self._stillborn >= MOST_STILLBORN:
                raise FederationError(
                    f"worker {self.number} died {self._stillborn} times in a row before it finished"
                    f" a task; see what it printed. A script needs if __name__ == '__main__', "
                    f"because workers import it"
                )
            self._errands[errand.run, errand.task.id] = errand
            if self._process is None:
                self._start()
            self._send(Assigned(errand.run, replace(errand.task, body=b""), body))

    @property
    def busy(self) -> bool:
        """Whether it has tasks."""
        return bool(self._errands)

    def forget(self) -> None:
        """Nobody waits for its tasks any more. A process that is at work is killed."""
        with self._lock:
            busy = self.busy
            self._errands.clear()
        if busy:
            self.stop()

    def stop(self) -> None:
        """End the process: by a word if it is idle, otherwise by force."""
        with self._lock:
            process, listener = self._process, self._listener
            if process is None:
                return
            if self.busy or not self._send(None):
                process.kill()
            self._errands.clear()
        assert listener is not None
        listener.join(PATIENCE_S)
        process.kill()
        listener.join()

    def _start(self) -> None:
        self.starts += 1
        self._leaving = False
        # Threads of OpenMP and torch do not survive a fork.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        part = self._segments.part(f"worker-{self.number}-{self.starts}")
        self._process = context.Process(
            target=serve,
            args=(theirs, part.folder, self._threads),
            name=f"anabranch-worker-{self.number}",
            daemon=True,
        )
        self._process.start()
        theirs.close()
        self._pipe = ours
        self._listener = threading.Thread(
            target=self._listen, args=(self._process, ours, part), daemon=True
        )
        self._listener.start()
        if self._opened is not None:
            self._send(self._opened)

    def _send(self, message: Open | Assigned | None) -> bool:
        if self._pipe is None:
            return False
        try:
            self._pipe.send(message)
        except OSError:
            return False  # it died; the listener tells of its tasks
        return True

    def _listen(self, process: SpawnProcess, pipe: Connection, part: Segments) -> None:
        """Pass replies on until the process is gone, then say what was lost with it."""
        while True:
            try:
                if not pipe.poll(self._keep_alive):
                    with self._lock:
                        if not self.busy:
                            self._leaving = self._send(None)
                    continue
                done: Done = pipe.recv()
            except (EOFError, OSError):
                break
            self._cpu_now = done.cpu
            self._stillborn = 0
            self._pass_on(done, part)
        process.join()
        with self._lock:
            self._cpu_before, self._cpu_now = self._cpu_before + self._cpu_now, 0.0
            self._process = self._pipe = self._listener = None
            lost, self._errands = self._errands, {}
            self._stillborn += bool(lost)
            pipe.close()
            part.close()
        for errand in lost.values():
            reason = (
                f"worker {self.number} died (exit code {process.exitcode}) with task "
                f"{errand.task.id} of {errand.task.client}"
            )
            logger.warning("%s", reason)
            errand.lost(reason)

    def _pass_on(self, done: Done, part: Segments) -> None:
        body = part.read(done.body) if done.body else b""
        if done.body:
            part.remove(done.body)
        with self._lock:
            errand = self._errands.get((done.run, done.task))
        if errand is None:
            return  # of a run that is over
        if done.reply is None:
            errand.lost(f"{errand.task.client}: {done.problem}")
        else:
            errand.replied(replace(done.reply, body=body))
        # Only now: a runtime that asks in between whether anything is under way must hear yes.
        with self._lock:
            self._errands.pop((done.run, done.task), None)
