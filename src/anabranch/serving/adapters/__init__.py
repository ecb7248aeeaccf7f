"""Adapters that are served: checkpoints read from disk, versions, and what is kept in memory."""

from anabranch.serving.adapters.bank import AdapterBank, AdapterCard
from anabranch.serving.adapters.checkpoint import AdapterCheckpoint, LowRank
from anabranch.serving.adapters.served import ServedAdapter

__all__ = [
    "AdapterBank",
    "AdapterCard",
    "AdapterCheckpoint",
    "LowRank",
    "ServedAdapter",
]
