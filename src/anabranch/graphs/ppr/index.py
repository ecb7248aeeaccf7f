"""PowerWalk's index: a fingerprint of each node from a few random walks.

Liu, Li, Lui and Cheng, "PowerWalk: Scalable Personalized PageRank via Random Walks with
Vertex-Centric Decomposition" (CIKM 2016), sections 3 and 4.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from anabranch.errors import MissingExtra
from anabranch.files import sync_tree, write_json
from anabranch.graphs.errors import GraphError, IndexMismatch
from anabranch.graphs.graph import Graph
from anabranch.graphs.ppr.exact import RESTART, check_restart
from anabranch.graphs.walks import Walker
from anabranch.models.progress import Progress, silent

MOST_WALKS = 65535
_WALKERS = 2**17
"""Walks drawn together. A block's random numbers are its own: part of the format."""
_FORMAT = 1


@dataclass(frozen=True)
class Settings:
    """What an index was built from; two indexes with equal settings are equal.

    ``keep``: entries kept of each fingerprint, the largest; None keeps all.
    """

    graph: str
    walks: int
    restart: float
    seed: int
    keep: int | None


@dataclass(frozen=True, eq=False)
class PPRIndex:
    """Fingerprints in compressed sparse rows; the arrays may lie on disk.

    Row u: how often the walks from u visited ``nodes`` (``counts``, uint16 or uint32), ``totals``
    all visits, ``lost`` walks that ended at a node without out-edges instead of stopping.
    """

    settings: Settings
    indptr: NDArray[np.int64]
    nodes: NDArray[np.int32]
    counts: NDArray[Any]
    totals: NDArray[np.uint32]
    lost: NDArray[np.uint32]

    @property
    def scale(self) -> NDArray[np.float32]:
        """What a visit of each row's walks is worth [n].

        Visits are divided by their own number and not by its expectation, which has lower
        variance and a small bias: a fingerprint sums to 1. Where walks were lost it sums to the
        probability to stop, estimated from all visits, since each is the last with ``restart``.
        """
        expected = self.settings.restart * self.totals / self.settings.walks
        stopped = np.where(self.lost > 0, np.minimum(expected, 1.0), 1.0)
        return (stopped / self.totals).astype(np.float32)

    def visits(self) -> sparse.csr_array:
        """``counts`` as a matrix [n, n] that shares the arrays."""
        indptr: NDArray[Any] = self.indptr
        if len(self.nodes) <= np.iinfo(np.int32).max:
            indptr = indptr.astype(np.int32)
        return sparse.csr_array((self.counts, self.nodes, indptr), shape=(len(indptr) - 1,) * 2)

    @property
    def nbytes(self) -> int:
        """Bytes on disk or in memory."""
        return sum(getattr(self, name).nbytes for name in _ARRAYS)

    def check(self, graph: Graph, restart: float | None = None) -> None:
        """:class:`IndexMismatch` unless it was built for this graph and restart probability."""
        if self.settings.graph != graph.fingerprint():
            raise IndexMismatch(
                "the index was built for another graph (its fingerprint differs): build it again"
            )
        if restart is not None and restart != self.settings.restart:
            raise IndexMismatch(
                f"the index was built for restart = {self.settings.restart}, not {restart}"
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str], graph: Graph) -> PPRIndex:
        """Open an index that :func:`build_index` wrote, without reading it into memory.

        Raises :class:`IndexMismatch` if it belongs to another graph or is damaged.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise IndexMismatch(f"there is no index at {folder}")
        index = _open(folder)
        index.check(graph)
        return index


def build_index(
    graph: Graph,
    path: str | os.PathLike[str] | None = None,
    *,
    walks: int = 50,
    restart: float = RESTART,
    seed: int = 0,
    keep: int | None = None,
    workers: int = 1,
    replace: bool = False,
    progress: Progress = silent,
) -> PPRIndex:
    """Walk ``walks`` times from every node and count every visit (full-path estimator).

    Each visit is the last with probability ``restart``; walks have no longest length, which would
    bias them. Memory O(block + index), or O(block) with ``path``: then the index is written to
    that folder, whole or not at all, and opened from there. ``workers`` are processes; the result
    does not depend on them.
    """
    check_restart(restart)
    if not 1 <= walks <= MOST_WALKS:
        raise GraphError(f"walks = {walks}: choose 1 to {MOST_WALKS}")
    if keep is not None and keep < 1:
        raise GraphError(f"keep = {keep}: a fingerprint has at least one entry")
    if workers < 1:
        raise GraphError(f"workers = {workers}: at least one process must work")
    settings = Settings(graph.fingerprint(), walks, restart, seed, keep)
    blocks = _blocks(graph, settings, workers, progress)
    if path is None:
        return _in_memory(blocks, settings, graph.num_nodes)
    target = Path(path).absolute()
    if target.exists() and not replace:
        raise GraphError(f"{target} is there already; pass replace=True to build it again")
    _remove_leftovers(target)
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        _write(draft, blocks, settings)
        if target.exists():
            # Two renames: a kill in between leaves no index, never half of one.
            target.rename(draft.with_suffix(".old"))
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(draft.with_suffix(".old"), ignore_errors=True)
    return _open(target)


_ARRAYS = ("indptr", "nodes", "counts", "totals", "lost")


@dataclass(frozen=True)
class _Block:
    """Fingerprints of consecutive nodes: ``sizes`` [nodes] entries each."""

    sizes: NDArray[np.int64]
    nodes: NDArray[np.int32]
    counts: NDArray[Any]
    totals: NDArray[np.uint32]
    lost: NDArray[np.uint32]


def _blocks(graph: Graph, settings: Settings, workers: int, progress: Progress) -> Iterator[_Block]:
    """The fingerprints of all nodes, block by block in order."""
    try:
        from joblib import Parallel, delayed
    except ImportError:
        raise MissingExtra("joblib", "graphs") from None
    n = graph.num_nodes
    size = max(1, _WALKERS // settings.walks)
    walker = Walker(graph)
    tasks = (
        delayed(_fingerprints)(walker, n, start, min(start + size, n), settings)
        for start in range(0, n, size)
    )
    done = 0
    for block in Parallel(n_jobs=workers, return_as="generator")(tasks):
        done += len(block.totals)
        progress(f"walked from {done:,} of {n:,} nodes", done / n)
        yield block


def _fingerprints(walker: Walker, n: int, start: int, stop: int, settings: Settings) -> _Block:
    """Count the visits of all walks from nodes ``start``..``stop`` - 1."""
    generator = np.random.default_rng([settings.seed, start])
    count = stop - start
    owner = np.repeat(np.arange(count, dtype=np.int64), settings.walks)
    at = np.repeat(np.arange(start, stop, dtype=np.int32), settings.walks)
    lost = np.zeros(count, np.int64)
    visits = []
    while len(at):
        visits.append(owner * n + at)
        goes_on = generator.random(len(at)) >= settings.restart
        owner, at = owner[goes_on], walker.step(at[goes_on], generator)
        if (dead := at < 0).any():
            lost += np.bincount(owner[dead], minlength=count)
            owner, at = owner[~dead], at[~dead]
    keys, counts = np.unique(np.concatenate(visits), return_counts=True)
    rows = keys // n
    totals = np.bincount(rows, weights=counts, minlength=count)
    if settings.keep is not None:
        kept = _largest(rows, counts, settings.keep)
        keys, counts, rows = keys[kept], counts[kept], rows[kept]
    dtype = _count_type(settings)
    if counts.max() > np.iinfo(dtype).max:
        raise GraphError(f"a node was visited {counts.max()} times from one source: fewer walks")
    return _Block(
        np.bincount(rows, minlength=count),
        (keys - rows * n).astype(np.int32),
        counts.astype(dtype),
        totals.astype(np.uint32),
        lost.astype(np.uint32),
    )


def _count_type(settings: Settings) -> type[np.unsignedinteger]:
    """Four times the visits that a node with only a self-loop expects from itself must fit."""
    return np.uint16 if 4 * settings.walks / settings.restart <= 65535 else np.uint32


def _largest(rows: NDArray[np.int64], counts: NDArray[np.int64], keep: int) -> NDArray[np.int64]:
    """Positions of each row's ``keep`` largest counts, the smaller node where equal; in order."""
    order = np.lexsort((-counts, rows))  # stable: equal counts stay sorted by node
    first = np.searchsorted(rows, rows, side="left")
    return np.sort(order[np.arange(len(rows)) - first < keep])


def _in_memory(blocks: Iterator[_Block], settings: Settings, n: int) -> PPRIndex:
    parts = list(blocks)
    empty = _Block(*(np.empty(0, t) for t in (np.int64, *_types(settings))))
    joined = {
        name: np.concatenate([getattr(part, name) for part in [empty, *parts]])
        for name in ("sizes", *_ARRAYS[1:])
    }
    indptr = np.concatenate([[0], np.cumsum(joined.pop("sizes"))])
    return PPRIndex(settings, indptr, **joined)


def _types(settings: Settings) -> tuple[type, ...]:
    """Of the arrays after ``indptr``."""
    return np.int32, _count_type(settings), np.uint32, np.uint32


def _write(folder: Path, blocks: Iterator[_Block], settings: Settings) -> None:
    """Stream the arrays to files; the header comes last."""
    folder.mkdir(parents=True)
    entries = np.zeros(1, np.int64)
    rows = 0
    files = {name: (folder / name).open("wb") for name in _ARRAYS}
    try:
        entries.tofile(files["indptr"])
        for block in blocks:
            ends = entries + np.cumsum(block.sizes)
            ends.tofile(files["indptr"])
            entries, rows = ends[-1:], rows + len(ends)
            for name in _ARRAYS[1:]:
                getattr(block, name).tofile(files[name])
    finally:
        for file in files.values():
            file.close()
    sizes = {"rows": rows, "entries": int(entries[0])}
    write_json(folder / "header.json", {"format": _FORMAT, **sizes, "settings": asdict(settings)})
    sync_tree(folder)


def _open(folder: Path) -> PPRIndex:
    try:
        header = json.loads((folder / "header.json").read_text())
        if header["format"] != _FORMAT:
            raise IndexMismatch(f"{folder} has the format {header['format']}, not {_FORMAT}")
        settings = Settings(**header["settings"])
        rows, entries = header["rows"], header["entries"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, IndexMismatch):
            raise
        raise IndexMismatch(f"{folder} is no index: its header cannot be read ({error})") from None
    lengths = dict(zip(_ARRAYS, (rows + 1, entries, entries, rows, rows), strict=True))
    arrays: dict[str, Any] = {}
    for name, dtype in zip(_ARRAYS, (np.int64, *_types(settings)), strict=True):
        file, wanted = folder / name, lengths[name] * np.dtype(dtype).itemsize
        size = file.stat().st_size if file.exists() else 0
        if size != wanted:
            raise IndexMismatch(f"{file} has {size} bytes, not {wanted}: build the index again")
        # An empty file cannot be mapped.
        arrays[name] = np.memmap(file, dtype, "r") if size else np.empty(0, dtype)
    indptr = arrays["indptr"]
    if indptr[0] != 0 or indptr[-1] != entries or np.any(np.diff(indptr) < 0):
        raise IndexMismatch(f"{folder / 'indptr'} is damaged: build the index again")
    return PPRIndex(settings, **arrays)


def _remove_leftovers(target: Path) -> None:
    """Drafts of processes that were killed."""
    import psutil

    for path in target.parent.glob(f".{target.name}.*"):
        found = re.fullmatch(r"\.(\d+)\.(tmp|old)", path.name[len(target.name) + 1 :])
        if found and not psutil.pid_exists(int(found[1])):
            shutil.rmtree(path)
