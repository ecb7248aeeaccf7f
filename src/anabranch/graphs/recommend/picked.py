"""Some entries of a product of two tables, and their gradients without scattering."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def picked_scores(vectors: Tensor, table: Tensor, columns: Tensor) -> Tensor:
    """``vectors @ table.T`` at ``columns`` only: [b, dim], [n, dim] and int64 [b, c] give [b, c].

    There is at least one column; one may come several times in a row. Gradients are dense.
    """
    scores: Any = _Picked.apply(vectors, table, columns)
    return scores


class _Picked(torch.autograd.Function):
    """The gradient of the scores is a sparse matrix [b, n] of c entries a row. Its products with
    either table are sums of weighted rows, which a bag does in one pass: adding c gathered rows of
    each vector one by one takes three times as long.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, table: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(vectors, table, columns)
        return torch.bmm(F.embedding(columns, table), vectors[:, :, None])[:, :, 0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        vectors, table, columns = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        of_vectors = _weighted_sums(columns, table, gradient)
        # By columns: each row of the table is a bag of the vectors that it was scored with.
        flat = columns.ravel()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=len(table))
        starts = counts.cumsum(0) - counts
        rows = order // columns.shape[1]
        of_table = _weighted_sums(rows, vectors, gradient.ravel()[order], starts)
        return of_vectors, of_table, None


def _weighted_sums(
    bags: Tensor, table: Tensor, weights: Tensor, starts: Tensor | None = None
) -> Tensor:
    return F.embedding_bag(bags, table, starts, mode="sum", per_sample_weights=weights)
