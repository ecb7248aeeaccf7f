"""The baseline that every recommender has to beat: the same ranking for everyone."""

from __future__ import annotations

from typing import Any, Self

import numpy as np

from anabranch.graphs.recommend.base import FactorRecommender, same_ids
from anabranch.graphs.recommend.interactions import Interactions, as_interactions
from anabranch.models.progress import Progress, silent


class Popularity(FactorRecommender):
    """Ranks items by how many users have them; the score is that number."""

    def fit(
        self,
        train: Any,
        *,
        validation: Interactions | None = None,
        progress: Progress = silent,
    ) -> Self:
        """Count. ``validation`` counts as seen only."""
        train = as_interactions(train)
        tables = {
            "user": np.ones((train.num_users, 1), np.float32),
            "item": train.popularity()[:, None].astype(np.float32),
        }
        seen = train if validation is None else train.joined(validation)
        self._keep(tables, {"user": None, "item": None}, seen.csr(), same_ids(train))  # type: ignore[arg-type]
        return self
