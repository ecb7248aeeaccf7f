"""One version of an adapter, ready to be computed by a runner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class ServedAdapter:
    """Compared by identity: a request keeps the version that it started with."""

    name: str
    version: int
    key: bytes
    """Begins the names of cached pages: keys and values depend on the adapter's version."""
    memory: int
    """Bytes that the runner holds for it."""
    handle: Any
    """What the runner made of it; opaque to everybody else."""
