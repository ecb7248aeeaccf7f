"""``anabranch graph``: vectors of nodes, and which nodes are near which."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from anabranch.cli.output import bytes_text, errors, out, print_json, progress

app = typer.Typer(help="Graphs: node embeddings and personalised PageRank.", no_args_is_help=True)

File = Annotated[
    Path, typer.Argument(help="Edge list (.txt, .csv, .parquet, .npz) or a sparse matrix (.npz).")
]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]
Directed = Annotated[bool, typer.Option("--directed", help="Edges lead from first to second.")]
Relabel = Annotated[
    bool, typer.Option("--relabel", help="Integers are names, too, not row numbers.")
]
Workers = Annotated[int, typer.Option(min=1, help="Cores to use.")]
Seed = Annotated[int, typer.Option(help="Of the random numbers.")]

POINTS = 5000
"""Nodes that a plot shows at most."""


@app.command("embed")
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


@app.command("pagerank")
def pagerank(
    file: File,
    source: Annotated[list[str], typer.Option("--source", "-s", help="A node; may be repeated.")],
    top: Annotated[int, typer.Option(min=1, help="Nodes to show for each source.")] = 10,
    index: Annotated[
        Path | None, typer.Option(help="Folder of the walk index; built if it is not there.")
    ] = None,
    walks: Annotated[int, typer.Option(min=1, help="From each node, for a new index.")] = 50,
    rounds: Annotated[int, typer.Option(min=0, help="Exact pushes before the index.")] = 2,
    restart: Annotated[float, typer.Option(help="Probability to stop at each node.")] = 0.15,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Scores as .npz or .parquet, too.")
    ] = None,
    directed: Directed = False,
    relabel: Relabel = False,
    workers: Workers = 1,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Rank the nodes near each source by personalised PageRank (PowerWalk)."""
    from anabranch.graphs import read_graph
    from anabranch.graphs.ppr import PPRIndex, PPRQuery, build_index
    from anabranch.graphs.write import check_output, names_of, write_scores

    if output is not None:
        check_output(output)
    with progress() as report:
        report(f"reading {file}", None)
        graph = read_graph(file, directed=directed, relabel=relabel)
        rows = parse_nodes(graph, source)
        if index is not None and index.exists():
            walked = PPRIndex.load(index, graph)
        else:
            walked = build_index(
                graph,
                index,
                walks=walks,
                restart=restart,
                seed=seed,
                workers=workers,
                progress=report,
            )
        query = PPRQuery(graph, walked, restart=restart)
        report("querying", None)
        began = time.perf_counter()
        result = query.run(rows, rounds=rounds, top_k=top, workers=workers)
        seconds = time.perf_counter() - began
        if output is not None:
            write_scores(output, graph, result)
    answers = [
        {
            "source": name,
            "nodes": names_of(graph, result.row(i)[0]).tolist(),
            "scores": [round(score, 8) for score in result.row(i)[1].tolist()],
            "dropped": round(float(result.dropped[i]), 8),
        }
        for i, name in enumerate(names_of(graph, result.sources).tolist())
    ]
    if json:
        facts = {"walks": walked.settings.walks, "index_bytes": walked.nbytes}
        print_json({**facts, "seconds": round(seconds, 4), "answers": answers})
        return
    for answer in answers:
        table = Table("node", "score", box=None, pad_edge=False, title=f"{answer['source']}")
        for node, score in zip(answer["nodes"], answer["scores"], strict=True):
            table.add_row(str(node), f"{score:.5f}")
        out.print(table)
    errors.print(
        f"{len(answers)} queries in {seconds:.3f} s, index of {bytes_text(walked.nbytes)}",
        style="dim",
    )


def parse_weights(text: str) -> tuple[float, ...]:
    """``"0,0,1"`` -> (0.0, 0.0, 1.0); a usage error for what are no numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} are no numbers; write for example 0,0,1,6.67") from None


def parse_nodes(graph: Any, names: list[str]) -> Any:
    """Nodes as the graph names them: strings, or whole numbers."""
    import numpy as np

    if graph.ids is not None and graph.ids.dtype.kind == "U":
        wanted = np.array(names)
    else:
        try:
            wanted = np.array([int(name) for name in names], np.int64)
        except (ValueError, OverflowError):
            raise typer.BadParameter(
                f"the nodes of this graph are numbers, not {', '.join(names)}"
            ) from None
    graph.positions(wanted)  # an unknown one is refused before the walks
    return wanted


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
