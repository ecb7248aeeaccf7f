"""``anabranch graph hash``: which ids may share a row of an embedding table."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from anabranch.cli.graph.options import Interactions, Json, MinRating, Seed
from anabranch.cli.graph.warned import shown_warnings
from anabranch.cli.output import out, print_json, progress

SIZES = (0.1, 0.25, 0.5, 0.75)
"""Shares of the rows that ``--plot`` trains with."""


def hash_(
    file: Interactions,
    output: Annotated[Path, typer.Option("--output", "-o", help=".npz or .parquet.")],
    budget: Annotated[
        float | None, typer.Option(help="Share of one row for each id to keep; 0.25 by default.")
    ] = None,
    resolution: Annotated[
        float | None, typer.Option(help="Instead of a budget: larger for more clusters.")
    ] = None,
    double: Annotated[
        bool, typer.Option("--double", help="Add a hashed row to each cluster's.")
    ] = False,
    merge_isolated: Annotated[
        bool, typer.Option("--merge-isolated", help="Ids without interactions share rows.")
    ] = False,
    min_rating: MinRating = None,
    plot: Annotated[
        Path | None, typer.Option(help="SVG of recall by table size; trains some minutes.")
    ] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Cluster users and items, and give every cluster one row of each table (GraphHash).

    Give the interactions that are trained on, not the held-out ones.
    """
    from anabranch.graphs.recommend import read_interactions
    from anabranch.graphs.recommend.hashing import DoubleGraphHash, GraphHash
    from anabranch.graphs.recommend.write import write_rows
    from anabranch.graphs.write import check_output

    check_output(output)
    if budget is None and resolution is None:
        budget = 0.25
    mapper = (DoubleGraphHash if double else GraphHash)(
        budget=budget, resolution=resolution, merge_isolated=merge_isolated, seed=seed
    )
    with shown_warnings(), progress() as report:
        report(f"reading {file}", None)
        whole = read_interactions(file)
        if min_rating is not None:
            whole = whole.rated_at_least(min_rating).compact()
        report(f"clustering {whole.num_users:,} users and {whole.num_items:,} items", None)
        began = time.perf_counter()
        mapper.fit(whole)
        seconds = time.perf_counter() - began
        write_rows(output, whole, mapper)
        if plot is not None:
            _draw(plot, whole, seed, report)
    user_rows, item_rows = mapper.num_rows_
    facts = {
        "users": whole.num_users,
        "items": whole.num_items,
        "user_rows": user_rows,
        "item_rows": item_rows,
        "reduction": round(mapper.reduction_, 4),
        # A row for each id is found without clustering.
        "resolution": None if budget == 1 else round(mapper.resolution_, 4),
        "modularity": round(mapper.modularity_, 4),
        "seconds": round(seconds, 3),
        "output": str(output),
        "plot": plot and str(plot),
    }
    if json:
        print_json(facts)
        return
    out.print(
        f"{whole.num_users:,} users in {user_rows:,} rows, {whole.num_items:,} items in "
        f"{item_rows:,}: {mapper.reduction_:.1%} fewer, modularity {mapper.modularity_:.3f}"
    )
    for path in (output, plot):
        if path is not None:
            out.print(str(path))


def _draw(path: Path, whole: Any, seed: int, report: Any) -> None:
    """Recall of matrix factorisation on tables of several sizes, beside hashed ones."""
    from anabranch.evaluation.plotting import Plot, svg
    from anabranch.files import write_text
    from anabranch.graphs.recommend import MatrixFactorization
    from anabranch.graphs.recommend.hashing import Frequency, GraphHash, IdMapper, Modulo

    train, test = whole.split(seed=seed)
    train, validation = train.split("random", 0.1, seed, "validation")

    def recall(mapper: IdMapper | None) -> float:
        model = MatrixFactorization(epochs=40, patience=4, mapper=mapper, seed=seed)
        model.fit(train, validation=validation)
        return model.evaluate(test, denominator="capped").recall

    series: dict[str, list[tuple[float, float]]] = {"GraphHash": [], "frequency": [], "modulo": []}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* no interaction")
        for i, size in enumerate(SIZES):
            report(f"training with {size:.0%} of the rows", i / len(SIZES))
            graph = GraphHash(budget=size, merge_isolated=True, seed=seed).fit(train)
            rows = graph.num_rows_
            kept = 1 - graph.reduction_
            mappers = (graph, Frequency(rows=rows), Modulo(rows=rows))
            for points, mapper in zip(series.values(), mappers, strict=True):
                points.append((kept, recall(mapper)))
        levels = {"a row for each id": recall(None)}
    axes = "share of the rows", "recall@20, capped"
    write_text(path, svg(Plot("Recall by size of the tables", *axes, series, levels=levels)))
