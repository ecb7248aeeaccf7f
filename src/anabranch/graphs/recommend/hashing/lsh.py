"""Locality-sensitive hashing of interaction rows: the structure-aware baseline without a graph."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from anabranch.graphs.recommend.hashing.mappers import SizedMapper
from anabranch.graphs.recommend.hashing.rows import RowAssignment
from anabranch.graphs.recommend.interactions import Interactions


class LSH(SizedMapper):
    """Signs of random projections of each id's interactions are the bits of its row.

    Charikar, "Similarity estimation techniques from rounding algorithms" (STOC 2002). ceil(log2
    rows) bits, of whose values those that occur get a row: there may be more rows than asked for
    (``num_rows_`` says how many), or fewer. Ids without interactions share one row.
    """

    def _assign(self, interactions: Interactions) -> tuple[RowAssignment, RowAssignment]:
        matrix = interactions.csr()
        generator = np.random.default_rng(self.seed)
        sizes = self._sizes(interactions)
        sides = (matrix, matrix.T.tocsr())
        users, items = (_hashed(m, s, generator) for m, s in zip(sides, sizes, strict=True))
        return users, items


def _hashed(
    matrix: sparse.csr_array, num_rows: int, generator: np.random.Generator
) -> RowAssignment:
    bits = max(1, math.ceil(math.log2(num_rows)))
    directions = generator.standard_normal((matrix.shape[1], bits))
    signs: NDArray[np.bool_] = (matrix @ directions) > 0
    codes, rows = np.unique(signs @ (1 << np.arange(bits)), return_inverse=True)
    return RowAssignment.single(rows, len(codes))
