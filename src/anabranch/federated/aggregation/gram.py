"""Inner products of updates, from which distances and subspaces follow."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 18
"""Columns that are in float64 at a time."""


def gram(rows: Tensor, chunk: int = CHUNK) -> Tensor:
    """``U U^T`` of updates [p, d]: float64 [p, p], whatever the type of the updates."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for start in range(0, rows.shape[1], chunk):
        part = rows[:, start : start + chunk].to(torch.float64)
        total += part @ part.T
    return total


def squared_distances(products: Tensor) -> Tensor:
    """``|u_i - u_j|^2`` [p, p] from a Gram matrix; never negative, exactly 0 on the diagonal."""
    norms = products.diagonal()
    distances = (norms[:, None] + norms[None, :] - 2 * products).clamp_min(0)
    return distances.fill_diagonal_(0)
