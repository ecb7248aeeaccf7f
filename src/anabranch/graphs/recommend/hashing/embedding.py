"""An embedding whose ids share rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.graphs.recommend.errors import RecommendError
from anabranch.graphs.recommend.hashing.rows import RowAssignment


class MappedEmbedding(nn.Module):
    """Takes the place of ``nn.Embedding(ids, dim)`` in any model: same input, same output.

    ``weight`` [num_rows, dim] is the only parameter; the gradient of a row is the sum of its ids'.
    The assignment is a buffer and travels with ``state_dict``. ``embedding`` replaces the fresh
    table, for example to start from given weights.

    Example::

        mapper = GraphHash(budget=0.25).fit(interactions)
        model.item_embedding = MappedEmbedding(mapper.items_, dim=64)
    """

    rows: Tensor

    def __init__(
        self, assignment: RowAssignment, dim: int, embedding: nn.Embedding | None = None
    ) -> None:
        super().__init__()
        table = embedding or nn.Embedding(assignment.num_rows, dim)
        if table.weight.shape != (assignment.num_rows, dim):
            raise RecommendError(
                f"the table is {list(table.weight.shape)}, but the assignment has "
                f"{assignment.num_rows} rows of {dim} columns"
            )
        self.num_embeddings = len(assignment.rows)
        self.embedding_dim = dim
        self.weight = table.weight
        self.register_buffer("rows", torch.from_numpy(assignment.rows))

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors [.., dim] of ids [..]; IndexError for an id outside the assignment."""
        return self._sum(self.rows[ids])

    def every(self) -> Tensor:
        """The vectors of all ids [ids, dim]."""
        return self._sum(self.rows)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{self.num_embeddings} ids in {len(self.weight)} rows, {self.embedding_dim}"

    def _sum(self, rows: Tensor) -> Tensor:
        if rows.shape[-1] == 1:
            return F.embedding(rows[..., 0], self.weight)
        return F.embedding(rows, self.weight).sum(dim=-2)
