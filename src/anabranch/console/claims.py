"""Claims on the page: what was measured here, and what the documentation says of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from anabranch import registry
from anabranch.claims.base import Claim, ClaimResult
from anabranch.claims.report import flatten, shown
from anabranch.claims.store import history
from anabranch.console.text import NONE

DOCUMENTED = Path(__file__).parents[3] / "docs" / "systems.md"
"""In a checkout; an installed package has no documentation beside it."""

Verdict = Literal["holds", "falls short", "not measured"]


@dataclass(frozen=True)
class Figure:
    """A measured value, and the least and the greatest of earlier runs (empty without any)."""

    name: str
    value: str


@dataclass(frozen=True)
class ClaimRow:
    """A claim, with its newest result on this machine if there is one."""

    claim: type[Claim]
    runs: Sequence[ClaimResult]
    """Oldest first."""
    documented: str = ""
    """The figure in the table of systems of the documentation, if that is here."""

    @property
    def newest(self) -> ClaimResult | None:
        """The latest measurement."""
        return self.runs[-1] if self.runs else None

    @property
    def verdict(self) -> Verdict:
        """Of the newest run."""
        return self.newest.verdict if self.newest else "not measured"

    @property
    def held(self) -> str:
        """How often it held here."""
        return f"{sum(run.holds for run in self.runs)} of {len(self.runs)}" if self.runs else NONE

    @property
    def figures(self) -> list[Figure]:
        """Those of the newest run, nested names joined."""
        if self.newest is None:
            return []
        return [Figure(name, shown(value)) for name, value in flatten(self.newest.figures)]


def claim_rows() -> list[ClaimRow]:
    """All claims by id. Reads files: call it in a thread."""
    results, _ = history()
    claims: Mapping[str, type[Claim]] = registry.available("claims")
    ordered = sorted(claims.values(), key=lambda claim: claim.id)
    figures = documented_figures()
    return [
        ClaimRow(claim, results.get(claim.id, []), figures.get(claim.id, "")) for claim in ordered
    ]


def documented_figures(page: Path = DOCUMENTED) -> Mapping[str, str]:
    """The last column of the table of systems, by claim; empty where there is no such page."""
    try:
        lines = page.read_text("utf-8").splitlines()
    except OSError:
        return {}
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    return {row[0]: row[-1] for row in rows if re.fullmatch(r"S[0-9]+", row[0]) and len(row) > 2}
