"""Clients in processes of this machine: real time, real parallelism, one copy of each message."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from anabranch.errors import ConfigurationError
from anabranch.federated.messages import Reply, Task
from anabranch.federated.node import Agreement
from anabranch.federated.runtimes.base import Arrived, Lost
from anabranch.federated.runtimes.processes.pool import Errand, Pool, Worker
from anabranch.federated.runtimes.processes.segments import Segments
from anabranch.federated.runtimes.processes.worker import Open
from anabranch.federated.runtimes.simulation import Site
from anabranch.federated.runtimes.wall_clock import WallClock, by_name

_runs = itertools.count(1)


class Processes(WallClock):
    """Runs the sites in worker processes, each of which serves several.

    ``model`` is a module, which workers share until one of them writes to it, or a function without
    arguments that makes one in each worker; it, the sites' data and the method's client must be
    picklable. ``workers`` is how many processes, or a :class:`Pool` that is there already and is
    left open. Bodies of messages lie in shared memory, one that many clients get only once; the
    pipes carry keys.

    A worker that dies loses its tasks and nothing else: it is started again when a task comes, with
    what its sites stored, and so is one that exited after ``keep_alive`` seconds without work. A
    run without a store keeps its sites' state in a temporary folder for that.

    Sites' ``profile`` is that of simulated devices and means nothing here.

    Example::

        runtime = Processes(sites, model, workers=2)
        Federation(server, client, Sync(20), runtime).run()
    """

    def __init__(
        self,
        sites: Sequence[Site],
        model: nn.Module | Callable[[], Any] | None = None,
        workers: int | Pool = 2,
        *,
        keep_alive: float | None = None,
        threads: int = 1,
    ) -> None:
        self.sites = by_name(sites)
        if isinstance(workers, int):
            Pool.check(workers, keep_alive, threads)
        elif keep_alive is not None or threads != 1:
            raise ConfigurationError("keep_alive and threads are those of the pool that you gave")
        self.model = model
        self.workers = workers
        self.keep_alive, self.threads = keep_alive, threads
        self.pool: Pool | None = None

    def open(self, agreement: Agreement, resumed: float | None = None) -> None:
        """Bring agreement, model and data to where workers find them. Starts none yet."""
        super().open(agreement, resumed)
        self._closing = contextlib.ExitStack()
        if isinstance(self.workers, Pool):
            self.pool = self.workers
        else:
            self.pool = Pool(self.workers, keep_alive=self.keep_alive, threads=self.threads)
            self._closing.callback(self.pool.close)
        self._run = next(_runs)
        self._luggage = self.pool.segments.part(f"run-{self._run}")
        self._closing.callback(self._luggage.close)
        if agreement.folder is None:
            # Nothing that has to outlive this process: memory is enough, and needs no disk's sync.
            agreement = replace(agreement, folder=self._luggage.part("sites").folder)
        self.stored = agreement.folder
        self._bodies = Bodies(self._luggage)
        agreed, model = self._luggage.path("agreement"), self._luggage.path("model")
        with _picklable(f"the client {type(agreement.client).__name__}, or a codec,"):
            agreed.write_bytes(pickle.dumps(agreement))
        with _picklable("the model"):
            torch.save(self.model, model)
        crews = [list(self.sites)[n :: len(self.pool.workers)] for n in range(self._count)]
        self._of: dict[str, Worker] = {}
        for worker, crew in zip(self.pool.workers, crews, strict=True):
            data = self._luggage.path(f"data-{worker.number}")
            with _picklable(f"the data of {', '.join(crew[:3])}{' ...' if crew[3:] else ''}"):
                torch.save({name: self.sites[name].data for name in crew}, data)
            worker.open(Open(self._run, agreed, model, data))
            self._of |= dict.fromkeys(crew, worker)

    @property
    def _count(self) -> int:
        return self.workers if isinstance(self.workers, int) else len(self.workers.workers)

    def clients(self) -> Mapping[str, int]:
        """All sites."""
        return {site.name: site.declared for site in self.sites.values()}

    def submit(self, task: Task) -> None:
        """Hand it to the site's worker."""
        body = self._bodies.keep(task.body)

        def replied(reply: Reply) -> None:
            self._bodies.release(body)
            self.report(Arrived(reply))

        def lost(reason: str) -> None:
            self._bodies.release(body)
            self.report(Lost(task.id, reason))

        self._of[task.client].do(Errand(self._run, task, replied, lost), self._luggage.path(body))

    def recall(self, task: Task) -> None:
        """The site gives the reply that it stored, or works as it would have."""
        if task.client in self.sites:
            self.submit(task)

    def alive(self) -> bool:
        """Whether a worker has tasks, or something arrived meanwhile."""
        assert self.pool is not None
        return any(worker.busy for worker in self.pool.workers) or not self._inbox.empty()

    def close(self) -> None:
        """End the workers, or let a pool of others forget this run. Nothing stays in memory."""
        if self.pool is None:
            return
        for worker in self.pool.workers:
            worker.forget()
        self._closing.close()
        self.pool = None


class Bodies:
    """Bodies of tasks under way in shared memory; what many clients get lies there once."""

    def __init__(self, segments: Segments) -> None:
        self._segments = segments
        self._lock = threading.Lock()
        self._newest: tuple[bytes, str] | None = None
        self._users: Counter[str] = Counter()

    def keep(self, body: bytes) -> str:
        """Put a body there, unless it is the one before; returns its key for one more user."""
        with self._lock:
            # The coordinator hands the very same object to all clients of a version.
            if self._newest is None or self._newest[0] is not body:
                before, self._newest = self._newest, (body, self._segments.put(body))
                if before is not None and not self._users[before[1]]:
                    self._segments.remove(before[1])
            key = self._newest[1]
            self._users[key] += 1
            return key

    def release(self, key: str) -> None:
        """One user less; the newest body stays for the next."""
        with self._lock:
            self._users[key] -= 1
            if not self._users[key] and (self._newest is None or self._newest[1] != key):
                del self._users[key]
                self._segments.remove(key)


@contextlib.contextmanager
def _picklable(what: str) -> Any:
    try:
        yield
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"{what} cannot be sent to another process: {error}; use classes and functions of a "
            f"module instead of local ones and lambdas, or Simulation"
        ) from error
