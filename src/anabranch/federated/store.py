"""What outlives a killed process.

A file of state is written beside its place, flushed and renamed, and carries its own digest. A run
is a folder::

    lock                  held by the process that runs it
    snapshot-000000012    everything the coordinator knows after 12 events
    journal-000000012     the events after that, each flushed before anything follows from it
    clients/<name>        personal state and replies of a simulated site

Resuming loads the newest snapshot and handles the journal's events again, without sending
anything: the coordinator is then where it was, whatever the order of arrival had been, and knows
which replies are still to come. Behaviour when something fails:

=============================  ====================================================
killed while a file is written  the previous one stays
killed while journalling        the torn last event is dropped; its sender sends it again
newest snapshot is damaged      the one before and both journals are read, with a warning
=============================  ====================================================
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from anabranch.federated import trees
from anabranch.federated.errors import PayloadError, StoreError
from anabranch.files import replacing, sync

logger = logging.getLogger(__name__)

MAGIC = b"anabranch federated state 1\n"
_DIGEST = 16
_RECORD = struct.Struct(f"<I{_DIGEST}s")


def write_state(path: Path, tree: Any) -> None:
    """Write a tree, whole or not at all."""
    data = trees.dump(tree)
    try:
        with replacing(path) as draft:
            draft.write_bytes(b"".join((MAGIC, _digest(data), data)))
        sync(path.parent)
    except OSError as error:
        raise StoreError(f"{path} could not be written: {error}; the old one stays") from error


def read_state(path: Path) -> Any:
    """Read a tree; :class:`StoreError` if the file is not what was written."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    start = len(MAGIC) + _DIGEST
    if not data.startswith(MAGIC) or _digest(data[start:]) != data[len(MAGIC) : start]:
        raise StoreError(f"{path} is damaged, or not from this version")
    try:
        return trees.load(data[start:])
    except PayloadError as error:
        raise StoreError(f"{path} is damaged: {error}") from error


class ClientStore:
    """What one site must not lose, in one file: its state and its last replies together."""

    def __init__(self, folder: Path, name: str) -> None:
        # A name may hold a slash or be ".."; quoted it is one file, and no other name's file.
        self.path = folder / (quote(name, safe="").replace(".", "%2E") or "%")

    def load(self) -> Any:
        """The stored tree, or None."""
        return read_state(self.path) if self.path.exists() else None

    def save(self, tree: Any) -> None:
        """Replace it."""
        write_state(self.path, tree)


class RunStore:
    """A run's snapshots and journal, for one process at a time. The newest ``keep`` stay."""

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self.folder = Path(folder)
        self.keep = keep
        self._journal: BinaryIO | None = None
        self._last = 0
        """Where the last event begins in the journal."""
        self._lock: BinaryIO | None = None

    @property
    def clients(self) -> Path:
        """Where simulated sites store theirs."""
        return self.folder / "clients"

    def open(self) -> None:
        """Take the folder; :class:`StoreError` if another process has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("ab")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise StoreError(f"{self.folder} is in use by another process") from None

    def close(self) -> None:
        """Let go of the folder."""
        for file in (self._journal, self._lock):
            if file is not None:
                file.close()
        self._journal = self._lock = None

    def snapshots(self) -> list[int]:
        """Numbers of the snapshots, readable or not, ascending."""
        return self._numbers("snapshot")

    def save(self, events: int, state: Any) -> None:
        """Store everything after so many events, and begin a new journal."""
        write_state(self._path("snapshot", events), state)
        self._open_journal(events)
        old = self.snapshots()[: -self.keep]
        for number in old:
            self._path("journal", number).unlink(missing_ok=True)
            self._path("snapshot", number).unlink(missing_ok=True)

    def append(self, tree: Any) -> None:
        """Add an event to the journal; afterwards it is on the disk."""
        assert self._journal is not None, "a snapshot comes first"
        data = trees.dump(tree)
        self._last = self._journal.tell()
        try:
            self._journal.write(_RECORD.pack(len(data), _digest(data)) + data)
            self._journal.flush()
            os.fsync(self._journal.fileno())
        except OSError as error:
            raise StoreError(f"{self._journal.name} could not be written: {error}") from error

    def retract(self) -> None:
        """Take the last event back: it could not be handled."""
        assert self._journal is not None
        self._journal.truncate(self._last)
        self._journal.seek(self._last)
        os.fsync(self._journal.fileno())

    def load(self) -> tuple[Any, list[Any]]:
        """The newest snapshot that can be read and the events after it; then appending goes on."""
        problems = []
        for number in reversed(self.snapshots()):
            try:
                state = read_state(self._path("snapshot", number))
            except StoreError as error:
                logger.warning("%s; trying the one before", error)
                problems.append(str(error))
                continue
            return state, self._events_from(number)
        raise StoreError(
            f"there is no run to resume in {self.folder}{': ' if problems else ''}"
            + "; ".join(problems)
        )

    @property
    def used(self) -> bool:
        """Whether a run, or what its sites stored, is there."""
        return bool(self.snapshots()) or any(self.clients.glob("*"))

    def _events_from(self, snapshot: int) -> list[Any]:
        """The events after a snapshot; the last journal is then open to go on with."""
        events: list[Any] = []
        last = snapshot  # whose journal may be missing, if the process died before it made one
        for journal in [number for number in self._numbers("journal") if number >= snapshot]:
            if journal != snapshot + len(events):  # a record of the journal before is damaged
                missing = f"events {snapshot + len(events)} to {journal}"
                raise StoreError(f"{missing} are missing in {self.folder}")
            path = self._path("journal", journal)
            records, end = _records(path.read_bytes())
            events += records
            if path.stat().st_size != end:
                logger.warning("%s: the last event was cut off, and is awaited again", path)
                os.truncate(path, end)
            last = journal
        self._open_journal(last)
        return events

    def _open_journal(self, number: int) -> None:
        if self._journal is not None:
            self._journal.close()
        self._journal = self._path("journal", number).open("ab")
        sync(self.folder)

    def _path(self, what: str, number: int) -> Path:
        return self.folder / f"{what}-{number:09d}"

    def _numbers(self, what: str) -> list[int]:
        found = (path.name.removeprefix(f"{what}-") for path in self.folder.glob(f"{what}-*"))
        return sorted(int(number) for number in found if number.isdecimal())


def _records(data: bytes) -> tuple[list[Any], int]:
    """The whole records at the beginning, and where they end."""
    records, start = [], 0
    while start + _RECORD.size <= len(data):
        length, digest = _RECORD.unpack_from(data, start)
        content = data[start + _RECORD.size : start + _RECORD.size + length]
        if len(content) != length or _digest(content) != digest:
            break
        records.append(trees.load(content))
        start += _RECORD.size + length
    return records, start


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()
