"""The query in C++, compiled on first use where there is a compiler.

:mod:`anabranch.graphs.ppr.query` computes the same in NumPy and SciPy; it is what runs without a
compiler, and what this is tested against.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anabranch.compiled import build, compiler
from anabranch.graphs.ppr.index import PPRIndex

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("query.cpp")
FLAGS = ("-ffp-contract=off",)

Row = tuple[NDArray[np.int32], NDArray[np.float32], float]
"""Nodes, scores and dropped mass of one source."""


@functools.cache
def load() -> Any:
    """The library, built on first use (some seconds), or None; the log says why."""
    found = compiler()
    if found is None:
        logger.warning("no C++ compiler: PageRank queries run in NumPy, a few times slower")
        return None
    try:
        return ctypes.CDLL(str(build(found, "ppr", SOURCE, FLAGS)))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or error
        logger.warning(
            "the kernel of PageRank queries does not build, so they are slow: %s", detail
        )
        return None


class CompiledQuery:
    """Answers on one graph. The arrays are shared, and may lie on disk."""

    def __init__(
        self,
        library: Any,
        onward: Any,
        index: PPRIndex | None,
        missing: NDArray[np.float32],
        restart: float,
    ) -> None:
        """``onward`` [n, n] is the walk's matrix times 1 - ``restart``; ``missing`` [n] the share
        of a node's mass that is not looked up."""
        self._answer = library.anabranch_ppr
        self._answer.restype = ctypes.c_int64
        n = onward.shape[0]
        pointers: dict[str, Any] = {
            "onward_ends": onward.indptr.astype(np.int64),
            "onward_nodes": onward.indices.astype(np.int32, copy=False),
            "onward_values": onward.data.astype(np.float32, copy=False),
            "missing": missing,
        }
        numbers: dict[str, Any] = {"n": n, "restart": restart, "count_bytes": 0}
        if index is not None:
            pointers |= {
                "visit_ends": index.indptr,
                "visit_nodes": index.nodes,
                "visit_counts": index.counts,
                "scale": index.scale,
            }
            numbers["count_bytes"] = index.counts.dtype.itemsize
        self._kept_alive = {name: np.ascontiguousarray(array) for name, array in pointers.items()}
        addresses = {name: array.ctypes.data for name, array in self._kept_alive.items()}
        self._query = bytes(_Query(**numbers, **addresses))
        self._n = n

    def rows(
        self,
        sources: NDArray[np.int64],
        rounds: int,
        threshold: float | None,
        top_k: int | None,
        work: int,
    ) -> list[Row]:
        """One row for each source, by falling score with ``top_k``, else by node.

        ``work``: the most multiplications of a source in a round without ``threshold``.
        """
        query = _Query.from_buffer_copy(self._query)
        query.rounds = rounds
        query.work = work
        query.threshold = -1.0 if threshold is None else threshold
        query.top_k = 0 if top_k is None else min(top_k, self._n)
        count = len(sources)
        sources = np.ascontiguousarray(sources, np.int64)
        room = count * (query.top_k or self._n)
        nodes, scores = np.empty(room, np.int32), np.empty(room, np.float32)
        sizes, dropped = np.empty(count, np.int64), np.empty(count)
        arrays = (sizes, nodes, scores, dropped)
        failed = self._answer(
            ctypes.byref(query),
            ctypes.c_void_p(sources.ctypes.data),
            ctypes.c_int64(count),
            *(ctypes.c_void_p(array.ctypes.data) for array in arrays),
        )
        if failed:
            raise MemoryError(f"a query of {count} sources on {self._n:,} nodes")
        ends = np.cumsum(sizes).tolist()
        return [
            (nodes[start:end], scores[start:end], lost)
            for start, end, lost in zip([0, *ends[:-1]], ends, dropped.tolist(), strict=True)
        ]


class _Query(ctypes.Structure):
    """``Query`` of the source."""

    _fields_ = [
        ("n", ctypes.c_int64),
        ("onward_ends", ctypes.c_void_p),
        ("onward_nodes", ctypes.c_void_p),
        ("onward_values", ctypes.c_void_p),
        ("visit_ends", ctypes.c_void_p),
        ("visit_nodes", ctypes.c_void_p),
        ("visit_counts", ctypes.c_void_p),
        ("count_bytes", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
        ("missing", ctypes.c_void_p),
        ("restart", ctypes.c_double),
        ("rounds", ctypes.c_int64),
        ("threshold", ctypes.c_double),
        ("work", ctypes.c_int64),
        ("top_k", ctypes.c_int64),
    ]
