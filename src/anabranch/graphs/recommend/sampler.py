"""Negative items for training, drawn uniformly over the catalogue."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from anabranch.graphs.recommend.errors import RecommendError
from anabranch.graphs.recommend.interactions import Interactions

ROUNDS = 3
"""Of drawing again where a negative is a positive; what still is one after them is accepted."""


class NegativeSampler:
    """Draws ``k`` items for each user of a batch.

    With ``exclude_positive`` an item that the user has in ``train`` is drawn again; the chance
    that one survives is (its share of the catalogue)^(ROUNDS + 1).
    """

    def __init__(
        self, train: Interactions, k: int, exclude_positive: bool, generator: torch.Generator
    ) -> None:
        if k < 1:
            raise RecommendError(f"negatives = {k}: at least one is needed")
        if train.num_items < 2:
            raise RecommendError(
                f"{train.num_items} items: a recommender learns by comparing at least two"
            )
        self.generator = generator
        self._k = k
        self._num_items = train.num_items
        self._keys: Tensor | None = None
        if exclude_positive:
            full = np.flatnonzero(train.user_degree == train.num_items)
            if len(full):
                raise RecommendError(
                    f"user {full[0]} has all {train.num_items} items: no negative can be drawn; "
                    f"leave the user out, or train with exclude_positive=False"
                )
            self._keys = torch.from_numpy(train.keys())

    def draw(self, users: Tensor) -> Tensor:
        """Items int64 [b, k] for the users [b]."""
        shape = (len(users), self._k)
        drawn = torch.randint(self._num_items, shape, generator=self.generator)
        if self._keys is None:
            return drawn
        for _ in range(ROUNDS):
            again = self._positive(users[:, None] * self._num_items + drawn).nonzero()
            if not len(again):
                break
            fresh = torch.randint(self._num_items, (len(again),), generator=self.generator)
            drawn[again[:, 0], again[:, 1]] = fresh
        return drawn

    def _positive(self, keys: Tensor) -> Tensor:
        assert self._keys is not None
        at = torch.searchsorted(self._keys, keys).clamp_(max=len(self._keys) - 1)
        return self._keys[at] == keys
