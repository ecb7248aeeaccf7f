"""The federation: one loop for every way of learning together.

It takes what happens from a runtime, writes it down, lets the coordinator decide, and does what it
decided::

    while not stopped:
        happened = runtime.next_input()       # a reply, a lost task, a timer, a join or a leave
        store.append(happened)                # before anything follows from it
        coordinator.handle(happened)          # server and schedule decide
        submit what is in the outbox

A killed run is resumed by letting the coordinator handle the same inputs again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from anabranch.federated import runtimes
from anabranch.federated.client import Client
from anabranch.federated.codecs import Codec
from anabranch.federated.coordinator import Coordinator, Watch
from anabranch.federated.errors import FederationError, SnapshotMismatch, Stalled, StoreError
from anabranch.federated.messages import Task
from anabranch.federated.node import Agreement
from anabranch.federated.reading import NotFinitePolicy
from anabranch.federated.result import RunResult
from anabranch.federated.runtimes import Runtime, Timed
from anabranch.federated.scheduling import Schedule
from anabranch.federated.server import Server
from anabranch.federated.state import RunState
from anabranch.federated.store import RunStore
from anabranch.federated.topologies import Topology
from anabranch.federated.trees import plain
from anabranch.training.state import differences


class Federation:
    """A server, clients, a schedule and a runtime, working together.

    ``codec`` shrinks what clients send, ``down`` what they are sent. ``store`` is a folder in which
    the run survives its process. ``eager`` folds updates as they come instead of holding them until
    the commit: less memory, but sums depend on the order of arrival by rounding.

    ``not_finite`` says what becomes of a reply with NaN or infinity: ``reject`` it (counted),
    ``zero`` those values (counted), or ``raise``. After ``patience`` commits in a row that had
    nothing to commit, the last error is raised. ``watch(coordinator)`` is called after each commit
    and may return figures. At version ``until`` the run pauses: its result so far is returned, and
    ``resume()`` of a federation with another ``until``, or none, goes on.

    Example::

        federation = Federation(server, client, Sync(rounds=20), Simulation(sites, model=network))
        result = federation.run()
    """

    def __init__(
        self,
        server: Server,
        client: Client,
        schedule: Schedule,
        runtime: Runtime,
        *,
        codec: Codec | None = None,
        down: Codec | None = None,
        topology: Topology | None = None,
        store: str | Path | RunStore | None = None,
        seed: int = 0,
        eager: bool = False,
        not_finite: NotFinitePolicy = "reject",
        patience: int = 3,
        watch: Watch | None = None,
        until: int | None = None,
    ) -> None:
        self.coordinator = Coordinator(
            server,
            schedule,
            codec=codec,
            down=down,
            topology=topology,
            seed=seed,
            eager=eager,
            not_finite=not_finite,
            patience=patience,
            watch=watch,
        )
        self.server = server
        self.client = client
        self.runtime = runtime
        self.store = RunStore(store) if isinstance(store, str | Path) else store
        self.until = until
        self._stored_version = -1
        self._used = False

    def run(self) -> RunResult:
        """Run from the beginning to the schedule's stop. A stored run is never overwritten."""
        with self._session():
            if self.store and self.store.used:
                raise StoreError(
                    f"{self.store.folder} holds a run already; resume() goes on with it, or choose "
                    f"another folder"
                )
            self.coordinator.set_up(self.runtime.clients())
            self.runtime.open(self._agreement())
            self._save()
            self.coordinator.start()
            self._send_out()
            return self._loop()

    def resume(self) -> RunResult:
        """Go on with the stored run as if it had never been interrupted."""
        if self.store is None:
            raise StoreError("this federation has no store to resume from")
        with self._session():
            stored, journal = self.store.load()
            self._load(stored)
            if not self.coordinator.state.inputs:
                self.coordinator.start()
            for tree in journal:
                self.coordinator.handle(Timed.from_tree(tree))
            self._reconnect()
            return self._loop()

    def _loop(self) -> RunResult:
        state = self.coordinator.state
        while state.stopped is None:
            if state.version != self._stored_version and self.server.quiet:
                self._save()
            if self.until is not None and state.version >= self.until:
                return replace(self.coordinator.result(), clock=self.runtime.clock)
            happened = self.runtime.next_input()
            if happened is None:
                raise Stalled(
                    f"nothing is under way at version {state.version} and {state.now:g} s, and "
                    f"{type(self.coordinator.schedule).__name__} waits; clients: "
                    f"{', '.join(self.coordinator.clients) or 'none'}"
                )
            self._take(happened)
            self._send_out()
        self._save()
        self.runtime.finish(state.stopped)
        return replace(self.coordinator.result(), clock=self.runtime.clock)

    def _take(self, happened: Timed) -> None:
        if self.store:
            self.store.append(happened.to_tree())
        try:
            self.coordinator.handle(happened)
        except BaseException:
            if self.store:
                # Otherwise it would end every resumed run, too, whatever was put right meanwhile.
                self.store.retract()
            raise

    def _send_out(self) -> None:
        for item in self.coordinator.outbox:
            if isinstance(item, Task):
                self.runtime.submit(item)
            else:
                number, timer = item
                self.runtime.set_timer(timer.at, number)
        self.coordinator.outbox.clear()

    def _reconnect(self) -> None:
        """Tell the schedule who came or went meanwhile, and the runtime what is under way."""
        state = self.coordinator.state
        self.runtime.open(self._agreement(), resumed=state.now)
        there = dict(self.runtime.clients())
        if state.stopped is not None:
            return  # only to tell those who have not heard of the end
        for client in [name for name in self.coordinator.clients if name not in there]:
            self._take(Timed(state.now, runtimes.ClientLeft(client)))
        for client in sorted(there.keys() - state.members.keys()):
            self._take(Timed(state.now, runtimes.ClientJoined(client, there[client])))
        self.coordinator.outbox.clear()  # whatever of it is not over yet is in the state, too
        for _, task in state.given_up.values():
            self.runtime.recall(task)
        for task in state.in_flight.values():
            self.runtime.submit(task)
        for number, timer in state.timers.items():
            self.runtime.set_timer(timer.at, number)

    @contextmanager
    def _session(self) -> Iterator[None]:
        """Store and runtime are let go of, whatever happens."""
        if self._used:
            raise FederationError("this federation ran already; make a new one")
        self._used = True
        if self.store:
            self.store.open()
        try:
            yield
        finally:
            self.runtime.close()
            if self.store:
                self.store.close()

    def _agreement(self) -> Agreement:
        made = self.coordinator
        folder = self.store.clients if self.store else None
        return Agreement(self.client, made.seed, made.wire, made.codec, made.down, folder)

    def _save(self) -> None:
        made = self.coordinator
        self._stored_version = made.state.version
        if self.store is None:
            return
        tree: dict[str, Any] = {
            "identity": made.identity(),
            "run": made.state.to_tree(),
            "server": made.server.state_dict(),
            "schedule": made.schedule.state_dict(),
        }
        self.store.save(made.state.inputs, tree)

    def _load(self, tree: dict[str, Any]) -> None:
        made = self.coordinator
        made.state = state = RunState.from_tree(tree["run"])
        made.set_up(state.members)  # the server's view of the members follows this state
        if changed := differences(tree["identity"], plain(made.identity())):
            where = self.store.folder if self.store else ""
            raise SnapshotMismatch(f"the run in {where} is another one: {'; '.join(changed)}")
        made.server.load_state_dict(tree["server"])
        made.schedule.load_state_dict(tree["schedule"])
        self._stored_version = state.version
