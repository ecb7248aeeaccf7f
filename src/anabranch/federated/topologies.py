"""Who is connected with whom: a star, a tree of aggregators, or a graph of peers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from anabranch.federated.errors import MixingMatrixError, TopologyError
from anabranch.federated.randomness import generator
from anabranch.federated.server import Accumulator, Server, Update

Record = Callable[[str, Accumulator], None]
"""``record(aggregator, partial)``: a partial result goes up from there."""


class Topology:
    """How the updates of one commit come together."""

    def check(self, server: Server) -> None:
        """Raise :class:`TopologyError` if this server cannot be used with it."""

    def settings(self) -> dict[str, Any]:
        """What identifies it, as JSON values."""
        return {"topology": type(self).__name__}

    def aggregate(self, server: Server, updates: Sequence[Update], record: Record) -> Accumulator:
        """Fold the updates in order; ``record`` what an aggregator passes on."""
        acc = None
        for update in updates:
            acc = server.fold(acc, update)
        return acc


class Star(Topology):
    """Every client talks to the coordinator."""


class Tree(Topology):
    """Aggregators between clients and coordinator (LIFL): leaves fold, inner nodes merge.

    ``children`` maps each aggregator to what sends to it, clients or other aggregators. The one
    that sends to nobody is the root, where the commit happens. A client that is in no list (it
    joined later) sends to the root.

    Example: ``Tree({"top": ["a", "b"], "a": ["client-1", "client-2"], "b": ["client-3"]})``.
    """

    def __init__(self, children: Mapping[str, Sequence[str]]) -> None:
        self.children = {name: list(below) for name, below in children.items()}
        listed = [child for below in self.children.values() for child in below]
        if twice := sorted({child for child in listed if listed.count(child) > 1}):
            raise TopologyError(f"tree: {', '.join(twice)} would send to two aggregators")
        roots = [name for name in self.children if name not in set(listed)]
        if len(roots) != 1:
            raise TopologyError(f"tree: one aggregator is the root, not {roots or 'a circle'}")
        self.root = roots[0]
        reached, todo = set(), [self.root]
        while todo:
            node = todo.pop()
            reached.add(node)
            todo += [child for child in self.children[node] if child in self.children]
        if lost := sorted(self.children.keys() - reached):
            raise TopologyError(f"tree: the root is not reached from {', '.join(lost)}")
        self._parent = {child: name for name, below in self.children.items() for child in below}

    @classmethod
    def balanced(cls, clients: Sequence[str], fan_in: int) -> Tree:
        """Aggregators of at most ``fan_in`` inputs each, in as few levels as that takes."""
        if fan_in < 2:
            raise TopologyError(f"fan_in is at least 2, not {fan_in}")
        children: dict[str, list[str]] = {}
        level, depth = list(clients), 0
        while len(level) > 1 or depth == 0:
            groups = [level[i : i + fan_in] for i in range(0, max(len(level), 1), fan_in)]
            level = [f"aggregator-{depth}-{index}" for index in range(len(groups))]
            children |= dict(zip(level, groups, strict=True))
            depth += 1
        return cls(children)

    def check(self, server: Server) -> None:
        """Partial results must mean something."""
        if not server.associative:
            raise TopologyError(
                f"a tree needs an associative server, whose partial results can be merged; "
                f"{type(server).__name__} needs all updates at once: use a star"
            )

    def settings(self) -> dict[str, Any]:
        """The whole tree."""
        return {**super().settings(), "children": self.children}

    def aggregate(self, server: Server, updates: Sequence[Update], record: Record) -> Accumulator:
        """The same as a star's up to rounding; each partial result is recorded."""
        own: dict[str, list[Update]] = {}
        for update in updates:
            own.setdefault(self._parent.get(update.client, self.root), []).append(update)

        def collect(node: str) -> Accumulator:
            total = super(Tree, self).aggregate(server, own.get(node, ()), record)
            for child in self.children[node]:
                if child in self.children and (part := collect(child)) is not None:
                    record(child, part)
                    total = part if total is None else server.merge(total, part)
            return total

        return collect(self.root)


class Graph(Topology):
    """Peers that average with their neighbours, by mixing weights of a matrix ``W`` [n, n].

    ``names`` are the clients of its rows, in order. W is symmetric and doubly stochastic, so that
    gossip keeps the mean; W_ij > 0 makes i and j neighbours.

    Example: ``Graph(names, metropolis(ring(len(names))))``.
    """

    def __init__(self, names: Sequence[str], weights: np.ndarray) -> None:
        weights = np.asarray(weights, dtype=np.float64)
        if weights.shape != (len(names), len(names)):
            raise MixingMatrixError(
                f"{len(names)} clients need a square matrix, not {weights.shape}"
            )
        check_mixing(weights)
        require_connected([weights > 0], names)
        self.names, self.weights = list(names), weights
        self._row = {name: row for row, name in enumerate(self.names)}

    def neighbours(self, name: str) -> dict[str, float]:
        """Mixing weights by name, this client's own included."""
        if name not in self._row:
            return {name: 1.0}
        row = self.weights[self._row[name]]
        return {self.names[column]: float(row[column]) for column in np.flatnonzero(row)}

    def settings(self) -> dict[str, Any]:
        """Names and weights."""
        return {**super().settings(), "names": self.names, "weights": self.weights.tolist()}


def ring(n: int) -> np.ndarray:
    """Adjacency [n, n] of a circle; two are one edge, one is alone."""
    edges = np.zeros((n, n), dtype=bool)
    for i in range(n):
        edges[i, (i + 1) % n] = edges[(i + 1) % n, i] = True
    return _plain(edges)


def torus(rows: int, columns: int) -> np.ndarray:
    """Adjacency of a grid without borders."""
    n = rows * columns
    edges = np.zeros((n, n), dtype=bool)
    for r in range(rows):
        for c in range(columns):
            here = r * columns + c
            for there in (((r + 1) % rows) * columns + c, r * columns + (c + 1) % columns):
                edges[here, there] = edges[there, here] = True
    return _plain(edges)


def exponential(n: int) -> np.ndarray:
    """Adjacency in which i is joined with i + 1, i + 2, i + 4, ... on a circle."""
    edges = np.zeros((n, n), dtype=bool)
    for i in range(n):
        hop = 1
        while hop < n:
            edges[i, (i + hop) % n] = edges[(i + hop) % n, i] = True
            hop *= 2
    return _plain(edges)


def complete(n: int) -> np.ndarray:
    """Adjacency in which everyone is joined with everyone."""
    return ~np.eye(n, dtype=bool)


def regular(n: int, degree: int, seed: int = 0) -> np.ndarray:
    """Adjacency of a random connected graph in which everyone has ``degree`` neighbours."""
    if not 0 <= degree < n or n * degree % 2:
        raise TopologyError(f"there is no graph of {n} nodes with {degree} neighbours each")
    for attempt in range(1000):
        rng = generator("regular graph", n, degree, seed, attempt)
        ends = rng.permutation(np.repeat(np.arange(n), degree)).reshape(-1, 2)
        edges = np.zeros((n, n), dtype=bool)
        edges[ends[:, 0], ends[:, 1]] = edges[ends[:, 1], ends[:, 0]] = True
        if (
            not edges.diagonal().any()
            and (edges.sum(1) == degree).all()
            and len(_parts(edges)) == 1
        ):
            return edges
    raise TopologyError(f"no connected graph of {n} nodes with {degree} neighbours was found")


def metropolis(edges: np.ndarray) -> np.ndarray:
    """Mixing weights of an undirected graph: 1 / (1 + the larger degree), the rest for oneself."""
    edges = _plain(np.asarray(edges, dtype=bool))
    if (edges != edges.T).any():
        raise TopologyError("the graph is directed; gossip needs edges that go both ways")
    degree = edges.sum(1)
    weights = np.where(edges, 1 / (1 + np.maximum.outer(degree, degree)), 0.0)
    weights[np.diag_indices(len(weights))] = 1 - weights.sum(1)
    return weights


def spectral(weights: np.ndarray) -> float:
    """The second largest absolute eigenvalue: how far a mixing step shrinks disagreement."""
    values = np.sort(np.abs(np.linalg.eigvalsh(weights)))
    return float(values[-2]) if len(values) > 1 else 0.0


def check_mixing(weights: np.ndarray, tolerance: float = 1e-6) -> None:
    """Raise :class:`MixingMatrixError` naming the row that breaks double stochasticity."""
    if not np.isfinite(weights).all() or (weights < 0).any():
        row = int(np.argwhere(~(np.isfinite(weights) & (weights >= 0)))[0, 0])
        raise MixingMatrixError(f"mixing weights: row {row} has a negative or infinite weight")
    if (off := np.abs(weights.sum(1) - 1) > tolerance).any():
        row = int(np.flatnonzero(off)[0])
        raise MixingMatrixError(f"mixing weights: row {row} sums to {weights[row].sum():g}, not 1")
    if (off := np.abs(weights - weights.T).max(1, initial=0) > tolerance).any():
        raise MixingMatrixError(
            f"mixing weights: row {int(np.flatnonzero(off)[0])} is not symmetric"
        )


def require_connected(graphs: Sequence[np.ndarray], names: Sequence[str]) -> None:
    """Raise :class:`TopologyError` listing the components of the union, if there are several."""
    parts = _parts(np.any(np.stack(graphs), axis=0)) if len(names) else []
    if len(parts) > 1:
        listed = "; ".join(", ".join(names[i] for i in part[:8]) for part in parts[:8])
        raise TopologyError(f"the graph falls into {len(parts)} parts: {listed}")


def _parts(edges: np.ndarray) -> list[list[int]]:
    left, parts = set(range(len(edges))), []
    while left:
        todo = [min(left)]
        part: set[int] = set()
        while todo:
            node = todo.pop()
            if node not in part:
                part.add(node)
                todo += np.flatnonzero(edges[node]).tolist()
        parts.append(sorted(part))
        left -= part
    return parts


def _plain(edges: np.ndarray) -> np.ndarray:
    return edges & ~np.eye(len(edges), dtype=bool)
