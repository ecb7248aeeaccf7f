"""Keeping what was learnt when ids are clustered again."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from anabranch.graphs.recommend.errors import RecommendError
from anabranch.graphs.recommend.hashing.rows import RowAssignment, largest_of_rows


def carried_over(
    weight: NDArray[np.float32], old: RowAssignment, new: RowAssignment
) -> NDArray[np.float32]:
    """The table [new rows, dim] to go on training with, from ``weight`` [old rows, dim].

    An old row goes to the new row it shares most ids with. A new row is the mean of the old rows
    that went to it, weighted by the ids they share; one to which none went (a cluster was split)
    copies the old row it shares most ids with; one of new ids only is the mean of all old rows.
    ``new`` may have more ids than ``old``. Ties go to the lower row. Both have one row for an id.
    """
    if old.combine != "single" or new.combine != "single":
        raise RecommendError("ids with several rows have no rows to carry over: train again")
    if weight.shape[0] != old.num_rows or len(new.rows) < len(old.rows):
        raise RecommendError(
            f"a table of {weight.shape[0]} rows for an assignment with {old.num_rows}, "
            f"{len(old.rows)} ids before and {len(new.rows)} after: they do not belong together"
        )
    ids = len(old.rows)
    pairs = (new.rows[:ids, 0], old.rows[:, 0])
    shared = sparse.coo_array(
        (np.ones(ids), pairs), shape=(new.num_rows, old.num_rows)
    ).tocsr()  # [new, old]: ids in both
    goes_to = largest_of_rows(shared.T.tocsr())
    comes_from = largest_of_rows(shared)

    moved = np.flatnonzero(goes_to >= 0)
    kept = sparse.csr_array(
        (shared.T.tocsr()[moved, goes_to[moved]], (goes_to[moved], moved)), shape=shared.shape
    )
    totals = kept.sum(axis=1)
    table = (kept @ weight) / np.where(totals > 0, totals, 1)[:, None]
    split = (totals == 0) & (comes_from >= 0)
    table[split] = weight[comes_from[split]]
    table[(totals == 0) & (comes_from < 0)] = weight.mean(axis=0)
    return table.astype(np.float32)
