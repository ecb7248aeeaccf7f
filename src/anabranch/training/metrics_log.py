"""``metrics.jsonl``: one line per optimiser step and one per validation."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from anabranch.files import write_text


class MetricsLog:
    """Appends to a file; a resumed run first forgets what came after its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def restart_after(self, step: int) -> None:
        """Keep the lines up to ``step``, so that no step appears twice."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [entry for entry in read_metrics(self.path) if entry["step"] <= step]
        write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write one line. Values that JSON has no number for become null."""
        with self.path.open("a") as file:
            file.write(json.dumps(_finite(entry)) + "\n")


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a log; a last line cut short by a crash is left out."""
    if not path.exists():
        return
    with path.open() as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(child) for key, child in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
