"""Graphs: one sparse representation, node embeddings and personalised PageRank.

Needs the extra ``graphs`` (scipy, scikit-learn).
"""

from anabranch.errors import MissingExtra

try:
    import scipy as _  # noqa: F401
except ImportError:
    raise MissingExtra("scipy", "graphs") from None

from anabranch.graphs.convert import as_graph
from anabranch.graphs.errors import GraphError, IndexMismatch
from anabranch.graphs.graph import Graph
from anabranch.graphs.read import read_graph

__all__ = ["Graph", "GraphError", "IndexMismatch", "as_graph", "read_graph"]
