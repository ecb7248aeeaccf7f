"""One peer's answers, in an environment of its own (``benchmarks.graphs --peers``).

    python benchmarks/graphs/peer.py PEER DATA OUTPUT

``DATA`` is an ``.npz`` with ``edges`` [m, 2] (each undirected edge once), ``nodes`` and what the
task needs. Knows nothing of Anabranch. PageRank: for each of ``sources`` the ``best`` nodes by each
setting, and the processor seconds of each query; the graph is loaded before the clock starts.
Embeddings: the vectors [nodes, dim] and the processor seconds of walks and training.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

RESTART = 0.15
Ask = Callable[[int], Any]
"""Scores of all nodes, or pairs of node and score, for a source."""


def igraph_pagerank(data: Any) -> Iterator[tuple[str, Ask]]:
    import igraph

    graph = igraph.Graph(n=int(data["nodes"]), edges=data["edges"])
    yield (
        "PRPACK, exact",
        lambda source: graph.personalized_pagerank(damping=1 - RESTART, reset_vertices=[source]),
    )


def fast_pagerank_pagerank(data: Any) -> Iterator[tuple[str, Ask]]:
    from fast_pagerank import pagerank_power
    from scipy import sparse

    nodes = int(data["nodes"])
    edges = np.concatenate([data["edges"], data["edges"][:, ::-1]])
    ones = np.ones(len(edges))
    matrix = sparse.csr_matrix((ones, (edges[:, 0], edges[:, 1])), shape=(nodes, nodes))

    def asking(tolerance: float) -> Ask:
        def ask(source: int) -> Any:
            start = np.zeros(nodes)
            start[source] = 1
            return pagerank_power(matrix, p=1 - RESTART, personalize=start, tol=tolerance)

        return ask

    for tolerance in (1e-2, 1e-3, 1e-6):
        yield f"power iteration, tolerance {tolerance:g}", asking(tolerance)


def networkit_pagerank(data: Any) -> Iterator[tuple[str, Ask]]:
    """Its local push, of the lazy walk: alpha is c / (2 - c) for the restart c."""
    import networkit

    networkit.setNumberOfThreads(1)
    graph = networkit.Graph(int(data["nodes"]))
    for a, b in data["edges"].tolist():
        graph.addEdge(a, b)

    def asking(epsilon: float) -> Ask:
        def ask(source: int) -> Any:
            alpha = RESTART / (2 - RESTART)
            return networkit.scd.ApproximatePageRank(graph, alpha, epsilon).run(source)

        return ask

    for epsilon in (1e-4, 1e-5, 1e-6):
        yield f"local push, epsilon {epsilon:g}", asking(epsilon)


def pagerank(settings: Iterator[tuple[str, Ask]], data: Any, output: str) -> None:
    answers: dict[str, Any] = {}
    facts = []
    best = int(data["best"])
    for number, (setting, ask) in enumerate(settings):
        ask(int(data["sources"][0]))
        nodes, seconds = [], []
        for source in data["sources"].tolist():
            began = time.process_time()
            found = ask(source)
            seconds.append(time.process_time() - began)
            nodes.append(_best(found, best))
        answers[str(number)] = np.array(nodes)
        facts.append({"setting": setting, "seconds": float(np.median(seconds))})
    np.savez(output, **answers)
    print(json.dumps(facts))


def _best(found: Any, count: int) -> list[int]:
    """The best nodes, -1 in the last places where there are fewer."""
    if isinstance(found, list) and found and isinstance(found[0], tuple):
        ranked = [node for node, _ in sorted(found, key=lambda pair: -pair[1])]
    else:
        ranked = np.argsort(-np.asarray(found), kind="stable").tolist()
    return (ranked + [-1] * count)[:count]


def pecanpy_embedding(data: Any, output: str) -> None:
    """DeepWalk: node2vec without a bias of the walks, by its compiled walker and gensim."""
    from gensim.models import Word2Vec
    from pecanpy.pecanpy import FirstOrderUnweighted

    edges = np.concatenate([data["edges"], data["edges"][:, ::-1]])
    nodes = int(data["nodes"])
    order = np.lexsort((edges[:, 1], edges[:, 0]))
    ends = np.concatenate([[0], np.cumsum(np.bincount(edges[:, 0], minlength=nodes))])
    graph = FirstOrderUnweighted(p=1, q=1, workers=1, verbose=False, random_state=int(data["seed"]))
    graph.indptr = ends.astype(np.uint32)
    graph.indices = edges[order, 1].astype(np.uint32)
    graph.data = np.ones(len(edges), np.float32)
    graph.set_node_ids([str(node) for node in range(nodes)])
    graph.preprocess_transition_probs()
    graph.simulate_walks(1, 2)  # the walker is compiled on its first use
    began = time.process_time()
    walks = graph.simulate_walks(int(data["walks"]), int(data["length"]))
    walked = time.process_time() - began
    model = Word2Vec(
        walks,
        vector_size=int(data["dim"]),
        window=int(data["window"]),
        sg=1,
        min_count=0,
        epochs=1,
        workers=1,
        seed=int(data["seed"]) + 1,
    )
    seconds = time.process_time() - began
    vectors = model.wv[[str(node) for node in range(nodes)]]
    np.savez(output, **{"0": vectors})
    setting = f"{int(data['walks'])} walks of {int(data['length'])}, 1 epoch"
    print(json.dumps([{"setting": setting, "seconds": seconds, "seconds_of_walks": walked}]))


PAGERANK = {
    "igraph": igraph_pagerank,
    "fast-pagerank": fast_pagerank_pagerank,
    "networkit": networkit_pagerank,
}


def main() -> None:
    peer, path, output = sys.argv[1:]
    with np.load(path) as file:
        data = dict(file)
    if peer in PAGERANK:
        pagerank(PAGERANK[peer](data), data, output)
    else:
        pecanpy_embedding(data, output)


if __name__ == "__main__":
    main()
