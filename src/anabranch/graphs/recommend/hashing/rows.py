"""Which rows of a table an id uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from anabranch.graphs.recommend.errors import RecommendError

_PRIME = 2**61 - 1


@dataclass(frozen=True, eq=False)
class RowAssignment:
    """``rows`` int64 [ids, h]: the vector of an id is the sum of its h rows of one table.

    Rows are below ``num_rows``; a row that no id uses is legal.
    """

    rows: NDArray[np.int64]
    num_rows: int

    def __post_init__(self) -> None:
        rows = np.asarray(self.rows)
        if rows.ndim != 2 or rows.dtype.kind not in "iu":
            raise RecommendError(f"rows are whole numbers [ids, h], not {rows.dtype} {rows.shape}")
        if rows.size and not 0 <= rows.min() <= rows.max() < self.num_rows:
            raise RecommendError(f"rows lie outside 0..{self.num_rows - 1}")
        object.__setattr__(self, "rows", rows.astype(np.int64))

    @property
    def combine(self) -> Literal["single", "sum"]:
        """Whether an id has one row, or the sum of several."""
        return "single" if self.rows.shape[1] == 1 else "sum"

    def of(self, ids: ArrayLike) -> NDArray[np.int64]:
        """Rows [.., h] of ids [..]; :class:`RecommendError` names the first id out of range."""
        wanted = np.asarray(ids, np.int64)
        outside = (wanted < 0) | (wanted >= len(self.rows))
        if outside.any():
            raise RecommendError(
                f"id {wanted[outside].flat[0]} is outside the fitted 0..{len(self.rows) - 1}; "
                f"GraphHash.extended gives rows to new ids"
            )
        return self.rows[wanted]

    @classmethod
    def single(cls, rows: NDArray[np.int64], num_rows: int) -> RowAssignment:
        """One row each, from rows [ids]."""
        return cls(rows.reshape(-1, 1), num_rows)


def modulo_rows(count: int, num_rows: int) -> NDArray[np.int64]:
    """id mod num_rows [count]."""
    return np.arange(count, dtype=np.int64) % max(1, num_rows)


def universal_hash(count: int, num_rows: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """((a id + b) mod p) mod num_rows [count], p = 2^61 - 1 (Carter and Wegman, 1979)."""
    a, b = int(generator.integers(1, _PRIME)), int(generator.integers(_PRIME))
    # Products take 122 bits: Python's integers hold them, NumPy's would overflow silently.
    return np.array([(a * x + b) % _PRIME % num_rows for x in range(count)], np.int64)


def largest_of_rows(matrix: sparse.csr_array) -> NDArray[np.int64]:
    """Column of the largest entry of each row, the lower one of equals; -1 for an empty row."""
    entries = matrix.tocoo()
    order = np.lexsort((entries.col, -entries.data, entries.row))
    rows, first = np.unique(entries.row[order], return_index=True)
    found = np.full(matrix.shape[0], -1, np.int64)
    found[rows] = entries.col[order][first]
    return found
