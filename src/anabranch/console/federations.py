"""Federations on the page: what their folders say. Nothing is ever written there.

A finished run has a ``report.json``. One that goes on, or was interrupted, has snapshots of its
coordinator, of which the newest readable one is shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from anabranch.errors import AnabranchError
from anabranch.federated.ledger import Ledger
from anabranch.federated.store import read_state

Points = Sequence[tuple[float, float]]


class UnknownFederation(AnabranchError):
    """No run of this name in the folder of runs."""

    status = 404


@dataclass(frozen=True)
class ClientTraffic:
    """Bytes and messages of one client."""

    name: str
    up: int = 0
    down: int = 0
    messages: int = 0


@dataclass(frozen=True)
class FederationRun:
    """A run as far as it is known. ``rounds`` counts versions; times are seconds."""

    name: str
    state: Literal["finished", "unfinished", "damaged"]
    changed: float
    """Seconds since 1970."""
    strategy: str = ""
    rounds: int = 0
    wanted: int = 0
    clock: str = "virtual"
    seconds: float = 0.0
    clients: Sequence[ClientTraffic] = ()
    history: Sequence[Mapping[str, float]] = ()
    """A row for each version."""
    incidents: Sequence[Mapping[str, Any]] = ()
    problem: str = ""
    job: Mapping[str, Any] = field(default_factory=dict)

    @property
    def up(self) -> int:
        """Bytes from all clients."""
        return sum(client.up for client in self.clients)

    @property
    def down(self) -> int:
        """Bytes to all clients."""
        return sum(client.down for client in self.clients)

    @property
    def metrics(self) -> Mapping[str, float]:
        """The newest value of everything that was measured."""
        newest: dict[str, float] = {}
        for row in self.history:
            newest.update(row)
        return {name: value for name, value in newest.items() if name not in _NOT_MEASURED}

    def curves(self, names: Sequence[str]) -> Mapping[str, Points]:
        """Measurements by version, those of ``names`` that there are."""
        found = {
            name: [
                (float(row.get("version", number)), float(row[name]))
                for number, row in enumerate(self.history, start=1)
                if name in row
            ]
            for name in names
        }
        return {name: points for name, points in found.items() if points}


_NOT_MEASURED = frozenset({"seconds", "version"})


class Federations:
    """The runs in the subfolders of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def all(self) -> list[FederationRun]:
        """All of them, the one that changed last first."""
        if not self.folder.is_dir():
            return []
        folders = [path for path in self.folder.iterdir() if (path / "job.json").is_file()]
        return sorted(map(read_run, folders), key=lambda run: run.changed, reverse=True)

    def get(self, name: str) -> FederationRun:
        """One of them. Raises :class:`UnknownFederation`."""
        folder = self.folder / name
        if name != Path(name).name or not (folder / "job.json").is_file():
            raise UnknownFederation(f"there is no federation {name[:100]!r} in {self.folder}")
        return read_run(folder)


def read_run(folder: Path) -> FederationRun:
    """The run in a folder with a ``job.json``, as far as it can be read."""
    report = folder / "report.json"
    changed = max(path.stat().st_mtime for path in (folder, folder / "job.json"))
    try:
        job = json.loads((folder / "job.json").read_text("utf-8"))
        if report.is_file():
            content = json.loads(report.read_text("utf-8"))
            return _finished(folder.name, report.stat().st_mtime, job, content)
        return _unfinished(folder, changed, job)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AnabranchError) as error:
        problem = f"{type(error).__name__}: {error}"
        return FederationRun(folder.name, "damaged", changed, problem=problem)


def _finished(
    name: str, changed: float, job: Mapping[str, Any], report: Mapping[str, Any]
) -> FederationRun:
    return FederationRun(
        name,
        "finished",
        changed,
        strategy=job["strategy"]["name"],
        rounds=report["versions"],
        wanted=job["schedule"]["rounds"],
        clock=report["clock"],
        seconds=report["seconds"],
        clients=_clients(report["traffic"]),
        history=report["history"],
        incidents=report["incidents"],
        job=job,
    )


def _unfinished(folder: Path, changed: float, job: Mapping[str, Any]) -> FederationRun:
    known: dict[str, Any] = {}
    for path in sorted((folder / "run").glob("snapshot-*"), reverse=True):
        try:
            known = read_state(path)["run"]
        except AnabranchError:
            continue  # the one before is complete: a run keeps two
        changed = path.stat().st_mtime
        break
    # The job of a federation over a network does not say so; its folder does.
    simulated = job["runtime"] == "simulation" and not (folder / "network").exists()
    ledger = Ledger()
    if known:
        ledger.load_state_dict(known["ledger"])
    traffic = [
        {"direction": direction, "client": client, **vars(each)}
        for (direction, client), each in ledger.by("direction", "client").items()
    ]
    return FederationRun(
        folder.name,
        "unfinished",
        changed,
        strategy=job["strategy"]["name"],
        rounds=known.get("version", 0),
        wanted=job["schedule"]["rounds"],
        clock="virtual" if simulated else "real",
        seconds=known.get("now", 0.0),
        clients=_clients(traffic),
        history=known.get("history", ()),
        job=job,
    )


def _clients(traffic: Sequence[Mapping[str, Any]]) -> list[ClientTraffic]:
    found: dict[str, ClientTraffic] = {}
    for row in traffic:
        name = row["client"]
        had = found.get(name, ClientTraffic(name))
        size = row["payload"] + row["envelope"]
        up = size if row["direction"] == "up" else 0
        found[name] = ClientTraffic(
            name,
            had.up + up,
            had.down + size - up,
            had.messages + row["messages"],
        )
    return sorted(found.values(), key=lambda client: client.name)
