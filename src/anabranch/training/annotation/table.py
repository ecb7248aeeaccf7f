"""The table that is labelled: an id, a text, and where it came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anabranch.training.data.sources import read
from anabranch.training.errors import DataError
from anabranch.training.recipe import Data


@dataclass(frozen=True)
class Document:
    """A text to label. ``row`` has all columns of its source."""

    id: str
    text: str
    row: Any = None


def read_documents(path: Path, text: str = "text", id_column: str = "id") -> list[Document]:
    """Rows of a JSONL, CSV or Parquet file. Without an id column the row's place is its id.

    Raises :class:`DataError` for a row without text, and for an id that comes twice.
    """
    formats = {".csv": "csv", ".parquet": "parquet"}
    suffix = next((s for s in path.suffixes if s in formats), "")
    source = read(Data(name="", source=formats.get(suffix, "jsonl"), path=path, weight=1.0), seed=0)
    found = []
    for number, entry in enumerate(source.rows, 1):
        value = entry.row.get(text)
        if not isinstance(value, str) or not value.strip():
            raise DataError(
                f"{entry.where}: column {text!r} has no text; "
                f"columns: {', '.join(map(str, entry.row))}"
            )
        found.append(Document(str(entry.row.get(id_column, number)), value, dict(entry.row)))
    require_unique(found)
    return found


def require_unique(documents: Sequence[Document]) -> None:
    """Raise :class:`DataError` for an id that two documents have."""
    seen: set[str] = set()
    for document in documents:
        if document.id in seen:
            raise DataError(f"id {document.id!r} comes twice; give every row an id of its own")
        seen.add(document.id)


def conflicting(labelled: Iterable[tuple[str, Any]]) -> list[tuple[str, list[Any]]]:
    """Texts that come with different labels, as ``(text, labels)``."""
    seen: dict[str, list[Any]] = {}
    for text, label in labelled:
        labels = seen.setdefault(" ".join(text.split()), [])
        if label not in labels:
            labels.append(label)
    return [(text, labels) for text, labels in seen.items() if len(labels) > 1]
