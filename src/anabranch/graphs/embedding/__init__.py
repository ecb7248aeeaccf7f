"""Node embeddings: a vector for each node, similar where the nodes' surroundings are."""

from anabranch.graphs.embedding.fastrp import FastRP
from anabranch.graphs.embedding.tuning import Tuned, tune

__all__ = ["FastRP", "Tuned", "tune"]
