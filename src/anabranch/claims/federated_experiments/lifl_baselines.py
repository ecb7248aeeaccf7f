"""What LIFL is compared with, each as well as it can be done. Run as files that import NumPy only.

    python lifl_baselines.py leaf FD AGGREGATOR          adds up pickled updates from a pipe
    python lifl_baselines.py client HOST PORT N ELEMENTS SEED
                                                         one client, which sends when it is told

Both use the very sums of our aggregators, in the file AGGREGATOR.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import resource
import socket
import sys
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

NOISE = 1 << 16
"""Numbers of which updates are made."""


def module_at(path: str) -> Any:
    """The module in a file, without the packages around it."""
    spec = importlib.util.spec_from_file_location("aggregator", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def leaf(descriptor: int, aggregator: str) -> None:
    """For each round: how many updates of how many elements, the updates, then the sum back."""
    pipe, made = Connection(descriptor), module_at(aggregator)
    with contextlib.suppress(EOFError):
        while True:
            count, elements = pipe.recv()
            total = made.Sum(np.empty(elements))
            for _ in range(count):
                values, weight = pipe.recv()
                total.fold([made.Addend(values, (("f32", elements),), weight)])
            pipe.send(total.total)


def update(number: int, elements: int, seed: int) -> np.ndarray:
    """A client's update: noise, and its number in front."""
    values = np.random.default_rng(seed).standard_normal(elements, dtype=np.float32)
    values[0] = number
    return values


def train(into: np.ndarray, number: int, noise: np.ndarray) -> None:
    """Stands for the last step of training: a client's values come to be where it keeps them.

    ``noise`` is smaller than the cache, so that nothing but writing them takes time.
    """
    for start in range(0, len(into), len(noise)):
        part = into[start : start + len(noise)]
        np.add(noise[: len(part)], np.float32(number), out=part)
    into[0] = number


def client(host: str, port: int, number: int, elements: int, seed: int) -> None:
    """Write an update (``w``) and send it (``s``) whenever the server says so.

    After each it says how many seconds of the processor it has used.
    """
    noise = update(number, NOISE, seed)
    values = np.empty(elements, np.float32)
    link = socket.create_connection((host, port))
    link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
    link.sendall(number.to_bytes(4, "little"))
    while what := link.recv(1):
        if what == b"w":
            train(values, number, noise)
        else:
            link.sendall(values.data.cast("B"))
        used = resource.getrusage(resource.RUSAGE_SELF)
        link.sendall(json.dumps(round(used.ru_utime + used.ru_stime, 6)).ljust(32).encode())


if __name__ == "__main__":
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    what, *given = sys.argv[1:]
    if what == "leaf":
        leaf(int(given[0]), given[1])
    else:
        client(given[0], *map(int, given[1:]))
