"""Interactions from files: text tables, lists of items, NumPy, SciPy and Parquet."""

from __future__ import annotations

import bz2
import csv
import gzip
import lzma
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from anabranch.graphs.read import parquet_table
from anabranch.graphs.recommend.errors import RecommendError
from anabranch.graphs.recommend.interactions import Interactions

_PACKED: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
_SEPARATORS = {".csv": ",", ".tsv": "\t", ".inter": "\t"}
_NAMES = {
    "user": ("user", "user_id", "userid", "uid"),
    "item": ("item", "item_id", "itemid", "iid", "movie_id", "movieid"),
    "rating": ("rating", "stars", "score"),
    "time": ("time", "timestamp", "unixtime"),
}
"""Names of columns, in lower case."""


def read_interactions(path: str | os.PathLike[str], *, relabel: bool | None = None) -> Interactions:
    """Interactions from a file; what is read depends on its ending.

    ``.csv``, ``.tsv`` and ``.inter`` (RecBole's), also packed with ``.gz``, ``.xz`` or ``.bz2``:
    columns user, item and, if there, rating and time, named by a header line or in this order.
    ``.txt``: a line for each user, the user and then its items, as LightGCN's data sets are.
    ``.parquet``: columns of those names. ``.npz``: arrays of those names, with ``num_users`` and
    ``num_items`` if there, or a matrix [users, items] that ``scipy.sparse.save_npz`` wrote.

    Names become rows in sorted order. Whole numbers in a table are names, too, unless ``relabel``
    is False; in ``.txt`` and ``.npz`` files they are row numbers unless it is True.
    """
    path = Path(path)
    if not path.is_file():
        raise RecommendError(f"there is no file {path}")
    suffix = Path(path.stem).suffix if path.suffix in _PACKED else path.suffix
    names = suffix not in (".txt", ".npz") if relabel is None else relabel
    if suffix in _SEPARATORS:
        columns = _table(path, _SEPARATORS[suffix])
    elif suffix == ".txt":
        columns = _lists(path)
    elif suffix == ".parquet":
        columns = _parquet(path)
    elif suffix == ".npz":
        found = _numpy(path)
        if isinstance(found, Interactions):
            return found
        columns = found
    else:
        endings = ", ".join((*_SEPARATORS, ".txt", ".parquet", ".npz"))
        raise RecommendError(f"{path}: interactions are read from {endings}")
    try:
        return Interactions.from_pairs(**columns, relabel=names)
    except RecommendError as error:
        raise RecommendError(f"{path}: {error}") from None


def _table(path: Path, separator: str) -> dict[str, Any]:
    rows: list[list[str]] = []
    for number, line in enumerate(_lines(path), 1):
        row = [cell.strip() for cell in next(csv.reader([line], delimiter=separator), [])]
        if not any(row):
            continue
        if "" in row[:2] or len(row) < 2 or (rows and len(row) != len(rows[0])):
            wanted = f"{len(rows[0])}" if rows else "2 or more"
            raise RecommendError(f"{path}, line {number}: {line.strip()!r} has not {wanted} cells")
        rows.append(row)
    if not rows:
        return {"user": np.empty(0, np.int64), "item": np.empty(0, np.int64)}
    at = _positions([cell.partition(":")[0] for cell in rows[0]])
    if at is None:
        at = dict(zip(_NAMES, range(min(len(rows[0]), len(_NAMES))), strict=False))
    else:
        del rows[0]
    cells = np.array(rows, dtype=str).reshape(len(rows), -1)
    return (
        {name: _plain(cells[:, column]) for name, column in at.items()}
        if rows
        else {
            "user": np.empty(0, np.int64),
            "item": np.empty(0, np.int64),
        }
    )


def _lists(path: Path) -> dict[str, Any]:
    users: list[str] = []
    items: list[str] = []
    for line in _lines(path):
        user, *found = line.split() or [""]
        users += [user] * len(found)
        items += found
    return {"user": _plain(np.array(users, str)), "item": _plain(np.array(items, str))}


def _lines(path: Path) -> Any:
    opened = _PACKED.get(path.suffix, open)
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            yield from file
    except (UnicodeDecodeError, EOFError, lzma.LZMAError, gzip.BadGzipFile, OSError) as error:
        raise RecommendError(f"{path} cannot be read: {error}") from None


def _parquet(path: Path) -> dict[str, Any]:
    table = parquet_table(path, RecommendError)
    at = _positions(table.column_names)
    if at is None:
        raise RecommendError(f"{path} has the columns {table.column_names}, but no user and item")
    return {name: np.asarray(table.column(column).to_pylist()) for name, column in at.items()}


def _numpy(path: Path) -> Interactions | dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            if {"user", "item"} <= set(file):
                wanted = ("user", "item", "rating", "time")
                columns: dict[str, Any] = {name: file[name] for name in wanted if name in file}
                counts = ("num_users", "num_items")
                return columns | {name: int(file[name]) for name in counts if name in file}
            names = ", ".join(file) or "nothing"
            is_matrix = "format" in file
        if is_matrix:
            return Interactions.from_matrix(sparse.load_npz(path))
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise RecommendError(f"{path} cannot be read: {error}") from None
    raise RecommendError(f"{path} has {names}, but neither 'user' and 'item' nor a sparse matrix")


def _positions(header: list[str]) -> dict[str, int] | None:
    """Which column is what; None if user or item is not among them."""
    lower = [name.lower() for name in header]
    at = {
        name: next(i for i, column in enumerate(lower) if column in known)
        for name, known in _NAMES.items()
        if any(column in known for column in lower)
    }
    return at if {"user", "item"} <= set(at) else None


def _plain(cells: NDArray[Any]) -> NDArray[Any]:
    """Whole numbers where all cells are some, else the text."""
    try:
        return cells.astype(np.int64)
    except ValueError:
        return cells
