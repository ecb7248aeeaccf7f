"""PowerWalk against exact scores, power iteration and its own single queries."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anabranch.claims.base import Measurement
from anabranch.evaluation.plotting import Plot
from anabranch.graphs import Graph, GraphError
from anabranch.graphs.data import blogcatalog
from anabranch.graphs.generators import planted_communities
from anabranch.graphs.ppr import PPRIndex, PPRQuery, PPRResult, build_index, exact_ppr
from anabranch.graphs.ppr.exact import RESTART, Push
from anabranch.graphs.walks import Walker
from anabranch.models.progress import Progress, within

WALKS = (10, 50, 100)
ROUNDS = (0, 1, 2)
SOURCES = 20
BATCH = 1000
LARGE_NODES, LARGE_DRAWN = 100_000, 1_120_000
"""About 90 % of the drawn edges are distinct."""
LARGE_WALKS, LARGE_KEEP = 1000, 50
LARGE_SOURCES = 30
LARGE_ROUNDS = (1, 2)
"""One push is the quickest that is precise with so many walks, two are more precise."""
POWER_ROUNDS = (1, 2, 3, 4, 5, 6, 8, 10, 15)
BEST = 50


def measure(seed: int, progress: Progress) -> Measurement:
    """Error, then single queries, then the batch."""
    graph, note = _data(seed)
    errors, ends = _errors(graph, seed, within(progress, 0.0, 0.2))
    single, sparse = _large(seed, within(progress, 0.2, 0.9))
    progress("a batch and its queries one by one", 0.9)
    dense = _batch(PPRQuery(graph, build_index(graph, walks=50, seed=seed)), graph, 2, seed)
    slowest = min(row["times_faster"] for row in single["by_pushes"].values())
    least = min(dense["times_faster"], sparse["times_faster"])

    def l1(walks: int, rounds: int) -> float:
        return errors[f"{walks} walks"][f"{rounds} pushes"][0]

    accurate = (
        l1(50, 0) < ends
        and l1(50, 2) <= l1(50, 0) / 10
        and errors["50 walks"]["2 pushes"][1] >= 0.95
        and l1(10, 2) < l1(100, 0)
    )
    return Measurement(
        figures={
            "times_faster_than_power_iteration": slowest,
            "batch_times_faster_than_one_by_one": least,
            "l1_error_and_precision_at_100": errors,
            "l1_error_of_end_points_with_50_walks": round(ends, 3),
            "queries_on_a_million_edges": single,
            "batches": {"social network, 2 pushes": dense, "a million edges, 1 push": sparse},
            "data": note,
        },
        holds=accurate
        and slowest >= 10
        and least >= 3
        and dense["equal_bit_for_bit"]
        and sparse["equal_bit_for_bit"],
        seeds=(seed,),
        note="The ratios are the smallest of those listed. Power iteration gets the fewest rounds "
        "that reach the query's mean precision, which nobody knows beforehand; to an error of 1e-9 "
        "it takes 133. Its time grows with the edges of the graph, a query's with those near its "
        "source. Pushing alone is our query without an index, with the fewest rounds as well. On "
        "the social network a batch shares rows; on the million edges its sources reach few nodes "
        "in common, and what they share is the cost of a call.",
        plots=(_plot(errors),),
    )


def _data(seed: int) -> tuple[Graph, str]:
    try:
        return blogcatalog().graph, "BlogCatalog"
    except GraphError as error:
        # Degrees as unequal as the real one's.
        made = planted_communities(10_000, 500_000, 40, inside=0.25, spread=1.5, seed=seed).graph
        return made, f"MADE GRAPH of overlapping communities: {error}"


def _errors(graph: Graph, seed: int, progress: Progress) -> tuple[dict[str, Any], float]:
    """Mean L1 error and precision@100 by walks and pushes; the L1 error of end points."""
    sources = _sources(graph, SOURCES, seed)
    progress("exact scores", 0.0)
    exact = exact_ppr(graph, sources)
    found: dict[str, Any] = {}
    for i, walks in enumerate(WALKS):
        progress(f"{walks} walks from each node", (i + 1) / (len(WALKS) + 1))
        index = build_index(graph, walks=walks, seed=seed)
        query = PPRQuery(graph, index)
        row: dict[str, Any] = {"index_megabytes": round(index.nbytes / 1e6, 2)}
        for rounds in ROUNDS:
            scores = _dense(query.run(sources, rounds=rounds), graph.num_nodes)
            error = np.abs(scores - exact).sum(axis=1).mean()
            precision = np.mean(
                [_precision(*pair, 100) for pair in zip(scores, exact, strict=True)]
            )
            row[f"{rounds} pushes"] = [round(float(error), 3), round(float(precision), 3)]
        found[f"{walks} walks"] = row
    ends = _end_points(graph, sources, 50, seed)
    return found, float(np.abs(ends - exact).sum(axis=1).mean())


def _end_points(
    graph: Graph, sources: NDArray[np.int64], walks: int, seed: int
) -> NDArray[np.float64]:
    """The estimator that counts only where walks stop [sources, n]; every node has out-edges."""
    walker, generator = Walker(graph), np.random.default_rng(seed)
    counts = np.zeros((len(sources), graph.num_nodes))
    owner = np.repeat(np.arange(len(sources)), walks)
    at = np.repeat(sources.astype(np.int32), walks)
    while len(at):
        stops = generator.random(len(at)) < RESTART
        np.add.at(counts, (owner[stops], at[stops]), 1 / walks)
        owner, at = owner[~stops], walker.step(at[~stops], generator)
    return counts


def _large(seed: int, progress: Progress) -> tuple[dict[str, Any], dict[str, Any]]:
    """On a million edges: single queries against power iteration, and a batch against them."""
    progress("a graph of a million edges", 0.0)
    graph = planted_communities(
        LARGE_NODES, LARGE_DRAWN, LARGE_NODES // 200, inside=0.7, seed=seed
    ).graph
    sources = _sources(graph, LARGE_SOURCES, seed)
    push = Push(graph, RESTART)
    progress("exact scores", 0.1)
    truth = [_best(scores, BEST) for scores in push.scores(sources, 60).T]
    progress(f"{LARGE_WALKS} walks from each node", 0.2)
    index, build_seconds = _timed(
        lambda: build_index(graph, walks=LARGE_WALKS, keep=LARGE_KEEP, seed=seed)
    )
    query = PPRQuery(graph, index)
    progress("queries", 0.8)
    singles = {
        "edges": graph.num_edges,
        "by_pushes": {
            str(rounds): _against_power(query, graph, index, rounds, sources, truth, push)
            for rounds in LARGE_ROUNDS
        },
        "index": {
            "walks": LARGE_WALKS,
            "kept of each node": LARGE_KEEP,
            "megabytes": round(index.nbytes / 1e6, 1),
            "seconds to build": round(build_seconds, 1),
        },
    }
    return singles, _batch(query, graph, LARGE_ROUNDS[0], seed)


def _against_power(
    query: PPRQuery,
    graph: Graph,
    index: PPRIndex,
    rounds: int,
    sources: NDArray[np.int64],
    truth: list[NDArray[Any]],
    push: Push,
) -> dict[str, Any]:
    """One query at a time, and what takes as few rounds as are as precise."""

    def ask(asked: PPRQuery, pushes: int) -> Callable[..., NDArray[Any]]:
        asked.run(sources[:1], rounds=pushes, top_k=BEST)
        return lambda source: asked.run([source], rounds=pushes, top_k=BEST).nodes

    def iterate(pushes: int) -> Callable[..., NDArray[Any]]:
        return lambda source: np.argpartition(-push.scores(np.array([source]), pushes)[:, 0], BEST)[
            :BEST
        ]

    alone = PPRQuery(graph)
    answers, seconds = _each(sources, ask(query, rounds))
    wanted = _shared(answers, truth)
    _, in_numpy = _each(sources, ask(PPRQuery(graph, index, compiled=False), rounds))
    found = {
        "query": (wanted, seconds),
        **_as_precise("power iteration", iterate, wanted, sources, truth),
        **_as_precise("pushing alone", lambda pushes: ask(alone, pushes), wanted, sources, truth),
    }
    power = next(name for name in found if name.startswith("power"))
    milliseconds = {name: float(np.median(spent)) * 1e3 for name, (_, spent) in found.items()}
    return {
        "times_faster": round(milliseconds[power] / milliseconds["query"], 1),
        "precision_at_50": {name: round(reached, 3) for name, (reached, _) in found.items()},
        "milliseconds": {
            **{name: round(spent, 3) for name, spent in milliseconds.items()},
            "query in NumPy": round(float(np.median(in_numpy)) * 1e3, 3),
        },
    }


def _as_precise(
    name: str,
    method: Callable[[int], Callable[..., NDArray[Any]]],
    wanted: float,
    sources: NDArray[np.int64],
    truth: list[NDArray[Any]],
) -> dict[str, tuple[float, list[float]]]:
    """Precision and seconds of a source with the fewest rounds that reach the precision."""
    for rounds in POWER_ROUNDS:
        answers, seconds = _each(sources, method(rounds))
        if (reached := _shared(answers, truth)) >= wanted:
            break
    return {f"{name}, {rounds} rounds": (reached, seconds)}


def _batch(query: PPRQuery, graph: Graph, rounds: int, seed: int) -> dict[str, Any]:
    """1,000 sources together, between the first and the second half of them one by one."""
    sources = _sources(graph, BATCH, seed + 1)
    first, second = np.array_split(sources, 2)

    def one_by_one(part: NDArray[np.int64]) -> list[PPRResult]:
        return [query.run([s], rounds=rounds, top_k=BEST) for s in part]

    singles, apart = _timed(lambda: one_by_one(first))
    result, together = _timed(lambda: query.run(sources, rounds=rounds, top_k=BEST))
    others, spent = _timed(lambda: one_by_one(second))
    apart += spent
    equal = all(
        np.array_equal(mine, alone)
        for i, single in enumerate([*singles, *others])
        for mine, alone in zip(result.row(i), (single.nodes, single.scores), strict=True)
    )
    return {
        "times_faster": round(apart / together, 2),
        "seconds": {"together": round(together, 3), "one by one": round(apart, 3)},
        "equal_bit_for_bit": equal,
        "sources": len(sources),
    }


def _sources(graph: Graph, count: int, seed: int) -> NDArray[np.int64]:
    """Random nodes with edges."""
    linked = np.flatnonzero(graph.out_degree > 0)
    return np.random.default_rng(seed).choice(linked, count, replace=False)


def _dense(result: PPRResult, n: int) -> NDArray[np.float64]:
    scores = np.zeros((len(result.sources), n))
    for i, row in enumerate(scores):
        nodes, values = result.row(i)
        row[nodes] = values
    return scores


def _best(scores: NDArray[Any], k: int) -> NDArray[np.int64]:
    return np.argsort(-scores, kind="stable")[:k]


def _each(
    sources: NDArray[np.int64], ask: Callable[..., NDArray[Any]]
) -> tuple[list[NDArray[Any]], list[float]]:
    """Answers and processor seconds, one source after the other and nothing in between."""
    timed = [_timed(lambda s=source: ask(s)) for source in sources]
    return [answer for answer, _ in timed], [seconds for _, seconds in timed]


def _shared(answers: list[NDArray[Any]], truth: list[NDArray[Any]]) -> float:
    """Mean share of the truth that the answers hold."""
    pairs = zip(answers, truth, strict=True)
    return float(np.mean([len(np.intersect1d(found, best)) / len(best) for found, best in pairs]))


def _precision(found: NDArray[Any], exact: NDArray[Any], k: int) -> float:
    return len(np.intersect1d(_best(found, k), _best(exact, k))) / k


def _timed(work: Any) -> tuple[Any, float]:
    """What ``work`` returns, and the processor seconds it took."""
    began = time.process_time()
    result = work()
    return result, time.process_time() - began


def _plot(errors: dict[str, Any]) -> Plot:
    return Plot(
        "Personalised PageRank: error by index size",
        "index in MB",
        "L1 error",
        {
            f"{rounds} pushes": [
                (row["index_megabytes"], row[f"{rounds} pushes"][0]) for row in errors.values()
            ]
            for rounds in ROUNDS
        },
        x_scale="log",
    )
