"""What went wrong without ending the run: named, counted, shown."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Incident:
    """How often something happened with a client, and what was said the last time."""

    what: str
    client: str
    count: int
    message: str


class Incidents:
    """A counter by what happened and with whom. Each is logged when it happens."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], Incident] = {}

    def record(self, what: str, client: str, message: str) -> None:
        """Count one."""
        logger.warning("%s (%s): %s", what, client or "coordinator", message)
        before = self._found.get((what, client))
        self._found[what, client] = Incident(
            what, client, 1 + (before.count if before else 0), message
        )

    def count(self, what: str, client: str | None = None) -> int:
        """How often this happened, with one client or all."""
        return sum(i.count for i in self if i.what == what and client in (None, i.client))

    def __iter__(self) -> Any:
        return iter(self._found[key] for key in sorted(self._found))

    def __len__(self) -> int:
        return sum(incident.count for incident in self)

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"incidents": [asdict(incident) for incident in self]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all."""
        found = [Incident(**values) for values in state["incidents"]]
        self._found = {(incident.what, incident.client): incident for incident in found}
