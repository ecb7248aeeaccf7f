"""What is trained: two tables of vectors and a loss. Subclasses are the methods."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from anabranch.graphs.recommend.hashing.embedding import MappedEmbedding

Table = nn.Embedding | MappedEmbedding


class FactorModel(nn.Module, ABC):
    """``users`` and ``items`` give a vector for each id: [.., dim] for ids [..]."""

    def __init__(self, users: Table, items: Table) -> None:
        super().__init__()
        self.users = users
        self.items = items

    @abstractmethod
    def pair_loss(self, user: Tensor, item: Tensor, negatives: Tensor, batch: int) -> Tensor:
        """The share of users [b] and items [b] in the loss of a step of ``batch`` pairs.

        ``negatives`` [b, k] are items. Shares of the parts of a step add up to its loss.
        """

    def factors(self) -> tuple[Tensor, Tensor]:
        """The vectors that scores are products of: [users, dim] and [items, dim]."""
        return every(self.users), every(self.items)

    @property
    def stores_tables(self) -> bool:
        """Whether :meth:`factors` are the tables themselves, so that shared rows stay shared."""
        return True


def every(table: Table) -> Tensor:
    """The vectors of all ids [n, dim]."""
    return table.every() if isinstance(table, MappedEmbedding) else table.weight


def new_table(count: int, dim: int, init: float, generator: torch.Generator) -> nn.Embedding:
    """Normal entries with mean 0 and deviation ``init``."""
    # nn.Embedding(count, dim) would draw from the global generator first.
    weight = torch.empty(count, dim).normal_(0.0, init, generator=generator)
    return nn.Embedding.from_pretrained(weight, freeze=False)
