"""Other libraries on the same graph, in environments of their own: quality beside time.

Personalised PageRank: the same graph of a million edges, the same sources, precision@50 against
exact scores and processor milliseconds of one query. Embeddings: the same graph, the same number
of columns, micro- and macro-F1 of one classifier. A peer that cannot be built or run is a row that
says why.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anabranch.claims.graph_experiments import fastrp, powerwalk
from anabranch.claims.graph_experiments.powerwalk import BEST, LARGE_DRAWN, LARGE_NODES
from anabranch.graphs import Graph
from anabranch.graphs.embedding import FastRP
from anabranch.graphs.generators import planted_communities
from anabranch.graphs.node_labels import multilabel_node_f1
from anabranch.graphs.ppr import PPRQuery, build_index
from anabranch.graphs.ppr.exact import RESTART, Push
from benchmarks.peers.asking import PeerFailed, ask
from benchmarks.peers.environments import EnvironmentFailed, Recipe

PAGERANK = {
    "igraph": Recipe("igraph", ("igraph==1.0.0", "scipy")),
    "fast-pagerank": Recipe("fast-pagerank", ("fast-pagerank==1.0.0", "scipy")),
    "networkit": Recipe("networkit", ("networkit==11.3",)),
}
EMBEDDING = {"pecanpy": Recipe("pecanpy", ("pecanpy==2.0.9",))}
SOURCES = 10
KNOWN_LABELS = 0.1
PEER_SECONDS = 1800
Row = dict[str, Any]


def pagerank(names: Sequence[str], walks: int) -> Iterator[Row]:
    """Ours with one and two pushes, then every setting of the peers named, if they rank."""
    if not (asked := {name: PAGERANK[name] for name in names if name in PAGERANK}):
        return
    graph = planted_communities(LARGE_NODES, LARGE_DRAWN, LARGE_NODES // 200, inside=0.7).graph
    linked = np.flatnonzero(graph.out_degree > 0)
    sources = np.random.default_rng(0).choice(linked, SOURCES, replace=False)
    exact = Push(graph, RESTART).scores(sources, 60).T
    truth = np.argsort(-exact, axis=1, kind="stable")[:, :BEST]

    query = PPRQuery(graph, build_index(graph, walks=walks, keep=powerwalk.LARGE_KEEP))
    ours = {}
    for rounds in powerwalk.LARGE_ROUNDS:
        query.run(sources[:1], rounds=rounds, top_k=BEST)
        answers, seconds = [], []
        for source in sources:
            began = time.process_time()
            answers.append(query.run([source], rounds=rounds, top_k=BEST).nodes)
            seconds.append(time.process_time() - began)
        setting = f"{walks} walks, {rounds} pushes"
        yield _asked("anabranch", setting, answers, truth, float(np.median(seconds)))
        ours[rounds] = float(np.median(seconds))

    data = {"sources": sources, "best": np.array(BEST)}
    for peer, recipe in asked.items():
        try:
            facts, answers = _ask(peer, recipe, graph, data)
        except (EnvironmentFailed, PeerFailed) as reason:
            yield {"side": peer, "failed": str(reason)}
            continue
        for fact, nodes in zip(facts, answers, strict=True):
            row = _asked(peer, fact["setting"], nodes, truth, fact["seconds"])
            # The slower of ours is the more precise one.
            ratio = {f"times_of_{r}_pushes": round(fact["seconds"] / s, 1) for r, s in ours.items()}
            yield row | ratio


def embedding(names: Sequence[str], seed: int = 0) -> Iterator[Row]:
    """FastRP, and DeepWalk by the peers named, if they embed, on the graph of claim S48."""
    if not (asked := {name: EMBEDDING[name] for name in names if name in EMBEDDING}):
        return
    data, _, note = fastrp._data(seed)
    began = time.process_time()
    vectors = FastRP(fastrp.DIM, seed=seed).fit_transform(data.graph)
    spent = time.process_time() - began
    yield _classified("anabranch", f"FastRP; {note}", vectors, data.labels, spent)
    numbers = {
        "dim": fastrp.DIM,
        "walks": fastrp.WALKS,
        "length": fastrp.LENGTH,
        "window": fastrp.WINDOW,
        "seed": seed,
    }
    for peer, recipe in asked.items():
        try:
            facts, answers = _ask(
                peer, recipe, data.graph, {k: np.array(v) for k, v in numbers.items()}
            )
        except (EnvironmentFailed, PeerFailed) as reason:
            yield {"side": peer, "failed": str(reason)}
            continue
        setting, seconds = facts[0]["setting"], facts[0]["seconds"]
        for scaled in (False, True):
            found = fastrp._standardised(answers[0]) if scaled else answers[0]
            name = f"DeepWalk, {setting}{', standardised' if scaled else ''}"
            row = _classified(peer, name, found, data.labels, seconds)
            yield row | {"times_of_fastrp": round(seconds / spent, 1)}


def line(row: Row) -> str:
    """One row as text."""
    if "failed" in row:
        return f"{row['side']:14} cannot be measured: {row['failed']}"
    shown = "  ".join(f"{k} {v}" for k, v in row.items() if k not in ("side", "setting"))
    return f"{row['side']:14} {shown}  ({row['setting']})"


def _ask(
    peer: str, recipe: Recipe, graph: Graph, data: dict[str, NDArray[Any]]
) -> tuple[list[dict[str, Any]], list[NDArray[Any]]]:
    """Its settings with their seconds, and the array of each."""
    python = recipe.build()
    rows = np.repeat(np.arange(graph.num_nodes), graph.out_degree)
    once = rows < graph.indices
    edges = np.stack([rows[once], graph.indices[once]], axis=1).astype(np.int64)
    with tempfile.TemporaryDirectory() as folder:
        given, output = Path(folder) / "data.npz", Path(folder) / "answers.npz"
        np.savez(given, edges=edges, nodes=graph.num_nodes, **data)
        driver = Path(__file__).with_name("peer.py")
        facts: list[dict[str, Any]] = ask(
            python, driver, peer, given, output, folder=Path(folder), seconds=PEER_SECONDS
        )
        with np.load(output) as found:
            arrays = [found[str(number)] for number in range(len(found.files))]
    return facts, arrays


def _asked(side: str, setting: str, answers: Any, truth: NDArray[Any], seconds: float) -> Row:
    hits = [len(np.intersect1d(a, t)) / BEST for a, t in zip(answers, truth, strict=True)]
    return {
        "side": side,
        "setting": setting,
        f"precision@{BEST}": round(float(np.mean(hits)), 3),
        "milliseconds": round(seconds * 1e3, 3),
    }


def _classified(
    side: str, setting: str, vectors: NDArray[Any], labels: NDArray[np.bool_], seconds: float
) -> Row:
    f1 = multilabel_node_f1(vectors, labels, KNOWN_LABELS, seed=0)
    return {
        "side": side,
        "setting": setting,
        "micro_f1": round(f1.micro, 3),
        "macro_f1": round(f1.macro, 3),
        "processor_seconds": round(seconds, 2),
    }
