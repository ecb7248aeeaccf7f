"""Edge lists from files: text, CSV, NumPy and Parquet."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from anabranch.errors import MissingExtra
from anabranch.graphs.errors import GraphError
from anabranch.graphs.graph import Duplicates, Graph

_PACKED: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_TEXT = (".txt", ".edges", ".edgelist", ".csv", ".tsv")


def read_graph(
    path: str | os.PathLike[str],
    *,
    directed: bool = False,
    duplicates: Duplicates | None = None,
    relabel: bool = False,
) -> Graph:
    """A graph from a file with one edge a row: source, target and perhaps weight.

    ``.txt``, ``.edges``, ``.edgelist``: columns with white space between, ``#`` or ``%`` begins a
    comment. ``.csv``, ``.tsv``: the same with a header line or none. Each of them also packed with
    ``.gz``, ``.xz`` or ``.bz2``. ``.parquet``: the first two columns, and ``weight`` if there.
    ``.npz``: an array ``edges`` [m, 2] or [m, 3] with, if there, ``weights`` [m] and ``num_nodes``;
    or a matrix that ``scipy.sparse.save_npz`` wrote. Names that are no integers become ids in
    sorted order, integers too with ``relabel``; otherwise these are row numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise GraphError(f"there is no file {path}")
    suffix = Path(path.stem).suffix if path.suffix in _PACKED else path.suffix
    num_nodes = None
    if suffix == ".npz":
        found = _numpy(path)
        if isinstance(found, Graph):
            return found
        pairs, weights, num_nodes = found
    elif suffix == ".parquet":
        pairs, weights = _parquet(path)
    elif suffix in _TEXT:
        pairs, weights = _text(path, _SEPARATORS.get(suffix))
    else:
        raise GraphError(f"{path}: graphs are read from {', '.join((*_TEXT, '.npz', '.parquet'))}")
    names = relabel or pairs.dtype.kind in "US"
    try:
        return Graph.from_edges(
            pairs,
            weights,
            num_nodes=None if names else num_nodes,
            directed=directed,
            duplicates=duplicates,
            relabel=names,
        )
    except GraphError as error:
        raise GraphError(f"{path}: {error}") from None


def _numpy(path: Path) -> Graph | tuple[NDArray[Any], Any, int | None]:
    try:
        with np.load(path, allow_pickle=False) as file:
            if "edges" in file:
                num_nodes = int(file["num_nodes"]) if "num_nodes" in file else None
                return file["edges"], file.get("weights"), num_nodes
            names = ", ".join(file) or "nothing"
            is_matrix = "format" in file
        if is_matrix:
            return Graph.from_matrix(sparse.load_npz(path))
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise GraphError(f"{path} cannot be read: {error}") from None
    raise GraphError(f"{path} has {names}, but neither an array 'edges' nor a sparse matrix")


def parquet_table(path: Path, failure: type[GraphError] = GraphError) -> Any:
    """A Parquet file as an Arrow table."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingExtra("pyarrow", "parquet") from None
    try:
        return parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise failure(f"{path} cannot be read: {error}") from None


def _parquet(path: Path) -> tuple[NDArray[Any], Any]:
    table = parquet_table(path)
    if table.num_columns < 2:
        raise GraphError(f"{path} has {table.num_columns} columns; source and target are needed")
    ends = [np.asarray(table.column(i).to_pylist() or np.empty(0, np.int64)) for i in (0, 1)]
    weights = table.column("weight").to_numpy() if "weight" in table.column_names else None
    return np.stack(ends, axis=1), weights


def _text(path: Path, separator: str | None) -> tuple[NDArray[Any], Any]:
    if (pairs := _integers(path, separator)) is not None:
        return pairs, None
    opened = _PACKED.get(path.suffix, open)
    rows: list[list[str]] = []
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                line = line.strip()
                if not line or line[0] in "#%":
                    continue
                row = [cell.strip() for cell in line.split(separator)]
                if len(row) not in (2, 3) or "" in row or (rows and len(row) != len(rows[-1])):
                    expected = f"{len(rows[-1])}" if rows else "2 or 3"
                    raise GraphError(f"{path}, line {number}: {line!r} has not {expected} columns")
                rows.append(row)
    except (UnicodeDecodeError, EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise GraphError(f"{path} cannot be read: {error}") from None
    if separator and rows and not _numeric(rows[0][-1:]) and _header(rows):
        del rows[0]
    if not rows:
        return np.empty((0, 2), np.int64), None
    cells = np.array(rows)
    ends: NDArray[Any] = cells[:, :2]
    with contextlib.suppress(ValueError):  # they are names
        ends = ends.astype(np.int64)
    return ends, cells[:, 2] if cells.shape[1] == 3 else None


def _integers(path: Path, separator: str | None) -> NDArray[np.int64] | None:
    """A file of two columns of integers, the usual one, ten times faster; None for any other."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # an empty file
            pairs = np.loadtxt(path, np.int64, delimiter=separator, ndmin=2)
    except (ValueError, OSError, EOFError, lzma.LZMAError):
        return None
    return pairs if pairs.shape[1] == 2 and len(pairs) else None


def _header(rows: list[list[str]]) -> bool:
    """Whether the first row names the columns: the second one has numbers where it has words."""
    if len(rows) == 1:
        return True
    return _numeric(rows[1][-1:]) or rows[0][0].lower() in ("source", "src", "from")


def _numeric(cells: list[str]) -> bool:
    try:
        [float(cell) for cell in cells]
    except ValueError:
        return False
    return True
