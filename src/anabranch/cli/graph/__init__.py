"""``anabranch graph``: node vectors, personalised PageRank, recommenders."""

from __future__ import annotations

import typer

from anabranch.cli.graph.embed import embed
from anabranch.cli.graph.hash import hash_
from anabranch.cli.graph.pagerank import pagerank
from anabranch.cli.graph.recommend import recommend

app = typer.Typer(
    help="Graphs: node embeddings, personalised PageRank and recommenders.", no_args_is_help=True
)
app.command("embed")(embed)
app.command("pagerank")(pagerank)
app.command("recommend")(recommend)
app.command("hash")(hash_)
