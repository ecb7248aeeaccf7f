"""Starts and stops the aggregators of one node, and gives them what arrives.

A :class:`Slot` gets a process when its first input arrives, a warm one if there is one (so a leaf
that is done becomes the middle), and gives it back when its sum is sealed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection, wait

from anabranch.errors import ConfigurationError
from anabranch.federated.aggregation.tree import aggregator
from anabranch.federated.aggregation.tree.slots import Counters, Input, Process, Slot
from anabranch.federated.aggregation.tree.store import SharedStore
from anabranch.federated.errors import AggregationError

logger = logging.getLogger(__name__)

MOST_AT_ONCE = 16
"""Inputs that an aggregator adds in one pass over its sum."""
MOST_RESTARTS = 3
"""Deaths of aggregators in one slot, after which the round is given up."""


class Agent:
    """The aggregators of one node.

    There are at most ``most`` at a time; a slot that finds none free waits for one. At least 4,
    since a leaf, a middle and a top may each keep one while they wait for inputs. Idle ones stay
    for ``keep_alive`` seconds. ``lock`` may be shared by the agents of one process; callbacks of
    slots are called under it.
    """

    def __init__(
        self,
        store: SharedStore,
        *,
        keep_alive: float = 30.0,
        most: int = 4,
        lock: threading.RLock | None = None,
    ) -> None:
        if not keep_alive >= 0:
            raise ConfigurationError(f"keep_alive is at least 0 seconds, not {keep_alive}")
        if most < 4:
            raise ConfigurationError(f"a node needs room for 4 aggregators, not {most}")
        self.store = store
        self.keep_alive, self.most = keep_alive, most
        self.lock = lock or threading.RLock()
        self.counters = Counters()
        self._cpu_of_the_gone = 0.0
        self._processes: list[Process] = []
        self._slots: list[Slot] = []
        self._wake, self._waker = socket.socketpair()
        self._closing = False
        store.pressed = self._relieve
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    @property
    def cpu_seconds(self) -> float:
        """Processor time of all aggregators there ever were, until the last word of each."""
        with self.lock:
            return self._cpu_of_the_gone + sum(process.cpu for process in self._processes)

    @property
    def pids(self) -> list[int]:
        """Of the aggregators that run now."""
        with self.lock:
            return [process.running.pid for process in self._processes]

    def open(self, slot: Slot) -> None:
        """Wait for a slot's inputs."""
        with self.lock:
            self._slots.append(slot)

    def deliver(self, slot: Slot, given: Input) -> None:
        """An input arrived; from now on its key belongs to the slot."""
        with self.lock:
            slot.inputs.append(given)
            slot.arrived += 1
            self.counters.key_bytes += len(given.key)
            self._go_on(slot)

    def expect(self, slot: Slot, count: int) -> None:
        """Wait for so many inputs instead, not fewer than have arrived."""
        with self.lock:
            if slot.closed:
                return
            slot.expected = count
            if count == 0:
                self._close(slot)
                slot.done(None)
            else:
                self._go_on(slot)

    def drop(self, slot: Slot) -> None:
        """Forget a slot and free what it holds."""
        with self.lock:
            if not slot.closed:
                if slot.process is not None:
                    # In the middle of a sum that nobody wants: no other slot shall get it.
                    slot.process.running.kill()
                    slot.process = None
                self._close(slot)

    def close(self) -> None:
        """End all aggregators."""
        with self.lock:
            for slot in list(self._slots):
                self.drop(slot)
            for process in self._processes:
                process.running.kill()
            self._closing = True
        self._waker.send(b"x")
        self._thread.join()
        for process in list(self._processes):
            self._bury(process)
        self._wake.close()
        self._waker.close()

    # What a slot's process is told

    def _go_on(self, slot: Slot) -> None:
        if slot.closed or not slot.inputs or not (slot.eager or slot.complete):
            return
        if slot.process is None and not self._man(slot):
            return
        # What comes while it is busy piles up, and is added in one pass.
        if waiting := slot.inputs[slot.sent :][:MOST_AT_ONCE] if slot.sent == slot.added else []:
            slot.sent += len(waiting)
            self._tell(slot, "fold", [self._place(given) for given in waiting])
        added = slot.added == len(slot.inputs) and slot.copying is None
        if slot.complete and added and not slot.sealing:
            slot.sealing = True
            self._tell(slot, "seal")

    def _man(self, slot: Slot) -> bool:
        """Give a slot a process: a warm one, or a new one. False if it must wait for one."""
        idle = [process for process in self._processes if process.slot is None]
        if idle:
            process = max(idle, key=lambda each: each.idle_since)
            self.counters.promotions += 1
        elif len(self._processes) < self.most:
            process = self._start()
        else:
            return False
        slot.process, process.slot = process, slot
        slot.sent, slot.added, slot.sealing = 0, 0, False
        elements, kind = _shape(slot)
        slot.draft = self.store.draft(elements * aggregator.TYPES[kind])
        self._tell(slot, "begin", str(self.store.path(slot.draft)), elements, kind)
        return True

    def _start(self) -> Process:
        ours, theirs = socket.socketpair()
        # As a file, so that it need not import this package; -P: nor what lies beside the file.
        command = [sys.executable, "-P", aggregator.__file__, str(theirs.fileno())]
        running = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        process = Process(running, Connection(ours.detach()))
        self._processes.append(process)
        self.counters.starts += 1
        self._waker.send(b"x")
        return process

    def _place(self, given: Input) -> tuple[str, aggregator.Runs, float, bool]:
        suspect = given.client is not None
        return str(self.store.path(given.key)), given.runs, given.factor, suspect

    def _tell(self, slot: Slot, *message: object) -> None:
        assert slot.process is not None
        with contextlib.suppress(OSError):  # it died; the thread that listens will see
            slot.process.pipe.send(message)

    # What it answers

    def _listen(self) -> None:
        while True:
            with self.lock:
                if self._closing:
                    return
                pipes = {process.pipe: process for process in self._processes}
                idle = any(process.slot is None for process in self._processes) or self.store.spare
            ready = wait([*pipes, self._wake], timeout=max(self.keep_alive, 0.05) if idle else None)
            with self.lock:
                if self._closing:
                    return
                for pipe in ready:
                    if pipe is self._wake:
                        self._wake.recv(4096)
                    else:
                        self._hear(pipes[pipe])  # type: ignore[index]
                for slot in [slot for slot in self._slots if slot.process is None]:
                    self._go_on(slot)
                self._dismiss()

    def _hear(self, process: Process) -> None:
        try:
            what, *details = process.pipe.recv()
        except (EOFError, OSError):
            self._on_death(process)
            return
        process.cpu = details[-1]
        slot = process.slot
        if slot is None:
            return
        if what == "folded":
            count, seconds, _ = details
            slot.added += count
            self.counters.added += count
            self.counters.seconds += seconds
            self._go_on(slot)
        elif what == "spoiled":
            self._on_spoiled(slot, details[0])
        elif what == "copied":
            self._on_copy(slot)
        elif what == "sealed":
            try:
                self._on_sum(slot)
            except Exception as error:  # this thread serves other slots, too
                slot.failed(error)

    def _on_sum(self, slot: Slot) -> None:
        assert slot.draft is not None
        self.store.adopt(slot.draft)
        made, slot.draft = self._sum_of(slot.draft, slot), None
        self._close(slot)
        slot.done(made)

    def _on_spoiled(self, slot: Slot, bad: Mapping[int, int]) -> None:
        """Some of the inputs that were added last are not finite; the others are added again."""
        assert slot.process is not None
        slot.process.running.kill()  # with its sum; what it was told meanwhile is void, too
        self._leave(slot, slot.process)
        for number, count in sorted(bad.items(), reverse=True):
            given = slot.inputs.pop(slot.added + number)
            self.store.release(given.key)
            slot.arrived -= 1
            slot.expected -= 1
            slot.refused(given, count)
        self.expect(slot, slot.expected)

    def _on_copy(self, slot: Slot) -> None:
        assert slot.copying is not None
        (key, held), slot.copying = slot.copying, None
        self.store.adopt(key)
        before, after = slot.inputs[:held], slot.inputs[held:]
        # The process holds them already; only one that takes its place would read the copy.
        slot.inputs = [self._sum_of(key, slot, held), *after]
        slot.sent -= held - 1
        slot.added -= held - 1
        for given in before:
            self.store.release(given.key)
        self.counters.checkpoints += 1
        self._go_on(slot)

    @staticmethod
    def _sum_of(key: bytes, slot: Slot, held: int | None = None) -> Input:
        weight = sum(given.weight for given in slot.inputs[:held])
        updates = sum(given.updates for given in slot.inputs[:held])
        return Input(key, slot.runs, 1.0, weight, updates)

    def _on_death(self, process: Process) -> None:
        slot = process.slot
        if slot is None or slot.closed:
            self._bury(process)
            return
        self._leave(slot, process)
        slot.deaths += 1
        reason = f"the aggregator of {slot.name} died (exit code {process.running.returncode})"
        if slot.deaths > MOST_RESTARTS:
            self._close(slot)
            slot.failed(AggregationError(f"{reason}, for the {slot.deaths}th time in this round"))
            return
        logger.warning("%s; another one begins with its %d inputs", reason, len(slot.inputs))
        self.counters.restarts += 1
        self._go_on(slot)

    def _leave(self, slot: Slot, process: Process) -> None:
        """A slot has lost its process, and what that had added up counts for nothing."""
        self._bury(process)
        self._forget_draft(slot)
        slot.process = None

    def _close(self, slot: Slot) -> None:
        """A slot is over: its inputs are freed, its process is free."""
        slot.closed = True
        self._slots.remove(slot)
        for given in slot.inputs:
            self.store.release(given.key)
        slot.inputs = []
        self._forget_draft(slot)
        if slot.process is not None:
            slot.process.slot, slot.process.idle_since = None, time.monotonic()
            slot.process = None
        self._waker.send(b"x")  # there may be an idle process to watch

    def _forget_draft(self, slot: Slot) -> None:
        for key in (slot.draft, slot.copying and slot.copying[0]):
            if key is not None:
                self.store.discard(key)
        slot.draft = slot.copying = None

    def _relieve(self) -> None:
        """The store is full: the sum so far replaces the updates in it that are added already."""
        with self.lock:
            waiting = [
                slot
                for slot in self._slots
                if slot.process is not None and slot.copying is None and not slot.complete
            ]
            slot = max(waiting, key=lambda slot: slot.added, default=None)
            if slot is None:
                return
            size = sum(self.store.path(g.key).stat().st_size for g in slot.inputs[: slot.added])
            elements, kind = _shape(slot)
            own = elements * aggregator.TYPES[kind]
            if size <= own:
                return  # nothing would be gained
            key = self.store.draft(own)
            # It answers in order, so that what it was told before is in the copy, too.
            slot.copying = key, slot.sent
            self._tell(slot, "copy", str(self.store.path(key)))

    def _dismiss(self) -> None:
        """Let go of aggregators, and of memory, that were idle for long."""
        now = time.monotonic()
        self.store.trim(now - self.keep_alive)
        for process in list(self._processes):
            if process.slot is None and now - process.idle_since >= self.keep_alive:
                with contextlib.suppress(OSError):
                    process.pipe.send(("quit",))
                self._bury(process)

    def _bury(self, process: Process) -> None:
        """Wait for a process that is about to end, and count what it used."""
        self._processes.remove(process)
        process.pipe.close()
        _, status, used = os.wait4(process.running.pid, 0)
        process.running.returncode = os.waitstatus_to_exitcode(status)
        self._cpu_of_the_gone += used.ru_utime + used.ru_stime


def _shape(slot: Slot) -> tuple[int, str]:
    [(kind, elements)] = slot.runs
    return elements, kind
