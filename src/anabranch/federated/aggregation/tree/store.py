"""Updates in shared memory, passed from hand to hand as 16-byte keys."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from anabranch.closing import Closing
from anabranch.errors import ConfigurationError
from anabranch.federated.errors import FederationError, StoreFull
from anabranch.federated.runtimes.processes.segments import Segments, new_key, write_all

PRESS_EVERY_S = 0.05
"""How often who waits for room asks for it."""


@dataclass
class _Object:
    segment: str
    size: int
    owner: str
    users: int = 1
    sealed: bool = False


@dataclass(frozen=True)
class _Spare:
    """A segment that nobody uses, whose pages need neither be found nor zeroed again."""

    size: int
    owner: str
    since: float


class SharedStore(Closing):
    """Objects of one node; whoever has a key finds the object without a copy.

    An object is written once, then *sealed*: nobody changes it any more. When the last of its users
    has released it, its memory waits for an object of the same size, if possible of the same
    ``owner``, who may have it mapped still; :meth:`trim` gives it back. ``capacity`` are bytes,
    memory that waits included; who wants to put more waits up to ``timeout`` seconds for others to
    release theirs (back-pressure), and then gets :class:`StoreFull`. ``pressed`` is called while
    someone waits.

    The process that makes a store owns it; if it is killed, the next owner on this machine removes
    what it left. Safe for threads.
    """

    def __init__(self, capacity: int, timeout: float = 60.0) -> None:
        if capacity <= 0:
            raise ConfigurationError(f"a store holds more than 0 bytes, not {capacity}")
        self.capacity = capacity
        self.timeout = timeout
        self.pressed: Callable[[], None] = lambda: None
        self.segments = Segments.owned()
        self.peak = 0
        """Most bytes that its objects ever had."""
        self.recycled = 0
        """Objects that got the memory of an earlier one."""
        self._objects: dict[bytes, _Object] = {}
        self._drafts: dict[bytes, _Object] = {}
        self._spare: dict[str, _Spare] = {}
        """From the one that waits for longest to the newest."""
        self._changed = threading.Condition()

    def put(self, data: bytes | memoryview) -> bytes:
        """Copy an object in, and seal it; returns its key. One user has it."""
        with self.room(len(data)) as key:
            write_all(self.path(key), data)
        return key

    @contextlib.contextmanager
    def room(self, size: int, owner: str = "") -> Iterator[bytes]:
        """The key of an object that the caller writes to :meth:`path`; sealed at the end.

        There may be a file of that size already, with values that do not matter. If writing fails,
        nothing is left of it.
        """
        key = self._reserve(size, owner)
        try:
            yield key
            if (found := self.path(key).stat().st_size) != size:
                raise FederationError(f"an object of {size} bytes was announced; it has {found}")
        except BaseException:
            self.release(key)
            raise
        self._objects[key].sealed = True

    def draft(self, size: int) -> bytes:
        """The key of an object that another process will write to :meth:`path`.

        It does not count until it is adopted.
        """
        with self._changed:
            key = _new_key()
            self._drafts[key] = self._segment(size, "")
            return key

    def adopt(self, key: bytes) -> None:
        """A draft is finished: a sealed object of one user.

        It is let in even if the store is full: a sum that had to wait would keep what it sums up.
        """
        with self._changed:
            found = self._drafts.pop(key)
            found.sealed = True
            self._add(key, found)

    def discard(self, key: bytes) -> None:
        """Nobody wants a draft. Its writer may still be at it, so that its memory is not reused."""
        with self._changed:
            self.segments.remove(self._drafts.pop(key).segment)

    def get(self, key: bytes) -> memoryview:
        """An object as it lies in memory, until it is released."""
        with self._changed:
            found = self._objects.get(key)
        if found is None or not found.sealed:
            raise KeyError(f"no sealed object has the key {key.hex()}")
        return self.segments.view(found.segment)

    def retain(self, key: bytes) -> None:
        """One user more."""
        with self._changed:
            self._objects[key].users += 1

    def release(self, key: bytes) -> None:
        """One user less; after the last one its memory is for others."""
        with self._changed:
            found = self._objects[key]
            found.users -= 1
            if found.users:
                return
            del self._objects[key]
            if found.sealed:
                self._spare[found.segment] = _Spare(found.size, found.owner, time.monotonic())
            else:  # who was writing it may still be
                self.segments.remove(found.segment)
            self._changed.notify_all()

    def trim(self, since: float = math.inf) -> None:
        """Give back memory that waits since then (``time.monotonic()``) or longer."""
        with self._changed:
            for segment in [s for s, spare in self._spare.items() if spare.since <= since]:
                self._drop(segment)

    def path(self, key: bytes) -> Path:
        """Where an object or a draft lies, for processes of this node."""
        found = self._objects.get(key) or self._drafts[key]
        return self.segments.path(found.segment)

    @property
    def held(self) -> int:
        """What all objects take."""
        return sum(found.size for found in self._objects.values())

    @property
    def spare(self) -> int:
        """What waits to be used again."""
        return sum(spare.size for spare in self._spare.values())

    def __len__(self) -> int:
        return len(self._objects)

    def close(self) -> None:
        """Free everything."""
        self._objects.clear()
        self._drafts.clear()
        self._spare.clear()
        self.segments.close()

    def _reserve(self, size: int, owner: str) -> bytes:
        if size > self.capacity:
            raise StoreFull(f"{size:,} bytes never fit into a store of {self.capacity:,}")
        deadline = time.monotonic() + self.timeout
        while (key := self._try(size, owner)) is None:
            # Not under the lock: whoever makes room has locks of its own.
            self.pressed()
            with self._changed:
                if self.held + size <= self.capacity:
                    continue
                left = deadline - time.monotonic()
                if left <= 0:
                    raise StoreFull(
                        f"{size:,} bytes waited {self.timeout:g} s for room: {len(self)} objects "
                        f"take {self.held:,} of {self.capacity:,}"
                    )
                self._changed.wait(min(left, PRESS_EVERY_S))
        return key

    def _try(self, size: int, owner: str) -> bytes | None:
        with self._changed:
            if self.held + size > self.capacity:
                return None
            key = _new_key()
            self._add(key, self._segment(size, owner))
            return key

    def _segment(self, size: int, owner: str) -> _Object:
        """A segment that waits: the owner's last one, or else the newest; or a new one."""
        fitting = [s for s, spare in self._spare.items() if spare.size == size]
        if not fitting:
            return _Object(new_key(), size, owner)
        own = [segment for segment in fitting if self._spare[segment].owner == owner]
        segment = (own or fitting)[-1]
        del self._spare[segment]
        self.recycled += 1
        return _Object(segment, size, owner)

    def _add(self, key: bytes, made: _Object) -> None:
        self._objects[key] = made
        held = self.held
        self.peak = max(self.peak, held)
        while self._spare and held + self.spare > self.capacity:
            self._drop(next(iter(self._spare)))

    def _drop(self, segment: str) -> None:
        del self._spare[segment]
        self.segments.remove(segment)


def _new_key() -> bytes:
    return bytes.fromhex(new_key())
