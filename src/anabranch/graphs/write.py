"""Node vectors and scores to files, whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anabranch.errors import MissingExtra
from anabranch.files import replacing
from anabranch.graphs.errors import GraphError
from anabranch.graphs.graph import Graph
from anabranch.graphs.ppr.query import PPRResult


def names_of(graph: Graph, rows: NDArray[np.integer] | None = None) -> NDArray[np.generic]:
    """The nodes' ids, of all or of some rows; the row numbers if the graph has none."""
    ids = np.arange(graph.num_nodes) if graph.ids is None else graph.ids
    return ids if rows is None else ids[rows]


def write_vectors(path: str | os.PathLike[str], graph: Graph, vectors: NDArray[np.float32]) -> None:
    """``.npz`` with ``nodes`` [n] and ``vectors`` [n, dim], or ``.parquet`` with a list a row."""
    target, nodes = Path(path), names_of(graph)
    if target.suffix == ".npz":
        write_npz(target, nodes=nodes, vectors=vectors)
    else:
        width = vectors.shape[1]
        write_parquet(target, {"node": nodes, "vector": vectors.ravel()}, {"vector": width})


def write_scores(path: str | os.PathLike[str], graph: Graph, result: PPRResult) -> None:
    """One entry a pair: ``source``, ``node``, ``score``; as ``.npz`` or ``.parquet``."""
    columns = {
        "source": names_of(graph, np.repeat(result.sources, np.diff(result.indptr))),
        "node": names_of(graph, result.nodes),
        "score": result.scores,
    }
    if Path(path).suffix == ".npz":
        write_npz(Path(path), **columns)
    else:
        write_parquet(Path(path), columns, {})


def check_output(path: Path) -> None:
    """Refuse a file that could not be written, before the work."""
    if path.suffix not in (".npz", ".parquet"):
        raise GraphError(f"{path}: results are written as .npz or .parquet")
    if path.suffix == ".parquet":
        _pyarrow()


def write_npz(path: Path, **arrays: NDArray[np.generic]) -> None:
    """Arrays by name, whole or not at all."""
    with replacing(path) as draft, draft.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def write_parquet(
    path: Path, columns: dict[str, NDArray[np.generic]], widths: dict[str, int]
) -> None:
    """Columns by name; one in ``widths`` holds a list of so many values in each row."""
    pyarrow = _pyarrow()
    from pyarrow import parquet

    arrays = {}
    for name, values in columns.items():
        plain = values.tolist() if values.dtype.kind == "U" else values
        array = pyarrow.array(plain)
        if name in widths:
            array = pyarrow.FixedSizeListArray.from_arrays(array, widths[name])
        arrays[name] = array
    with replacing(path) as draft:
        parquet.write_table(pyarrow.table(arrays), draft)


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise MissingExtra("pyarrow", "parquet") from None
    return pyarrow
