"""An aggregator: adds up updates of which it is told where they lie, and passes on (sum, n).

It is started as a file of its own that imports NumPy and nothing of this package, so that a cold
start takes a fraction of a second; importing torch would take several.

What it is told, and answers::

    ("begin", draft, elements, type)      a new sum, which grows in the file ``draft``
    ("fold", [(file, runs, weight, suspect), ...])
                                          -> ("folded", how many, seconds, cpu), or
                                             ("spoiled", {number: values not finite}, cpu), after
                                             which the sum is worth nothing
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
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

CHUNK = 1 << 16
"""Elements that are added at a time: what is read and written stays in the cache."""

TYPES = {"f64": 8, "f32": 4, "f16": 2, "bf16": 2}
"""Bytes of what can be added up."""

Runs = Sequence[tuple[str, int]]
"""Types and numbers of consecutive values."""

_NUMPY = {"f64": np.float64, "f32": np.float32, "f16": np.float16, "bf16": np.uint16}


class Addend:
    """``weight`` times values of several runs. ``suspect``: they may turn out not to be finite."""

    def __init__(self, values: Any, runs: Runs, weight: float = 1.0, suspect: bool = True) -> None:
        self.weight, self.suspect = weight, suspect
        self._runs: list[tuple[int, int, str, np.ndarray]] = []
        start = byte = 0
        for kind, count in runs:
            array = np.frombuffer(values, _NUMPY[kind], count, byte)
            self._runs.append((start, start + count, kind, array))
            start += count
            byte += count * TYPES[kind]

    @property
    def ends(self) -> list[int]:
        """Where each run ends."""
        return [end for _, end, _, _ in self._runs]

    def part(self, start: int, stop: int) -> np.ndarray:
        """Values ``start`` to ``stop`` of one run, without the weight; bfloat16 as float32."""
        for begin, end, kind, array in self._runs:
            if begin <= start < end:
                found = array[start - begin : stop - begin]
                return (found.astype(np.uint32) << 16).view(np.float32) if kind == "bf16" else found
        raise IndexError(f"there is no value {start}")


class Sum:
    """A weighted sum in the type of ``total``, [elements], whose values before do not matter."""

    def __init__(self, total: np.ndarray) -> None:
        self.total = total
        self.count = 0
        self._scratch = np.empty(CHUNK, total.dtype)

    def fold(self, addends: Sequence[Addend]) -> dict[int, int]:
        """Add all of them, one after the other.

        Each stretch of the sum is read and written once for all of them, and checked while it is in
        the cache. Returns, by number, how many values of suspects are not finite; if there are any,
        the sum is spoiled. A sum may overflow, which is no addend's fault.
        """
        for start, stop in stretches(len(self.total), addends):
            into = self.total[start:stop]
            product = self._scratch[: stop - start]
            for number, addend in enumerate(addends):
                part = addend.part(start, stop)
                if self.count or number:
                    np.multiply(part, addend.weight, out=product, dtype=product.dtype)
                    into += product
                else:  # nothing is there yet that would have to be read
                    np.multiply(part, addend.weight, out=into, dtype=into.dtype)
            if not finite(into) and not all(
                finite(addend.part(start, stop)) for addend in addends if addend.suspect
            ):
                return not_finite(len(self.total), addends)
        self.count += len(addends)
        return {}


def stretches(elements: int, addends: Sequence[Addend]) -> Iterator[tuple[int, int]]:
    """Beginnings and ends of at most :data:`CHUNK` values that are of one type in each addend."""
    ends = {end for addend in addends for end in addend.ends}
    return pairwise(sorted({*range(0, elements, CHUNK), *ends}))


def finite(values: np.ndarray) -> bool:
    """Whether there is no NaN and no infinity among the values."""
    # Far cheaper than looking at every value; squares of finite ones may overflow.
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.dot(values, values)) or np.isfinite(values).all())


def not_finite(elements: int, addends: Sequence[Addend]) -> dict[int, int]:
    """How many values are NaN or infinite, by number of the suspects that have any."""
    found = dict.fromkeys(range(len(addends)), 0)
    for start, stop in stretches(elements, addends):
        for number, addend in enumerate(addends):
            if addend.suspect:
                found[number] += int((~np.isfinite(addend.part(start, stop))).sum())
    return {number: count for number, count in found.items() if count}


class Mapped:
    """A file of so many numbers of a type, mapped."""

    def __init__(self, path: str, elements: int, kind: str) -> None:
        self._map = map_file(path, elements * TYPES[kind])
        self.kind = kind
        self.array = np.frombuffer(self._map, _NUMPY[kind])

    def close(self) -> None:
        """Let go of it; nobody else may hold the array."""
        del self.array
        self._map.close()


def map_file(path: str | os.PathLike[str], size: int) -> mmap.mmap:
    """So many bytes of shared memory, to write. A file of that size keeps the pages that it has."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(descriptor).st_size != size:
            # Memory that is not there is an error here, and would be a SIGBUS later.
            os.posix_fallocate(descriptor, 0, size)
        # All pages at once: a fault for each takes longer than writing it.
        return mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | _POPULATE)
    finally:
        os.close(descriptor)


_POPULATE: int = getattr(mmap, "MAP_POPULATE", 0)


def serve(pipe: Connection) -> None:
    """The whole life of an aggregator."""
    maps = Maps()
    mapped: Mapped | None = None
    total: Sum | None = None
    while True:
        what, *details = pipe.recv()
        if what == "quit":
            return
        if what == "begin":
            maps.forget_removed()
            mapped = Mapped(*details)
            total = Sum(mapped.array)
            continue
        assert mapped is not None and total is not None
        if what == "fold":
            began = time.perf_counter()
            bad = total.fold([Addend(maps.get(file), *how) for file, *how in details[0]])
            if bad:
                pipe.send(("spoiled", bad, cpu_seconds()))
            else:
                taken = time.perf_counter() - began
                pipe.send(("folded", len(details[0]), taken, cpu_seconds()))
        elif what == "copy":
            copy = Mapped(details[0], len(total.total), mapped.kind)
            copy.array[:] = total.total
            copy.close()
            pipe.send(("copied", cpu_seconds()))
        elif what == "seal":
            del total
            mapped.close()
            mapped = total = None
            maps.forget_removed()
            pipe.send(("sealed", cpu_seconds()))


class Maps:
    """Files of shared memory, mapped to be read. A file that is used again is mapped once."""

    def __init__(self) -> None:
        self._maps: dict[str, mmap.mmap] = {}

    def get(self, file: str) -> mmap.mmap:
        """What lies in a file."""
        if file not in self._maps:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._maps[file] = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
            finally:
                os.close(descriptor)
        return self._maps[file]

    def forget_removed(self) -> None:
        """Let go of files that are no more: a map would keep their memory."""
        for file in [file for file in self._maps if not Path(file).exists()]:
            self._maps.pop(file).close()


def cpu_seconds() -> float:
    """Processor time of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    with contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):
        serve(Connection(int(sys.argv[1])))
