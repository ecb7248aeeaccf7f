"""``anabranch graph pagerank``: which nodes are near which."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from anabranch.cli.graph.options import Directed, File, Json, Relabel, Seed, Workers
from anabranch.cli.output import bytes_text, errors, out, print_json, progress


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
