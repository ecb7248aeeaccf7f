"""FastRP and PowerWalk on random graphs of growing size: seconds and peak memory.

    python -m benchmarks.graphs [--edges 1e6,1e7] [--dim 128] [--walks 20] [--workers 1]
                                [--json FILE]
    python -m benchmarks.graphs --peers [igraph,fast-pagerank,networkit,pecanpy] [--walks 1000]
                                [--json FILE]

Each cell runs in a process of its own, so that its peak is its own. Ten edges a node; memory is the
highest resident set, graph and interpreter included, without the making of the edges' list.

``--peers`` compares with other libraries instead, all of them or those named, see
:mod:`benchmarks.graphs.peers`; they get environments of their own below the cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from anabranch.claims.base import machine

PEERS = ("igraph", "fast-pagerank", "networkit", "pecanpy")
METHODS = ("fastrp", "fastrp, powers kept", "powerwalk")
CELL = """
import json, resource, sys, tempfile, time
import numpy as np
from anabranch.graphs import Graph
from anabranch.graphs.embedding import FastRP
from anabranch.graphs.ppr import PPRQuery, build_index

method, edges, dim, walks, workers = sys.argv[1], *map(int, sys.argv[2:])
nodes = edges // 10
pairs = np.random.default_rng(0).integers(0, nodes, (edges, 2), dtype=np.int32)
began = time.perf_counter()
graph = Graph.from_edges(pairs, num_nodes=nodes)
del pairs
cell = {"method": method, "nodes": nodes, "edges": graph.num_edges}
cell["seconds_to_build_graph"] = time.perf_counter() - began
began = time.perf_counter()
if method.startswith("fastrp"):
    FastRP(dim, keep_powers="kept" in method, workers=workers).fit(graph)
    cell["seconds"] = time.perf_counter() - began
else:
    with tempfile.TemporaryDirectory() as folder:
        index = build_index(graph, folder + "/index", walks=walks, workers=workers)
        cell["seconds"] = time.perf_counter() - began
        cell["index_megabytes"] = index.nbytes / 1e6
        query = PPRQuery(graph, index)
        sources = np.random.default_rng(1).choice(nodes, 200, replace=False)
        began = time.perf_counter()
        for source in sources:
            query.run([source], top_k=50)
        cell["milliseconds_a_query"] = (time.perf_counter() - began) / len(sources) * 1e3
if sys.platform == "linux":  # where getrusage begins with what the parent process had
    status = open("/proc/self/status").read()
    peak = int(status.split("VmHWM:")[1].split()[0])
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cell["peak_gigabytes"] = peak * (1 if sys.platform == "darwin" else 1024) / 1e9
print(json.dumps(cell))
"""


def main() -> None:
    options = arguments()
    cells = compared(options.peers, options.walks) if options.peers else grown(options)
    if options.json:
        report = {"machine": machine(), "options": vars(options), "cells": cells}
        options.json.write_text(json.dumps(report, indent=2, default=str) + "\n")


def grown(options: argparse.Namespace) -> list[dict[str, Any]]:
    cells = []
    for method in METHODS:
        for edges in options.edges:
            cell = measure(method, edges, options)
            cells.append(cell)
            print("  ".join(f"{key} {_short(value)}" for key, value in cell.items()))
    return cells


def compared(names: list[str], walks: int) -> list[dict[str, Any]]:
    from benchmarks.graphs import peers

    rows = []
    asked = itertools.chain(peers.pagerank(names, walks), peers.embedding(names))
    for row in asked:
        rows.append(row)
        print(peers.line(row), flush=True)
    return rows


def measure(method: str, edges: int, options: argparse.Namespace) -> dict[str, Any]:
    """One cell in a fresh interpreter."""
    numbers = (edges, options.dim, options.walks, options.workers)
    command = [sys.executable, "-c", CELL, method, *map(str, numbers)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ran.stdout)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.graphs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sizes = lambda text: [int(float(part)) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--edges", type=sizes, default=[10**6, 10**7])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument(
        "--peers",
        nargs="?",
        const=",".join(PEERS),
        default=[],
        type=lambda text: text.split(","),
        help="compare with other libraries: all, or those named",
    )
    parser.add_argument("--walks", type=int, help="20; 1,000 with --peers")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if unknown := set(options.peers) - set(PEERS):
        parser.error(f"no peer {', '.join(sorted(unknown))}; known: {', '.join(PEERS)}")
    if options.walks is None:
        options.walks = 1000 if options.peers else 20
    return options


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else f"{value}"


if __name__ == "__main__":
    main()
