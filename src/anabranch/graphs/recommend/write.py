"""Recommendations and row assignments to files, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anabranch.files import write_json
from anabranch.graphs.recommend.errors import RecommendError
from anabranch.graphs.recommend.hashing.mappers import IdMapper
from anabranch.graphs.recommend.interactions import Interactions
from anabranch.graphs.write import check_output, write_npz, write_parquet


def check_recommendations_output(path: Path) -> None:
    """Refuse a file that could not be written, before the work."""
    if path.suffix not in (".npz", ".parquet", ".json"):
        raise RecommendError(f"{path}: recommendations are written as .npz, .parquet or .json")
    if path.suffix != ".json":
        check_output(path)


def write_recommendations(
    path: Path,
    interactions: Interactions,
    users: NDArray[np.int64],
    items: NDArray[np.int64],
    scores: NDArray[np.float32],
) -> None:
    """Items [b, k] and scores [b, k] of users [b] under their names, without places of item -1.

    ``.npz`` and ``.parquet``: a row for each, ``user``, ``item``, ``score``, in order. ``.json``:
    an object for each user with its ``items`` and ``scores``.
    """
    there = items >= 0
    if path.suffix == ".json":
        names = names_of(interactions, "user", users).tolist()
        rows = zip(names, items, scores, there, strict=True)
        write_json(
            path,
            [
                {
                    "user": name,
                    "items": names_of(interactions, "item", best[found]).tolist(),
                    "scores": [round(float(s), 6) for s in values[found]],
                }
                for name, best, values, found in rows
            ],
        )
        return
    _write(
        path,
        user=names_of(interactions, "user", np.repeat(users, there.sum(axis=1))),
        item=names_of(interactions, "item", items[there]),
        score=scores[there],
    )


def write_rows(path: Path, interactions: Interactions, mapper: IdMapper) -> None:
    """``.npz``: ``user``, ``user_rows`` [users, h], ``item``, ``item_rows`` and the row counts.

    ``.parquet``: a line for each row of each id: ``side``, ``id`` as text and ``row``.
    """
    users, items = (
        names_of(interactions, side, np.arange(count))
        for side, count in (("user", interactions.num_users), ("item", interactions.num_items))
    )
    if path.suffix == ".npz":
        write_npz(
            path,
            user=users,
            user_rows=mapper.users_.rows,
            item=items,
            item_rows=mapper.items_.rows,
            num_rows=np.array(mapper.num_rows_),
        )
        return
    width = mapper.users_.rows.shape[1]
    sides = np.repeat(["user", "item"], [len(users) * width, len(items) * width])
    ids = np.concatenate([np.repeat(users.astype(str), width), np.repeat(items.astype(str), width)])
    rows = np.concatenate([mapper.users_.rows.ravel(), mapper.items_.rows.ravel()])
    write_parquet(path, {"side": sides, "id": ids, "row": rows}, {})


def names_of(interactions: Interactions, side: str, rows: NDArray[Any]) -> NDArray[Any]:
    """Names of users or items by row number; the numbers themselves without names."""
    ids = getattr(interactions, f"{side}_ids")
    return rows if ids is None else ids[rows]


def _write(path: Path, **columns: NDArray[Any]) -> None:
    if path.suffix == ".npz":
        write_npz(path, **columns)
    else:
        write_parquet(path, columns, {})
