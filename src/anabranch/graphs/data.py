"""The built-in labelled graph, found below the folder that ANABRANCH_DATA names."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from anabranch.graphs.errors import GraphError
from anabranch.graphs.generators import LabelledGraph
from anabranch.graphs.graph import Graph


def blogcatalog() -> LabelledGraph:
    """BlogCatalog: 10,312 bloggers, 333,983 friendships, 39 interests (Tang and Liu, KDD 2009)."""
    root = os.environ.get("ANABRANCH_DATA")
    if not root:
        raise GraphError("BlogCatalog is read from the folder that ANABRANCH_DATA names: unset")
    path = Path(root).expanduser() / "blogcatalog" / "blogcatalog.npz"
    if not path.is_file():
        raise GraphError(f"there is no {path}")
    with np.load(path, allow_pickle=False) as file:
        nodes = int(file["num_nodes"])
        labels = np.zeros((nodes, int(file["num_labels"])), bool)
        labels[file["label_row"], file["label_col"]] = True
        return LabelledGraph(Graph.from_edges(file["edges"], num_nodes=nodes), labels)
