"""Embedding tables with fewer rows than ids: which ids share a row, and the table itself."""

from anabranch.graphs.recommend.hashing.clustering import louvain, modularity, resolution_for
from anabranch.graphs.recommend.hashing.embedding import MappedEmbedding
from anabranch.graphs.recommend.hashing.graph_hash import DoubleGraphHash, GraphHash
from anabranch.graphs.recommend.hashing.lsh import LSH
from anabranch.graphs.recommend.hashing.maintenance import carried_over
from anabranch.graphs.recommend.hashing.mappers import (
    DoubleFrequency,
    DoubleHash,
    Frequency,
    FullTable,
    IdMapper,
    Modulo,
)
from anabranch.graphs.recommend.hashing.rows import RowAssignment

__all__ = [
    "LSH",
    "DoubleFrequency",
    "DoubleGraphHash",
    "DoubleHash",
    "Frequency",
    "FullTable",
    "GraphHash",
    "IdMapper",
    "MappedEmbedding",
    "Modulo",
    "RowAssignment",
    "carried_over",
    "louvain",
    "modularity",
    "resolution_for",
]
