"""Options that several commands on graphs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
Interactions = Annotated[
    Path, typer.Argument(help="Table of user, item (.csv, .tsv, .parquet, .npz) or lists (.txt).")
]
MinRating = Annotated[
    float | None, typer.Option(help="Leave out interactions with a lower rating.")
]
