"""An aggregator: adds up updates of which it is told where they lie, and passes on (sum, n).

It is started as a file of its own that imports NumPy and nothing of this package, so that a cold
start takes a fraction of a second; importing torch would take several.

What it is told, and answers::

    ("begin", draft, elements, type)      a new sum, which grows in the file ``draft``
    ("fold", file, runs, weight)          -> ("folded", seconds, cpu)
    ("copy", file)                        -> ("copied", cpu): the sum so far, and it goes on
    ("seal",)                             -> ("sealed", cpu): the draft is the sum
    ("quit",)

Between messages it sleeps. When the pipe closes it exits.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

CHUNK = 1 << 16
"""Elements that are added at a time: what is read and written stays in the cache."""

TYPES = {"f64": 8, "f32": 4, "f16": 2, "bf16": 2}
"""Bytes of what can be added up."""

Runs = Sequence[tuple[str, int]]
"""Types and numbers of consecutive values."""

_NUMPY = {"f64": np.float64, "f32": np.float32, "f16": np.float16, "bf16": np.uint16}


def numbers(values: Any, runs: Runs) -> Iterator[np.ndarray]:
    """The values of each run as NumPy sees them; bfloat16 is widened to float32."""
    start = 0
    for kind, count in runs:
        found = np.frombuffer(values, _NUMPY[kind], count, start)
        if kind == "bf16":
            found = (found.astype(np.uint32) << 16).view(np.float32)
        yield found
        start += count * TYPES[kind]


class Sum:
    """A weighted sum in the type of ``total``, [elements], whose values before do not matter."""

    def __init__(self, total: np.ndarray) -> None:
        self.total = total
        self.count = 0
        self._scratch = np.empty(CHUNK, total.dtype)

    def fold(self, values: Any, runs: Runs, weight: float) -> None:
        """Add ``weight * values``."""
        offset = 0
        for run in numbers(values, runs):
            for start in range(0, len(run), CHUNK):
                part = run[start : start + CHUNK]
                into = self.total[offset + start : offset + start + len(part)]
                if self.count:
                    product = self._scratch[: len(part)]
                    np.multiply(part, weight, out=product, dtype=product.dtype)
                    into += product
                else:  # nothing is there yet that would have to be read
                    np.multiply(part, weight, out=into, dtype=into.dtype)
            offset += len(run)
        self.count += 1


class Mapped:
    """A file of so many numbers of a type, mapped."""

    def __init__(self, path: str, elements: int, kind: str) -> None:
        size = elements * TYPES[kind]
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            # Memory that is not there is an error here, and would be a SIGBUS later.
            os.posix_fallocate(descriptor, 0, size)
            self._map = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        self.kind = kind
        self.array = np.frombuffer(self._map, _NUMPY[kind])

    def close(self) -> None:
        """Let go of it; nobody else may hold the array."""
        del self.array
        self._map.close()


def serve(pipe: Connection) -> None:
    """The whole life of an aggregator."""
    mapped: Mapped | None = None
    total: Sum | None = None
    while True:
        what, *details = pipe.recv()
        if what == "quit":
            return
        if what == "begin":
            mapped = Mapped(*details)
            total = Sum(mapped.array)
            continue
        assert mapped is not None and total is not None
        if what == "fold":
            file, runs, weight = details
            began = time.perf_counter()
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as values:
                os.close(descriptor)
                total.fold(values, runs, weight)
            pipe.send(("folded", time.perf_counter() - began, cpu_seconds()))
        elif what == "copy":
            copy = Mapped(details[0], len(total.total), mapped.kind)
            copy.array[:] = total.total
            copy.close()
            pipe.send(("copied", cpu_seconds()))
        elif what == "seal":
            del total
            mapped.close()
            mapped = total = None
            pipe.send(("sealed", cpu_seconds()))


def cpu_seconds() -> float:
    """Processor time of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    with contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):
        serve(Connection(int(sys.argv[1])))
