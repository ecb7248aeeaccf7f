"""Compiled constraints by key: the least recently used go first, and each is compiled once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

from anabranch.serving.constraints.base import CompiledConstraint


class CompiledCache:
    """At most ``capacity`` bytes of compiled constraints. Any thread may use it.

    Threads that ask for a key that another one is compiling wait for it. A failure is not kept:
    whoever waited compiles again and sees its own error.
    """

    def __init__(self, capacity: int = 256 * 2**20) -> None:
        self.capacity = capacity
        self.memory = 0
        self.hits = 0
        self.misses = 0
        self._entries: OrderedDict[Hashable, CompiledConstraint] = OrderedDict()
        self._compiling: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], CompiledConstraint]) -> CompiledConstraint:
        """The entry of a key, made if it is not there."""
        with self._lock:
            if (found := self._found(key)) is not None:
                return found
            turn = self._compiling.setdefault(key, threading.Lock())
        with turn:
            with self._lock:
                if (found := self._found(key)) is not None:
                    return found
                self.misses += 1
            try:
                made = make()
                with self._lock:
                    self._keep(key, made)
                return made
            finally:
                with self._lock:
                    if self._compiling.get(key) is turn:
                        del self._compiling[key]

    def __len__(self) -> int:
        return len(self._entries)

    def _found(self, key: Hashable) -> CompiledConstraint | None:
        found = self._entries.get(key)
        if found is not None:
            self._entries.move_to_end(key)
            self.hits += 1
        return found

    def _keep(self, key: Hashable, made: CompiledConstraint) -> None:
        if made.memory > self.capacity:
            return  # it would drive out everything and be driven out itself
        self._entries[key] = made
        self.memory += made.memory
        while self.memory > self.capacity:
            _, oldest = self._entries.popitem(last=False)
            self.memory -= oldest.memory
