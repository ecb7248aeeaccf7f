"""Recommenders: who interacts with what next, from who interacted with what.

Belongs here: interactions and their splits, factor models, and embedding tables whose ids share
rows (:mod:`.hashing`). Ranking figures are in :mod:`anabranch.evaluation.ranking`.
"""

from anabranch.graphs.recommend.base import FactorRecommender
from anabranch.graphs.recommend.cooccurrence import cooccurrence_neighbours, limit_weights
from anabranch.graphs.recommend.errors import NotFitted, RecommendError
from anabranch.graphs.recommend.interactions import Interactions, as_interactions
from anabranch.graphs.recommend.lightgcn import LightGCN
from anabranch.graphs.recommend.matrix_factorization import MatrixFactorization
from anabranch.graphs.recommend.popularity import Popularity
from anabranch.graphs.recommend.read import read_interactions
from anabranch.graphs.recommend.ultragcn import UltraGCN

__all__ = [
    "FactorRecommender",
    "Interactions",
    "LightGCN",
    "MatrixFactorization",
    "NotFitted",
    "Popularity",
    "RecommendError",
    "UltraGCN",
    "as_interactions",
    "cooccurrence_neighbours",
    "limit_weights",
    "read_interactions",
]
