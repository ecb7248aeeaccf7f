"""Updates in shared memory, passed from hand to hand as 16-byte keys."""

from __future__ import annotations

import contextlib
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
    size: int
    users: int
    sealed: bool = False


class SharedStore(Closing):
    """Objects of one node; whoever has a key finds the object without a copy.

    An object is written once, then *sealed*: nobody changes it any more. It is freed when the last
    of its users has released it. ``capacity`` are bytes; who wants to put more waits up to
    ``timeout`` seconds for others to release theirs (back-pressure), and then gets
    :class:`StoreFull`. ``pressed`` is called while someone waits.

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
        """Most bytes that it ever held."""
        self._objects: dict[bytes, _Object] = {}
        self._changed = threading.Condition()

    def put(self, data: bytes | memoryview) -> bytes:
        """Copy an object in, and seal it; returns its key. One user has it."""
        with self.room(len(data)) as key:
            write_all(self.path(key), data)
        return key

    @contextlib.contextmanager
    def room(self, size: int) -> Iterator[bytes]:
        """The key of an object that the caller writes to :meth:`path`; sealed at the end.

        If that fails, nothing is left of it.
        """
        key = self.new_key()
        self._reserve(key, size)
        try:
            yield key
            if (found := self.segments.size(key.hex())) != size:
                raise FederationError(f"an object of {size} bytes was announced; it has {found}")
        except BaseException:
            self.release(key)
            raise
        self._objects[key].sealed = True

    def adopt(self, key: bytes) -> None:
        """Take over what another process wrote to :meth:`path`, as a sealed object of one user.

        It is let in even if the store is full: a sum that had to wait would keep what it sums up.
        """
        with self._changed:
            self._add(key, self.segments.size(key.hex()))
            self._objects[key].sealed = True

    def get(self, key: bytes) -> memoryview:
        """An object as it lies in memory; who looks at it keeps it, whoever releases it."""
        with self._changed:
            found = self._objects.get(key)
        if found is None or not found.sealed:
            raise KeyError(f"no sealed object has the key {key.hex()}")
        return self.segments.view(key.hex())

    def retain(self, key: bytes) -> None:
        """One user more."""
        with self._changed:
            self._objects[key].users += 1

    def release(self, key: bytes) -> None:
        """One user less; the last one frees it."""
        with self._changed:
            found = self._objects[key]
            found.users -= 1
            if not found.users:
                del self._objects[key]
                self.segments.remove(key.hex())
                self._changed.notify_all()

    def path(self, key: bytes) -> Path:
        """Where an object lies, for processes of this node."""
        return self.segments.path(key.hex())

    def new_key(self) -> bytes:
        """A key that nobody has."""
        return bytes.fromhex(new_key())

    @property
    def held(self) -> int:
        """What all objects take."""
        return sum(found.size for found in self._objects.values())

    def __len__(self) -> int:
        return len(self._objects)

    def close(self) -> None:
        """Free everything."""
        self._objects.clear()
        self.segments.close()

    def _reserve(self, key: bytes, size: int) -> None:
        if size > self.capacity:
            raise StoreFull(f"{size:,} bytes never fit into a store of {self.capacity:,}")
        deadline = time.monotonic() + self.timeout
        while True:
            with self._changed:
                if self.held + size <= self.capacity:
                    return self._add(key, size)
            # Not under the lock: whoever makes room has locks of its own.
            self.pressed()
            with self._changed:
                left = deadline - time.monotonic()
                if self.held + size <= self.capacity:
                    return self._add(key, size)
                if left <= 0:
                    raise StoreFull(
                        f"{size:,} bytes waited {self.timeout:g} s for room: {len(self)} objects "
                        f"take {self.held:,} of {self.capacity:,}"
                    )
                self._changed.wait(min(left, PRESS_EVERY_S))

    def _add(self, key: bytes, size: int) -> None:
        self._objects[key] = _Object(size, 1)
        self.peak = max(self.peak, self.held)
