"""Sparse times dense in row blocks of equal work, and operations on rows in place."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

_ROWS = 2**15
"""Rows whose temporary copies are held at once."""


def multiply(matrix: sparse.csr_array, right: Any, workers: int = 1) -> NDArray[np.float32]:
    """``matrix`` @ ``right`` as a dense array [rows, dim], in ``workers`` threads.

    ``right`` [columns, dim] is dense or sparse. Each row is summed in the order of its entries,
    so that the result does not depend on ``workers``.
    """
    rows = matrix.shape[0]
    result = np.empty((rows, right.shape[1]), np.float32)

    def block(start: int, stop: int) -> None:
        product = _row_slice(matrix, start, stop) @ right
        if sparse.issparse(product):
            product.toarray(out=result[start:stop])
        else:
            result[start:stop] = product

    # More blocks than workers: a product of a block is a temporary copy.
    cuts = row_blocks(matrix.indptr, max(4 * workers, -(-rows // _ROWS)))
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(block, cuts[:-1], cuts[1:]):
            pass
    return result


def row_blocks(indptr: NDArray[Any], blocks: int) -> NDArray[np.int64]:
    """Row numbers at which to cut so that every block has about equally many entries and rows."""
    rows = len(indptr) - 1
    work = indptr.astype(np.int64) + np.arange(rows + 1)
    wanted = np.linspace(0, work[-1], blocks + 1)
    return np.unique(np.concatenate([[0], np.searchsorted(work, wanted[1:-1]), [rows]]))


def add_rows(total: NDArray[np.float32], rows: Any, weight: float, normalise: bool) -> None:
    """``total`` += ``weight`` * ``rows``, each row first divided by its length if ``normalise``.

    Rows of length zero stay zero. ``rows`` may be sparse.
    """
    for start in range(0, len(total), _ROWS):
        part = rows[start : start + _ROWS]
        part = part.toarray() if sparse.issparse(part) else part
        if normalise:
            length = np.sqrt(np.einsum("ij,ij->i", part, part))
            factor = np.divide(weight, length, out=np.zeros_like(length), where=length > 0)
            total[start : start + _ROWS] += factor[:, None] * part
        else:
            total[start : start + _ROWS] += np.float32(weight) * part


def _row_slice(matrix: sparse.csr_array, start: int, stop: int) -> sparse.csr_array:
    """Rows of a matrix without copying their entries."""
    first, last = matrix.indptr[start], matrix.indptr[stop]
    return sparse.csr_array(
        (
            matrix.data[first:last],
            matrix.indices[first:last],
            matrix.indptr[start : stop + 1] - first,
        ),
        shape=(stop - start, matrix.shape[1]),
    )
