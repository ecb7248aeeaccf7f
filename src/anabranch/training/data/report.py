"""What became of every row: counts for each source and filter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class SourceReport:
    """One source. ``read`` equals the rows in ``splits`` plus all that is in ``removed``.

    ``fingerprint`` is the SHA-256 of the file, or of the generated rows. ``examples_removed`` names
    up to three rows for each reason. ``note`` says what a reader must know, for example that
    generated rows stand in for a data set that is not here.
    """

    name: str
    source: str
    fingerprint: str
    read: int = 0
    removed: dict[str, int] = field(default_factory=dict)
    examples_removed: dict[str, list[str]] = field(default_factory=dict)
    splits: dict[str, int] = field(default_factory=dict)
    weight: float = 1.0
    note: str = ""

    def remove(self, reason: str, where: str) -> None:
        """Count a row that is left out."""
        self.removed[reason] = self.removed.get(reason, 0) + 1
        named = self.examples_removed.setdefault(reason, [])
        if len(named) < 3:
            named.append(where)


@dataclass
class DataReport:
    """All sources. ``train_items`` counts what an epoch shows, after the sources' weights."""

    sources: list[SourceReport] = field(default_factory=list)
    train_items: int = 0
    boilerplate_ngrams: int = 0
    """Word runs shared with evaluation rows that so many training rows have that they are wording
    of the data set, not leaked content."""

    @property
    def fingerprints(self) -> dict[str, str]:
        """Source name -> SHA-256."""
        return {source.name: source.fingerprint for source in self.sources}

    @property
    def splits(self) -> dict[str, int]:
        """Rows of each split, all sources together."""
        return total(source.splits for source in self.sources)

    @property
    def removed(self) -> dict[str, int]:
        """Rows left out by reason, all sources together."""
        return total(source.removed for source in self.sources)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def total(counts: Any) -> dict[str, int]:
    """Sum of mappings, in order of first appearance."""
    summed: dict[str, int] = {}
    for mapping in counts:
        each: Mapping[str, int] = mapping
        for key, count in each.items():
            summed[key] = summed.get(key, 0) + count
    return summed
