"""``anabranch graph embed``: vectors of nodes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from anabranch.cli.graph.options import Directed, File, Json, Relabel, Seed, Workers
from anabranch.cli.output import out, print_json, progress

POINTS = 5000
"""Nodes that a plot shows at most."""


def embed(
    file: File,
    output: Annotated[Path, typer.Option("--output", "-o", help=".npz or .parquet.")],
    dim: Annotated[int, typer.Option(min=1, help="Columns.")] = 128,
    weights: Annotated[str, typer.Option(help="Of the walk's powers 1, 2, ...")] = "0,0,1,6.67",
    beta: Annotated[float, typer.Option(help="Below 0 damps hubs.")] = -0.64,
    directed: Directed = False,
    relabel: Relabel = False,
    plot: Annotated[
        Path | None, typer.Option(help="SVG of the two directions of most variance.")
    ] = None,
    workers: Workers = 1,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Embed the nodes with FastRP, without training."""
    from anabranch.files import write_text
    from anabranch.graphs import read_graph
    from anabranch.graphs.embedding import FastRP
    from anabranch.graphs.write import check_output, write_vectors

    check_output(output)
    embedder = FastRP(
        dim,
        weights=parse_weights(weights),
        beta=beta,
        keep_powers=False,
        workers=workers,
        seed=seed,
    )
    with progress() as report:
        report(f"reading {file}", None)
        graph = read_graph(file, directed=directed, relabel=relabel)
        report(f"embedding {graph.num_nodes:,} nodes", None)
        began = time.perf_counter()
        vectors = embedder.fit_transform(graph)
        seconds = time.perf_counter() - began
        report(f"writing {output}", None)
        write_vectors(output, graph, vectors)
        if plot is not None:
            report(f"drawing {plot}", None)
            write_text(plot, picture(vectors, seed))
    facts = {
        "nodes": graph.num_nodes,
        "edges": graph.num_edges,
        "columns": vectors.shape[1],
        "seconds": round(seconds, 3),
        "output": str(output),
        "plot": None if plot is None else str(plot),
    }
    if json:
        print_json(facts)
        return
    out.print(
        f"{graph.num_nodes:,} nodes, {graph.num_edges:,} edges: {dim} columns in {seconds:.2f} s"
    )
    out.print(str(output))
    if plot is not None:
        out.print(str(plot))


def parse_weights(text: str) -> tuple[float, ...]:
    """``"0,0,1"`` -> (0.0, 0.0, 1.0); a usage error for what are no numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} are no numbers; write for example 0,0,1,6.67") from None


def picture(vectors: Any, seed: int) -> str:
    """A scatter plot of the nodes on their first two principal components, as SVG."""
    import numpy as np

    from anabranch.evaluation.plotting import Plot, svg

    shown = vectors
    if len(vectors) > POINTS:
        shown = vectors[np.random.default_rng(seed).choice(len(vectors), POINTS, replace=False)]
    centred = shown - shown.mean(axis=0) if len(shown) else shown
    _, directions = np.linalg.eigh(centred.T @ centred)
    flat = centred @ directions[:, :-3:-1]
    if flat.shape[1] < 2:
        flat = np.column_stack([flat, np.zeros(len(flat))])
    points = [(float(x), float(y)) for x, y in flat]
    title = f"{len(shown):,} of {len(vectors):,} nodes"
    axes = "first principal component", "second principal component"
    return svg(Plot(title, *axes, {"nodes": points}, marks=("nodes",)))
