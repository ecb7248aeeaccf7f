"""Claims on the page: what was measured here, and measuring again in a process of its own.

A claim takes minutes of processor time, so it never runs inside the server: one at a time runs as
``anabranch claims run``, at low priority, and keeps its result where the command line keeps it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from anabranch import registry
from anabranch.claims.base import Claim, ClaimResult, find
from anabranch.claims.report import flatten, shown
from anabranch.claims.store import history
from anabranch.console.live import Watchers
from anabranch.console.text import NONE
from anabranch.errors import AnabranchError

NICENESS = 10
KEPT_LINES = 200
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


@dataclass
class ClaimRun:
    """A claim that is being measured, or the last one that was."""

    id: str
    lines: list[str]
    """What it said, oldest first."""
    state: Literal["running", "finished", "failed", "stopped"] = "running"


class ClaimBusy(AnabranchError):
    """Two claims at a time would measure each other."""

    status = 409


class ClaimRuns:
    """Starts claims and follows them. ``watchers`` are told of every line and at the end."""

    def __init__(self) -> None:
        self.current: ClaimRun | None = None
        self.watchers: Watchers[ClaimRun] = Watchers()
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None

    def rows(self) -> list[ClaimRow]:
        """All claims by id. Reads files: call it in a thread."""
        results, _ = history()
        claims: Mapping[str, type[Claim]] = registry.available("claims")
        ordered = sorted(claims.values(), key=lambda claim: claim.id)
        figures = documented_figures()
        return [
            ClaimRow(claim, results.get(claim.id, []), figures.get(claim.id, ""))
            for claim in ordered
        ]

    @property
    def busy(self) -> bool:
        """Whether one is being measured."""
        return self.current is not None and self.current.state == "running"

    async def start(self, claim_id: str) -> ClaimRun:
        """Measure a claim. Raises :class:`ClaimBusy`, or :class:`UnknownName` for no claim."""
        claim = find(claim_id)
        if self.busy:
            assert self.current is not None
            raise ClaimBusy(f"{self.current.id} is being measured; wait for it or stop it")
        run = self.current = ClaimRun(claim.id, [])
        self._process = await asyncio.create_subprocess_exec(
            *self.command(claim.id),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        with contextlib.suppress(OSError, AttributeError):  # gone already, or not this system's
            os.setpriority(os.PRIO_PROCESS, self._process.pid, NICENESS)
        self._task = asyncio.create_task(self._follow(run, self._process))
        self.watchers.tell(run)
        return run

    def command(self, claim_id: str) -> tuple[str, ...]:
        """What measures a claim and keeps its result."""
        return (sys.executable, "-m", "anabranch", "claims", "run", claim_id)

    async def finished(self) -> None:
        """Wait for the end of the measurement, if there is one."""
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    def stop(self) -> None:
        """Give up the claim that is being measured; no result is kept."""
        if self.busy and self._process is not None and self.current is not None:
            self.current.state = "stopped"
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def close(self) -> None:
        """Stop and wait."""
        self.stop()
        await self.finished()

    async def _follow(self, run: ClaimRun, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for raw in process.stdout:
            if line := raw.decode("utf-8", "replace").rstrip():
                run.lines = [*run.lines, line][-KEPT_LINES:]
                self.watchers.tell(run)
        status = await process.wait()
        if run.state == "running":
            # 1 is also the status of a claim that was measured and falls short.
            measured = status == 0 or (status == 1 and _has_verdict(run))
            run.state = "finished" if measured else "failed"
        self.watchers.tell(run)


def documented_figures(page: Path = DOCUMENTED) -> Mapping[str, str]:
    """The last column of the table of systems, by claim; empty where there is no such page."""
    try:
        lines = page.read_text("utf-8").splitlines()
    except OSError:
        return {}
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    return {row[0]: row[-1] for row in rows if re.fullmatch(r"S[0-9]+", row[0]) and len(row) > 2}


def _has_verdict(run: ClaimRun) -> bool:
    return any(line.endswith((": holds", ": falls short")) for line in run.lines)
