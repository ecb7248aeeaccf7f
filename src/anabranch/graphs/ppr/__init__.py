"""Personalised PageRank: exact, and from an index of random walks (PowerWalk)."""

from anabranch.graphs.ppr.exact import exact_ppr
from anabranch.graphs.ppr.index import PPRIndex, build_index
from anabranch.graphs.ppr.query import PPRQuery, PPRResult, TopK

__all__ = ["PPRIndex", "PPRQuery", "PPRResult", "TopK", "build_index", "exact_ppr"]
