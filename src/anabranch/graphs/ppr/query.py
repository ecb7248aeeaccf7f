"""PowerWalk's query: push the sources' mass a few steps, then look up where it ended.

Decomposition: the score vector of a node is restart * itself + (1 - restart) * the mean of its
out-neighbours' vectors. Applied ``rounds`` times, it replaces the vector of a source by those
of the nodes a few steps away, whose fingerprints together hold many more walks than its own.
Sources of a batch travel together: a node that several reach is expanded, and its fingerprint
loaded, once (shared decomposition).

A walk at a node without out-edges starts again at its source. Pushing from the source alone, mass
that gets there is lost, in the graph and in the fingerprints alike; starting again is the same as
dividing by what was not lost, which is done once at the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from anabranch.graphs.errors import GraphError
from anabranch.graphs.graph import Graph
from anabranch.graphs.ppr import kernel
from anabranch.graphs.ppr.exact import RESTART, check_restart
from anabranch.graphs.ppr.index import PPRIndex
from anabranch.graphs.ppr.kernel import Row
from anabranch.graphs.ppr.masses import Masses, added, spread

WORK = 2**24
"""Multiplications a source may cost in a round before its smallest masses are dropped."""
_BATCH = 128
_CELLS = 2**24
"""Sources times nodes worked on together."""


@dataclass(frozen=True, eq=False)
class PPRResult:
    """Scores of each source in compressed sparse rows.

    ``nodes`` and ``scores`` of source i are at ``indptr[i]``..``indptr[i + 1]``: with ``top_k``
    by falling score (the smaller row number where equal), else by row number. ``dropped`` [sources]
    is the mass that was cut off; all scores and it sum to 1.
    """

    sources: NDArray[np.int64]
    indptr: NDArray[np.int64]
    nodes: NDArray[np.int32]
    scores: NDArray[np.float32]
    dropped: NDArray[np.float32]

    def row(self, source: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Nodes and scores of the i-th source."""
        part = slice(self.indptr[source], self.indptr[source + 1])
        return self.nodes[part], self.scores[part]


@dataclass(frozen=True, eq=False)
class TopK:
    """The best nodes after ``rounds`` pushes; the first ``certain`` are right, as a set."""

    rounds: int
    nodes: NDArray[np.int32]
    scores: NDArray[np.float32]
    certain: int


class PPRQuery:
    """Answers personalised PageRank queries on a graph, with an index or by pushing alone."""

    def __init__(
        self,
        graph: Graph,
        index: PPRIndex | None = None,
        *,
        restart: float | None = None,
        compiled: bool = True,
    ) -> None:
        """``compiled``: in C++ where there is a compiler; without, in NumPy. Scores of the two
        differ by rounding."""
        if restart is None:
            restart = RESTART if index is None else index.settings.restart
        check_restart(restart)
        if index is not None:
            index.check(graph, restart)
        self._graph = graph
        self._restart = restart
        self._index = index
        self._onward = graph.transition()
        self._onward.data *= np.float32(1 - restart)
        self._visits = None if index is None else index.visits()
        self._scale = None if index is None else index.scale
        library = kernel.load() if compiled else None
        self._compiled: kernel.CompiledQuery | None = None
        if library is not None:
            self._compiled = kernel.CompiledQuery(
                library, self._onward, index, self._missing, restart
            )

    def run(
        self,
        sources: ArrayLike,
        *,
        rounds: int = 2,
        threshold: float | None = None,
        top_k: int | None = None,
        workers: int = 1,
    ) -> PPRResult:
        """Scores of ``sources``, named as the graph's nodes are.

        ``rounds`` of pushing; 0 returns the fingerprints. ``threshold``: masses below it are
        dropped before they are spread; None drops nothing until a source's round costs more than
        ``WORK``, then its smallest masses. ``workers`` threads share the batch. The same source
        gets the same answer in every batch.
        """
        if rounds < 0:
            raise GraphError(f"rounds = {rounds} is negative")
        if threshold is not None and not 0 <= threshold < 1:
            raise GraphError(f"threshold = {threshold}: a mass below which to drop, in [0, 1)")
        if top_k is not None and top_k < 1:
            raise GraphError(f"top_k = {top_k}: ask for at least one node")
        if workers < 1:
            raise GraphError(f"workers = {workers}: at least one thread must work")
        rows = self._graph.positions(np.atleast_1d(np.asarray(sources)))
        if rows.ndim != 1:
            raise GraphError(f"sources are a list of nodes, not an array {list(rows.shape)}")
        asked, where = np.unique(rows, return_inverse=True)
        size = max(1, min(_BATCH, _CELLS // max(self._graph.num_nodes, 1)))
        blocks = [asked[i : i + size] for i in range(0, len(asked), size)]

        def answer(block: NDArray[np.int64]) -> list[Row]:
            if self._compiled is not None:
                return self._compiled.rows(block, rounds, threshold, top_k, WORK)
            return _rows(*self._block(block, rounds, threshold), top_k)

        if workers == 1 or len(blocks) < 2:
            answered = list(map(answer, blocks))
        else:
            with ThreadPoolExecutor(workers) as pool:
                answered = list(pool.map(answer, blocks))
        by_source = [row for block in answered for row in block]
        return _joined(rows, [by_source[i] for i in where])

    def refine(self, source: Any, top_k: int, most_rounds: int = 20) -> Iterator[TopK]:
        """The ``top_k`` nodes of one source after 0, 1, 2, ... pushes, each built on the last.

        Ends when the set is certain: pushing gives a lower bound of every score, and the mass still
        under way is the most that any of them can gain. The scores shown use the index, if there
        is one. On a graph with nodes without out-edges, bounds hold before starting again, which
        multiplies all scores alike.
        """
        (start,) = self._graph.positions(np.atleast_1d(np.asarray(source)))
        if top_k < 1:
            raise GraphError(f"top_k = {top_k}: ask for at least one node")
        flow = Masses.at(np.array([start]), self._graph.num_nodes)
        stopped = None
        for rounds in range(most_rounds + 1):
            estimate = self._looked_up(flow, stopped)
            ((nodes, scores, _),) = _rows(estimate, np.zeros(1), top_k)
            part = flow.with_mass(flow.mass * np.float32(self._restart))
            stopped = part if stopped is None else added([stopped, part])
            flow = spread(flow, self._onward)
            certain = _certain(stopped, nodes, float(flow.sums()[0]))
            yield TopK(rounds, nodes, scores, certain)
            if certain == min(top_k, self._graph.num_nodes) or not len(flow.nodes):
                return

    def _block(
        self, sources: NDArray[np.int64], rounds: int, threshold: float | None
    ) -> tuple[Masses, NDArray[np.float64]]:
        """Scores [sources, n] and dropped mass [sources]."""
        flow = Masses.at(sources, self._graph.num_nodes)
        stopped = []
        dropped = np.zeros(len(sources))
        for _ in range(rounds):
            stopped.append(flow.with_mass(flow.mass * np.float32(self._restart)))
            flow, cut = _pruned(flow, self._onward.indptr, threshold)
            dropped += cut * (1 - self._restart)
            flow = spread(flow, self._onward)
        if self._visits is not None:
            flow, cut = _pruned(flow, self._visits.indptr, threshold)
            dropped += cut
        dropped += flow.sums(self._missing[flow.nodes])
        total = self._looked_up(flow, added(stopped) if stopped else None)
        whole = total.sums() + dropped
        factor = np.repeat(1 / whole, np.diff(total.indptr))
        scores = (total.mass * factor).astype(np.float32)
        return total.with_mass(scores), dropped / whole

    def _looked_up(self, flow: Masses, stopped: Masses | None) -> Masses:
        """``stopped`` and the fingerprints of where the mass is, or what stops there."""
        if self._visits is not None and self._scale is not None:
            scaled = flow.with_mass(flow.mass * self._scale[flow.nodes])
            return spread(scaled, self._visits, stopped)
        stops = flow.with_mass(flow.mass * np.float32(self._restart))
        return stops if stopped is None else added([stopped, stops])

    @cached_property
    def _missing(self) -> NDArray[np.float32]:
        """The share of a mass at each node [n] that stops somewhere but is not looked up.

        With an index, what cutting the fingerprint to its largest entries lost; without, all that
        moves on.
        """
        index = self._index
        if index is None:
            return np.where(self._graph.out_degree > 0, 1 - self._restart, 0).astype(np.float32)
        if index.settings.keep is None:
            return np.zeros(self._graph.num_nodes, np.float32)
        kept = np.asarray(index.visits().sum(axis=1, dtype=np.float64))
        return ((index.totals - kept) * index.scale).astype(np.float32)


def _pruned(
    flow: Masses, ends: NDArray[Any], threshold: float | None
) -> tuple[Masses, NDArray[np.float64]]:
    """``flow`` without the masses that are too small to be spread, and their sum [sources].

    ``ends`` delimit the rows that the masses will be multiplied with: their lengths are the work.
    """
    work = ends[flow.nodes + 1] - ends[flow.nodes]
    cut = _over_budget(flow, work) if threshold is None else flow.mass < threshold
    cut &= work > 0
    if not cut.any():
        return flow, np.zeros(flow.sources)
    return flow.where(~cut), flow.sums(cut)


def _over_budget(flow: Masses, work: NDArray[Any]) -> NDArray[np.bool_]:
    """Entries beyond ``WORK`` of their source, counted from the largest mass down."""
    cut = np.zeros(len(work), bool)
    if int(work.sum()) <= WORK:
        return cut
    for start, stop in itertools.pairwise(flow.indptr):
        part = work[start:stop].astype(np.int64)
        if part.sum() > WORK:
            order = np.argsort(-flow.mass[start:stop], kind="stable")
            cut[start + order[np.cumsum(part[order]) > WORK]] = True
    return cut


def _rows(scores: Masses, dropped: NDArray[np.float64], top_k: int | None) -> list[Row]:
    """Each source's row, cut to its ``top_k`` best."""
    found = []
    for i, (start, stop) in enumerate(itertools.pairwise(scores.indptr)):
        nodes, values = scores.nodes[start:stop], scores.mass[start:stop]
        if top_k is not None:
            best = _best(nodes, values, top_k)
            nodes, values = nodes[best], values[best]
        found.append((nodes, values, float(dropped[i])))
    return found


def _best(nodes: NDArray[np.int32], values: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Positions of the ``k`` largest values in falling order, the smaller node where equal."""
    candidates = np.arange(len(values))
    if len(values) > k:
        smallest = np.partition(values, len(values) - k)[len(values) - k]
        candidates = np.flatnonzero(values >= smallest)
    return candidates[np.lexsort((nodes[candidates], -values[candidates]))][:k]


def _certain(lower: Masses, nodes: NDArray[np.int32], under_way: float) -> int:
    """How many of ``nodes`` no other node can overtake with the mass that is under way."""
    best = _best(lower.nodes, lower.mass, len(nodes) + 1)
    bounds = np.append(lower.mass[best], np.float32(0))
    for count in range(min(len(nodes), len(best)), 0, -1):
        ahead = bounds[count - 1] > bounds[count] + under_way
        if ahead and set(lower.nodes[best[:count]]) == set(nodes[:count]):
            return count
    return 0


def _joined(sources: NDArray[np.int64], rows: list[Row]) -> PPRResult:
    lengths = [len(nodes) for nodes, _, _ in rows]
    return PPRResult(
        sources,
        np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        np.concatenate([np.empty(0, np.int32), *(nodes for nodes, _, _ in rows)]),
        np.concatenate([np.empty(0, np.float32), *(scores for _, scores, _ in rows)]),
        np.array([dropped for _, _, dropped in rows], np.float32),
    )
