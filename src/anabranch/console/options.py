"""How the console behaves."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path


def _runs() -> Path:
    return Path(os.environ.get("ANABRANCH_RUNS", "runs"))


@dataclass(frozen=True)
class ConsoleOptions:
    """``runs`` is the folder in whose subfolders ``anabranch federate`` leaves its reports;
    ``$ANABRANCH_RUNS`` if absent, else ``runs`` where the server was started.
    """

    runs: Path = field(default_factory=_runs)
