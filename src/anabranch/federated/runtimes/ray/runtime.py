"""Clients' turns on a Ray cluster, in real time."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from torch import nn

from anabranch.errors import ConfigurationError
from anabranch.federated.errors import FederationError
from anabranch.federated.messages import Task
from anabranch.federated.node import Agreement
from anabranch.federated.runtimes.base import Arrived, Lost
from anabranch.federated.runtimes.ray.worker import SiteWorker
from anabranch.federated.runtimes.simulation import Site
from anabranch.federated.runtimes.wall_clock import WallClock, by_name
from anabranch.federated.store import ClientStore
from anabranch.files import replacing, sync

logger = logging.getLogger(__name__)

MOST_RERUNS = 3
"""How often a turn whose actor died is run again, before its task is lost."""
MOST_BARREN = 3
"""Actors that were given up before any task was done, after which the run ends."""


@dataclass(eq=False)
class _Desk:
    """The driver's side of a site. ``stored`` is what the site stored last, or where it is."""

    worker: Any
    data: Any
    stored: Any
    keep: ClientStore | None
    waiting: deque[tuple[Task, Any]] = field(default_factory=deque)
    busy: bool = False


@dataclass(frozen=True)
class _Turn:
    """A task on its way: who does it, and where reply and what is stored with it will be."""

    desk: _Desk
    worker: Any
    task: Task
    reply: Future[Any]
    stored: Any


class Ray(WallClock):
    """Runs the sites in ``workers`` actors of a Ray cluster, each of which serves several.

    The cluster is the one that this process is connected to, or else that at ``address`` or at
    ``RAY_ADDRESS``, or else one that is started on this machine for the run. Every node of it needs
    the same Anabranch, torch and code of the method. Without ``workers`` there are as many as the
    cluster has cores. ``model`` is a module, or a function without arguments that makes one in each
    actor.

    An actor that is killed, or whose machine is gone, is started elsewhere, and its turns are run
    again from what their sites had stored: the result is the same, bit for bit. After three more
    deaths the task is lost. With a barrier, parameters and payload bytes are those of simulation,
    as long as an actor uses as many ``threads`` as simulation did. Time is real. What a site stores
    lies in the cluster's memory; with a store, also in the coordinator's folder before its reply
    counts.

    Example::

        Federation(server, client, Sync(20), Ray(sites, model, workers=64)).run()
    """

    def __init__(
        self,
        sites: Sequence[Site],
        model: nn.Module | Callable[[], Any] | None = None,
        workers: int | None = None,
        *,
        threads: int = 1,
        address: str | None = None,
    ) -> None:
        if threads < 1 or (workers is not None and workers < 1):
            raise ConfigurationError(f"at least 1 worker and thread, not {workers} and {threads}")
        self.sites = by_name(sites)
        self.model = model
        self.workers, self.threads, self.address = workers, threads, address
        self.actors: list[Any] = []
        self._desks: dict[str, _Desk] = {}
        self._started = False

    def open(self, agreement: Agreement, resumed: float | None = None) -> None:
        """Connect, and bring client, model and data into the cluster's memory."""
        super().open(agreement, resumed)
        self._connect()
        cores = int(ray.cluster_resources().get("CPU", 1))
        count = min(self.workers or max(1, cores // self.threads), len(self.sites) or 1)
        if count * self.threads > cores:
            raise ConfigurationError(
                f"{count} workers of {self.threads} threads need as many cores; the cluster has "
                f"{cores}"
            )
        actor = ray.remote(SiteWorker).options(
            num_cpus=self.threads, max_restarts=MOST_RERUNS, max_task_retries=MOST_RERUNS
        )
        agreed, model = ray.put(replace(agreement, folder=None)), ray.put(self.model)
        self._hire = lambda: actor.remote(agreed, model, self.threads)
        self.actors = [self._hire() for _ in range(count)]
        self._desks = {}
        for number, site in enumerate(self.sites.values()):
            keep = ClientStore(agreement.folder, site.name) if agreement.folder else None
            stored = keep.path.read_bytes() if keep and keep.path.exists() else None
            worker = self.actors[number % count]
            self._desks[site.name] = _Desk(worker, ray.put(site.data), stored, keep)
        self._lock = threading.RLock()
        self._newest: tuple[bytes, Any] = b"", None
        self._barren = 0
        self._done: queue.SimpleQueue[_Turn | None] = queue.SimpleQueue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def clients(self) -> Mapping[str, int]:
        """All sites."""
        return {site.name: site.declared for site in self.sites.values()}

    def submit(self, task: Task) -> None:
        """Have it done after the site's earlier tasks.

        Raises :class:`FederationError` if actors die again and again before they do anything.
        """
        if self._barren >= MOST_BARREN:
            raise FederationError(
                f"{self._barren} actors in a row died before they finished a task; see what Ray "
                f"printed"
            )
        with self._lock:
            # The coordinator hands the very same object to all clients of a version.
            if self._newest[0] is not task.body:
                self._newest = task.body, ray.put(task.body)
            desk = self._desks[task.client]
            desk.waiting.append((replace(task, body=b""), self._newest[1]))
            self._begin(desk)

    def recall(self, task: Task) -> None:
        """The site gives the reply that it stored, or works as it would have."""
        if task.client in self.sites:
            self.submit(task)

    def alive(self) -> bool:
        """Whether a site has tasks, or something arrived meanwhile."""
        busy = any(desk.busy or desk.waiting for desk in self._desks.values())
        return busy or not self._inbox.empty()

    def close(self) -> None:
        """End the actors, and the cluster if it was started for this run."""
        if self.actors:
            self._done.put(None)
            self._listener.join()
            for actor in self.actors:
                ray.kill(actor)
            self.actors, self._desks = [], {}
        if self._started:
            ray.shutdown()
            self._started = False

    def _connect(self) -> None:
        if ray.is_initialized():
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
        address = self.address or os.environ.get("RAY_ADDRESS")
        options: dict[str, Any] = {"address": address}
        if address is None:
            cores = (self.workers or 0) * self.threads or len(os.sched_getaffinity(0))
            options = {"address": "local", "num_cpus": cores, "include_dashboard": False}
        ray.init(logging_level=logging.WARNING, **options)
        self._started = True

    def _begin(self, desk: _Desk) -> None:
        """The site's next turn, if it has none: each needs what the one before stored."""
        if desk.busy or not desk.waiting:
            return
        desk.busy = True
        task, body = desk.waiting.popleft()
        call = desk.worker.turn.options(num_returns=2)
        reply, stored = call.remote(task, body, [desk.data], desk.stored)
        turn = _Turn(desk, desk.worker, task, reply.future(), stored)
        # In a thread of Ray's, which must not wait for anything.
        turn.reply.add_done_callback(lambda _: self._done.put(turn))

    def _listen(self) -> None:
        while (turn := self._done.get()) is not None:
            desk, task = turn.desk, turn.task
            try:
                reply = turn.reply.result()
                if desk.keep is not None:
                    with replacing(desk.keep.path) as draft:
                        draft.write_bytes(ray.get(turn.stored))
                    sync(desk.keep.path.parent)
            except Exception as error:
                if isinstance(error, ray.exceptions.RayActorError) and turn.worker is desk.worker:
                    self._replace(turn.worker)
                reason = f"{task.client}: {str(error).strip().splitlines()[-1]}"
                logger.warning("task %d of %s", task.id, reason)
                self.report(Lost(task.id, reason))
            else:
                self._barren = 0
                desk.stored = turn.stored
                self.report(Arrived(reply))
            with self._lock:
                desk.busy = False
                self._begin(desk)

    def _replace(self, gone: Any) -> None:
        """An actor that Ray has given up; the next tasks of its sites go to another one."""
        self._barren += 1
        self.actors[self.actors.index(gone)] = hired = self._hire()
        for desk in self._desks.values():
            if desk.worker is gone:
                desk.worker = hired
