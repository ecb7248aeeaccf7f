"""What can be wrong with interactions, a recommender's options or a mapping of ids."""

from __future__ import annotations

from anabranch.graphs.errors import GraphError


class RecommendError(GraphError):
    """Interactions or an option cannot be used as given; the message names the fault."""

    code = "invalid_interactions"


class NotFitted(RecommendError):
    """The recommender or mapper was not fitted yet."""

    code = "not_fitted"
