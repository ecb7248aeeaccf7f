"""Weights of UltraGCN: of user-item edges, and of each item's nearest items."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from anabranch.files import replacing
from anabranch.graphs.recommend.errors import RecommendError
from anabranch.graphs.recommend.interactions import Interactions

_BLOCK = 2**22
"""Products of a block of rows of the co-occurrence matrix, about."""


def limit_weights(train: Interactions) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Factors of beta(u, i) = (1/d_u) sqrt((d_u + 1) / (d_i + 1)): [users] and [items].

    Their product is the weight of an edge at infinitely many layers (equation 6 of the paper). A
    user without items has the factor 0: nothing is asked of its vector.
    """
    users, items = (d.astype(np.float64) for d in (train.user_degree, train.popularity()))
    of_users = np.divide(np.sqrt(users + 1), users, out=np.zeros_like(users), where=users > 0)
    return of_users.astype(np.float32), (1 / np.sqrt(items + 1)).astype(np.float32)


def cooccurrence_neighbours(
    train: Interactions, k: int = 10, *, exclude_self: bool = False, cache: Path | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The ``k`` items of largest omega for each item, and omega: both [items, k].

    With G = A^T A, its diagonal kept, and g its row sums:
    omega(i, j) = G_ij sqrt(g_i + 1) / g_i / sqrt(g_j + 1), as the authors' code has it. Equal ones
    by item number; ``k`` is cut to the number of items. An item that has fewer such neighbours is
    filled up with itself at weight 0. G is made in blocks of rows and never dense. ``cache`` is a
    folder where the result is kept under the digest of the interactions.
    """
    if k < 1:
        raise RecommendError(f"neighbours = {k}: at least one is needed")
    k = min(k, train.num_items)
    file = None
    if cache is not None:
        name = f"neighbours-{train.fingerprint()}-{k}{'-others' if exclude_self else ''}.npz"
        file = cache / name
        if (found := _cached(file, (train.num_items, k))) is not None:
            return found
    neighbours, weights = _nearest(train, k, exclude_self)
    if file is not None:
        with replacing(file) as draft, draft.open("wb") as opened:
            np.savez(opened, neighbours=neighbours, weights=weights)
    return neighbours, weights


def _nearest(
    train: Interactions, k: int, exclude_self: bool
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    matrix = train.csr().astype(np.float64)
    transposed = matrix.T.tocsr()
    # Row sums of G without G: an item counts the items of each of its users.
    products = transposed @ train.user_degree.astype(np.float64)
    neighbours = np.tile(np.arange(train.num_items)[:, None], (1, k))
    weights = np.zeros((train.num_items, k), np.float32)
    for start, stop in _blocks(products):
        block = sparse.coo_array(transposed[start:stop] @ matrix)
        row, column = block.row + start, block.col
        omega = block.data * np.sqrt(products[row] + 1) / products[row]
        omega /= np.sqrt(products[column] + 1)
        if exclude_self:
            omega = np.where(row == column, 0.0, omega)
        order = np.lexsort((column, -omega, row))
        row, column, omega = row[order], column[order], omega[order]
        first = np.searchsorted(row, row, side="left")
        place = np.arange(len(row)) - first
        kept = (place < k) & (omega > 0)
        neighbours[row[kept], place[kept]] = column[kept]
        weights[row[kept], place[kept]] = omega[kept]
    return neighbours, weights


def _blocks(products: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Ranges of rows with at most _BLOCK products each, or of one row."""
    number = (np.cumsum(products) // _BLOCK).astype(np.int64)
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    return list(zip(starts, [*starts[1:], len(products)], strict=True))


def _cached(file: Path, shape: tuple[int, int]) -> Any:
    """What an earlier call kept; None where there is nothing that can be read."""
    try:
        with np.load(file, allow_pickle=False) as found:
            neighbours, weights = found["neighbours"], found["weights"]
    except (OSError, ValueError, KeyError, EOFError):
        return None
    return (neighbours, weights) if neighbours.shape == weights.shape == shape else None
