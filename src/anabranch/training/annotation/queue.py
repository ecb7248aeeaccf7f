"""The queue of people who reject wrong labels: one SQLite file, one process at a time.

A row's label set is what was proposed minus what was rejected, so a coder reads a text with a
proposed label and only has to act where it is wrong. Verdicts are a log: undoing one marks it, and
nothing is deleted.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import random
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anabranch.errors import AnabranchError, ConfigurationError, did_you_mean
from anabranch.training.annotation.agreement import Verdict
from anabranch.training.annotation.crowd import Proposal
from anabranch.training.annotation.table import Document, require_unique
from anabranch.training.errors import DataError

_FORMAT = 1
_SCHEMA = """
CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE documents (row TEXT PRIMARY KEY, text TEXT NOT NULL);
CREATE TABLE proposals (
  row TEXT NOT NULL REFERENCES documents, label TEXT NOT NULL, value TEXT,
  votes INTEGER NOT NULL, probability REAL, models TEXT NOT NULL, PRIMARY KEY (row, label));
CREATE TABLE assignments (
  coder TEXT NOT NULL, position INTEGER NOT NULL, row TEXT NOT NULL REFERENCES documents,
  PRIMARY KEY (coder, row));
CREATE TABLE verdicts (
  number INTEGER PRIMARY KEY, coder TEXT NOT NULL, row TEXT NOT NULL, label TEXT NOT NULL,
  accepted INTEGER NOT NULL, undone INTEGER NOT NULL DEFAULT 0);
CREATE UNIQUE INDEX one_verdict ON verdicts (coder, row, label) WHERE NOT undone;
CREATE INDEX in_order ON assignments (coder, position);
"""
_OPEN = """
SELECT a.row, d.text, p.label, p.value, p.votes, p.models
FROM assignments a JOIN documents d USING (row) JOIN proposals p USING (row)
WHERE a.coder = :coder
  AND NOT EXISTS (SELECT 1 FROM verdicts v WHERE v.coder = a.coder AND v.row = a.row
                  AND v.label = p.label AND NOT v.undone)
  AND NOT (:single AND EXISTS (SELECT 1 FROM verdicts v WHERE v.coder = a.coder AND v.row = a.row
                               AND v.accepted AND NOT v.undone))
ORDER BY a.position, p.votes DESC, p.probability DESC, p.label
"""


class QueueLocked(AnabranchError):
    """Another process works on the same queue."""


@dataclass(frozen=True)
class Review:
    """A text with one label that was proposed for it by ``votes`` labellers."""

    row: str
    text: str
    label: str
    value: str | None
    votes: int
    models: tuple[str, ...]


class ReviewQueue:
    """Proposals and verdicts. A context manager, made by :meth:`create` or :meth:`open`.

    Of a ``single`` queue (one label a row) a coder sees the proposal with the most votes first, and
    the next one only after rejecting it. Of others, every proposed label is judged on its own.
    """

    def __init__(self, path: Path, database: sqlite3.Connection, lock: int) -> None:
        self.path = path
        self._database = database
        self._lock = lock
        about = dict(database.execute("SELECT key, value FROM about"))
        if about.get("format") != str(_FORMAT):
            raise DataError(f"{path} was written by another version of this program")
        self.single = about["single"] == "1"
        self.coders = tuple(sorted(about["coders"].split("\n")))
        self.task: dict[str, Any] = json.loads(about["task"])
        """Options of the classification task, as they were given to :meth:`create`."""

    @classmethod
    def create(
        cls,
        path: Path,
        documents: Sequence[Document],
        proposals: Iterable[Proposal],
        coders: Sequence[str],
        single: bool = True,
        coders_per_row: int = 1,
        overlap: float = 0.1,
        seed: int = 0,
        task: Mapping[str, Any] | None = None,
    ) -> ReviewQueue:
        """A new queue file. Refuses an existing one.

        Every row goes to ``coders_per_row`` coders, and a share ``overlap`` of the rows to one
        more, so that agreement can be measured. Each coder has an order of their own.
        """
        _check(coders, coders_per_row, overlap)
        require_unique(documents)
        if path.exists():
            raise ConfigurationError(f"{path} exists; open it, or choose another name")
        merged = _merged(proposals, {document.id for document in documents})
        generator = random.Random(seed)
        assigned = assign([d.id for d in documents], coders, coders_per_row, overlap, generator)
        with contextlib.ExitStack() as undo:
            lock = _locked(path)
            undo.callback(os.close, lock)
            # Complete under another name first: a killed process leaves no half queue.
            partial = path.with_name(path.name + ".partial")
            partial.unlink(missing_ok=True)
            with contextlib.closing(_connected(partial)) as database, database:
                database.executescript(_SCHEMA)
                about = {
                    "format": str(_FORMAT),
                    "single": str(int(single)),
                    "coders": "\n".join(coders),
                    "task": json.dumps(dict(task or {})),
                }
                database.executemany("INSERT INTO about VALUES (?, ?)", about.items())
                database.executemany(
                    "INSERT INTO documents VALUES (?, ?)", [(d.id, d.text) for d in documents]
                )
                database.executemany("INSERT INTO proposals VALUES (?, ?, ?, ?, ?, ?)", merged)
                for coder, rows in assigned.items():
                    database.executemany(
                        "INSERT INTO assignments VALUES (?, ?, ?)",
                        [(coder, position, row) for position, row in enumerate(rows)],
                    )
            partial.rename(path)
            undo.pop_all()
        return cls(path, _connected(path), lock)

    @classmethod
    def open(cls, path: Path) -> ReviewQueue:
        """An existing queue. Raises :class:`QueueLocked` while another process has it."""
        if not path.is_file():
            raise DataError(f"there is no queue {path}; anabranch label propose makes one")
        lock = _locked(path)
        try:
            return cls(path, _connected(path), lock)
        except (sqlite3.DatabaseError, KeyError) as error:
            os.close(lock)
            raise DataError(f"{path} is no review queue: {error}") from error
        except BaseException:
            os.close(lock)
            raise

    def next(self, coder: str) -> Review | None:
        """What the coder judges next; None when everything is judged."""
        return next(self._open_reviews(coder), None)

    def page(self, coder: str, size: int) -> list[Review]:
        """Up to ``size`` rows to judge together, one label each."""
        found: dict[str, Review] = {}
        for review in self._open_reviews(coder):
            found.setdefault(review.row, review)
            if len(found) == size:
                break
        return list(found.values())

    def accept(self, coder: str, *reviews: Review) -> None:
        """These labels are right for their texts."""
        self._judge(coder, reviews, accepted=True)

    def reject(self, coder: str, *reviews: Review) -> None:
        """These labels are wrong for their texts."""
        self._judge(coder, reviews, accepted=False)

    def undo(self, coder: str) -> Verdict | None:
        """Take back the coder's latest verdict; None if there is none."""
        self._require(coder)
        row = self._database.execute(
            "SELECT number, row, label, accepted FROM verdicts WHERE coder = ? AND NOT undone "
            "ORDER BY number DESC LIMIT 1",
            (coder,),
        ).fetchone()
        if row is None:
            return None
        with self._database:
            self._database.execute("UPDATE verdicts SET undone = 1 WHERE number = ?", row[:1])
        return Verdict(coder, row[1], row[2], bool(row[3]))

    def remaining(self, coder: str) -> int:
        """Rows that the coder has not finished."""
        return len({review.row for review in self._open_reviews(coder)})

    def export(self) -> list[Verdict]:
        """All verdicts that stand, in the order in which they were given.

        Of a single queue, labels that an accepted one of the same coder made needless are left out.
        """
        found = self._database.execute(
            "SELECT v.coder, v.row, v.label, v.accepted, p.value FROM verdicts v "
            "JOIN proposals p USING (row, label) WHERE NOT v.undone ORDER BY v.number"
        )
        return [Verdict(c, row, label, bool(yes), value) for c, row, label, yes, value in found]

    def load(self, verdicts: Iterable[Verdict]) -> None:
        """Add exported verdicts, all or none.

        Raises :class:`DataError` for one that this queue cannot have or already has.
        """
        with self._database:
            for verdict in verdicts:
                self._insert(verdict.coder, verdict.row, verdict.label, verdict.accepted)

    def finished(self) -> set[str]:
        """Rows that all their coders are done with."""
        waiting = {review.row for coder in self.coders for review in self._open_reviews(coder)}
        assigned = self._database.execute("SELECT DISTINCT row FROM assignments")
        return {row for (row,) in assigned} - waiting

    def documents(self) -> Mapping[str, str]:
        """Row -> text."""
        return dict(self._database.execute("SELECT row, text FROM documents"))

    def unproposed(self) -> list[str]:
        """Rows for which no label was proposed; nobody sees them."""
        found = self._database.execute(
            "SELECT row FROM documents WHERE row NOT IN (SELECT row FROM proposals) ORDER BY row"
        )
        return [row for (row,) in found]

    def close(self) -> None:
        """Let other processes have the queue."""
        self._database.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> ReviewQueue:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open_reviews(self, coder: str) -> Iterator[Review]:
        self._require(coder)
        cursor = self._database.execute(_OPEN, {"coder": coder, "single": self.single})
        for row, text, label, value, votes, models in cursor:
            yield Review(row, text, label, value, votes, tuple(models.split("\n")))

    def _judge(self, coder: str, reviews: Sequence[Review], accepted: bool) -> None:
        self._require(coder)
        with self._database:
            for review in reviews:
                self._insert(coder, review.row, review.label, accepted)

    def _insert(self, coder: str, row: str, label: str, accepted: bool) -> None:
        self._require(coder)
        found = self._database.execute(
            "SELECT 1 FROM proposals JOIN assignments USING (row) "
            "WHERE coder = ? AND row = ? AND label = ?",
            (coder, row, label),
        ).fetchone()
        if found is None:
            raise DataError(f"label {label!r} of row {row!r} is not for coder {coder!r} to judge")
        try:
            self._database.execute(
                "INSERT INTO verdicts (coder, row, label, accepted) VALUES (?, ?, ?, ?)",
                (coder, row, label, int(accepted)),
            )
        except sqlite3.IntegrityError:
            raise DataError(
                f"coder {coder!r} has judged label {label!r} of row {row!r}; undo that first"
            ) from None

    def _require(self, coder: str) -> None:
        if coder not in self.coders:
            raise DataError(
                f"no coder named {coder!r}{did_you_mean(coder, self.coders)}; "
                f"this queue has {', '.join(self.coders)}"
            )


def assign(
    rows: Sequence[str],
    coders: Sequence[str],
    coders_per_row: int,
    overlap: float,
    generator: random.Random,
) -> dict[str, list[str]]:
    """Coder -> rows in their order, with loads that differ by at most one row."""
    found: dict[str, list[str]] = {coder: [] for coder in coders}
    shuffled = generator.sample(rows, len(rows))
    extra = set(shuffled[: math.ceil(overlap * len(rows))] if len(coders) > coders_per_row else ())
    for row in rows:
        # The least loaded first; ties by chance, so that no two coders always meet.
        free = sorted(coders, key=lambda coder: (len(found[coder]), generator.random()))
        for coder in free[: coders_per_row + (row in extra)]:
            found[coder].append(row)
    for own in found.values():
        generator.shuffle(own)
    return found


def _check(coders: Sequence[str], coders_per_row: int, overlap: float) -> None:
    if not coders or len(set(coders)) < len(coders) or any("\n" in c or not c for c in coders):
        raise ConfigurationError(f"coders need names of their own, not {list(coders)}")
    if not 1 <= coders_per_row <= len(coders):
        raise ConfigurationError(
            f"coders_per_row must be 1 to {len(coders)} (the number of coders), "
            f"not {coders_per_row}"
        )
    if not 0 <= overlap <= 1:
        raise ConfigurationError(f"overlap is a share of the rows from 0 to 1, not {overlap}")


def _merged(proposals: Iterable[Proposal], rows: set[str]) -> list[tuple[Any, ...]]:
    """One entry a (row, label): votes, mean probability, the value that most models gave."""
    grouped: dict[tuple[str, str], list[Proposal]] = {}
    for proposal in proposals:
        if proposal.row not in rows:
            raise DataError(f"a label is proposed for row {proposal.row!r}, which is not there")
        grouped.setdefault((proposal.row, proposal.label), []).append(proposal)
    merged = []
    for (row, label), given in grouped.items():
        values = [p.value for p in given if p.value is not None]
        value = max(values, key=values.count) if values else None
        known = [p.probability for p in given if p.probability is not None]
        probability = sum(known) / len(known) if known else None
        models = "\n".join(p.model for p in given)
        merged.append((row, label, value, len(given), probability, models))
    return merged


def _connected(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path)
    database.execute("PRAGMA foreign_keys = ON")
    database.execute("PRAGMA synchronous = FULL")
    return database


def _locked(path: Path) -> int:
    """An exclusive lock that vanishes with its process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"cannot write beside {path}: {error}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise QueueLocked(
            f"{path} is open in another process; one process works on a queue at a time"
        ) from None
    return file
