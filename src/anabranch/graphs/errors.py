"""What can be wrong with a graph, or with what is asked of one."""

from __future__ import annotations

from anabranch.errors import AnabranchError


class GraphError(AnabranchError, ValueError):
    """A graph, a node or an option cannot be used as given; the message names it.

    Also a ValueError, as scikit-learn expects of an estimator that refuses its input.
    """

    exit_code = 2
    status = 400
    code = "invalid_graph"


class IndexMismatch(GraphError):
    """A stored index belongs to another graph or other settings, or its files are damaged."""

    code = "index_mismatch"
