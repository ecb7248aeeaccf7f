"""Jobs in a database: what was asked, how far they are, and who runs them.

A process runs a job only while it holds the job's *lease*, which it renews by :meth:`beat`. A
lease whose process is gone (on the same machine), or that was not renewed for ``lease_seconds``,
is free, so a job outlives a crash: the next process that claims it goes on. Writing about a job
needs its lease; a process that was suspended for too long finds its reports refused.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    and_,
    delete,
    false,
    func,
    insert,
    or_,
    select,
    update,
)

from anabranch.errors import InvalidRequest
from anabranch.jobs import database, process
from anabranch.jobs.database import artefacts, events, jobs
from anabranch.jobs.errors import NameTaken, UnknownJob
from anabranch.jobs.records import Artefact, Event, Job, NewEvent, Page, Report, Wanted
from anabranch.jobs.states import FINISHED, State, require

_COLUMNS = [column for column in jobs.c if column.name != "num_events"]


class JobStore:
    """All jobs of one database; any number of processes may use it, and any thread of them.

    Without an ``owner`` a method sees every job, with one only that owner's.
    """

    def __init__(
        self,
        url: str,
        *,
        lease_seconds: float = 30.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.process = process.own_name()
        self.lease_seconds = lease_seconds
        self.clock = clock
        self.engine = database.open_database(url)
        self._writer = database.writing(self.engine)

    def close(self) -> None:
        """Drop the connections. Leases stay until they are released or expire."""
        self.engine.dispose()

    # What clients ask

    def create(
        self,
        kind: str,
        spec: Mapping[str, Any],
        *,
        id: str | None = None,  # noqa: A002
        target: str = "",
        name: str = "",
        owner: str | None = None,
        exclusive: bool = False,
        priority: int = 0,
        notes: Sequence[NewEvent] = (),
    ) -> Job:
        """Add a queued job.

        ``exclusive``: raises :class:`NameTaken` if an unfinished one has this ``name``.
        """
        id = id or f"job-{uuid.uuid4().hex}"  # noqa: A001
        with self._writer.begin() as connection:
            if exclusive:
                database.alone(connection)
                _refuse_taken(connection, kind, target, name)
            connection.execute(
                insert(jobs).values(
                    id=id,
                    kind=kind,
                    target=target,
                    name=name,
                    owner=owner,
                    state="queued",
                    priority=priority,
                    spec=dict(spec),
                    progress={},
                    created=self.clock(),
                )
            )
            self._note(connection, id, notes)
            return _load(connection, id, None)

    def get(self, job_id: str, owner: str | None = None, *, kind: str | None = None) -> Job:
        """One job; :class:`UnknownJob` if there is none (of this kind) that the owner may see."""
        with self.engine.begin() as connection:
            job = _load(connection, job_id, owner)
        if kind is not None and job.kind != kind:
            raise UnknownJob(f"there is no job {job_id[:100]!r} of the kind {kind!r}")
        return job

    def find(
        self,
        kind: str | None = None,
        *,
        owner: str | None = None,
        labels: Mapping[str, str] | None = None,
        states: Collection[State] = (),
        after: str | None = None,
        limit: int = 20,
    ) -> Page[Job]:
        """Newest first, of one kind or all, from behind the job ``after``; ``labels`` are compared
        with the spec's ``metadata``. Raises :class:`InvalidRequest` for an ``after`` that is no
        job.
        """
        query = select(*_COLUMNS).where(*owned(jobs.c.owner, owner))
        if kind is not None:
            query = query.where(jobs.c.kind == kind)
        if states:
            query = query.where(jobs.c.state.in_(states))
        for label, value in (labels or {}).items():
            query = query.where(jobs.c.spec["metadata"][label].as_string() == value)
        with self.engine.begin() as connection:
            if after is not None:
                query = query.where(behind(connection, jobs, after, owner, descending=True))
            query = query.order_by(jobs.c.created.desc(), jobs.c.id.desc())
            return page(connection, query, limit, _job)

    def starting_with(self, start: str, owner: str | None = None) -> list[Job]:
        """Jobs whose id begins so, oldest first: ids are long."""
        query = (
            select(*_COLUMNS)
            .where(jobs.c.id.startswith(start, autoescape=True), *owned(jobs.c.owner, owner))
            .order_by(jobs.c.created, jobs.c.id)
        )
        with self.engine.begin() as connection:
            return [_job(row) for row in connection.execute(query)]

    def ask(self, job_id: str, wanted: Wanted, owner: str | None = None) -> Job:
        """Ask for a job to be paused, to go on, or to be given up.

        A job that no process holds changes at once, for one that runs see :meth:`wishes`. Raises
        :class:`ForbiddenTransition` if its state has no such way out.
        """
        with self._writer.begin() as connection:
            job = _load(connection, job_id, owner, lock=True)
            if wanted == "run":
                after: State = job.state if job.state in ("queued", "running") else "queued"
            else:
                after = "paused" if wanted == "pause" else "cancelled"
            require(job_id, job.state, after)
            values: dict[str, Any] = {"wanted": wanted}
            if wanted == "run" or job.state == "queued" or self._is_free(connection, job):
                values |= self._entering(job, after)
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(values))
            return _load(connection, job_id, None)

    def events(
        self,
        job_id: str,
        *,
        kind: str | None = None,
        after: int | None = None,
        limit: int = 20,
        descending: bool = False,
    ) -> Page[Event]:
        """What was noted about a job, behind the sequence number ``after``."""
        order = events.c.sequence.desc() if descending else events.c.sequence.asc()
        query = select(events).where(events.c.job_id == job_id).order_by(order)
        if kind is not None:
            query = query.where(events.c.kind == kind)
        if after is not None:
            behind = events.c.sequence < after if descending else events.c.sequence > after
            query = query.where(behind)
        with self.engine.begin() as connection:
            return page(connection, query, limit, lambda row: Event(**row._mapping))

    def artefacts(self, *job_ids: str) -> dict[str, dict[str, Artefact]]:
        """What each of these jobs made, by name."""
        query = select(artefacts).where(artefacts.c.job_id.in_(job_ids))
        found: dict[str, dict[str, Artefact]] = {job_id: {} for job_id in job_ids}
        with self.engine.begin() as connection:
            for row in connection.execute(query):
                found[row.job_id][row.name] = Artefact(row.name, row.path, row.size, row.sha256)
        return found

    def made(self, kind: str, artefact: str, targets: Collection[str]) -> list[tuple[Job, str]]:
        """Jobs that have an artefact of this name, oldest first, with its path."""
        query = (
            select(*_COLUMNS, artefacts.c.path)
            .join(artefacts, artefacts.c.job_id == jobs.c.id)
            .where(jobs.c.kind == kind, jobs.c.target.in_(targets), artefacts.c.name == artefact)
            .order_by(jobs.c.created, jobs.c.id)
        )
        with self.engine.begin() as connection:
            return [(_job(row), row.path) for row in connection.execute(query)]

    def forget(self, kind: str, target: str, name: str, artefact: str) -> None:
        """Take an artefact off the lists of the jobs that make ``name``; its files stay."""
        those = select(jobs.c.id).where(
            jobs.c.kind == kind, jobs.c.target == target, jobs.c.name == name
        )
        this = and_(artefacts.c.job_id.in_(those), artefacts.c.name == artefact)
        with self._writer.begin() as connection:
            connection.execute(delete(artefacts).where(this))

    # What processes that run jobs ask

    def claim(self, kinds: Collection[str], targets: Collection[str] = ("",)) -> Job | None:
        """Take the lease of the next job that nobody runs, or None.

        Higher priority first, then the older one; what a dead process ran counts like what is
        queued. The job is running afterwards. No two processes ever get the same job.
        """
        with self._writer.begin() as connection:
            free = self._free(connection)
            mine_again = and_(jobs.c.state == "queued", jobs.c.lease == self.process)
            turn = and_(jobs.c.state.in_(("queued", "running")), free)
            mine = jobs.c.kind.in_(list(kinds)), jobs.c.target.in_(targets)
            query = (
                select(*_COLUMNS)
                .where(*mine, or_(turn, mine_again))
                .order_by(jobs.c.priority.desc(), jobs.c.created, jobs.c.id)
                .limit(1)
                .with_for_update(skip_locked=True)
            )
            while (row := connection.execute(query).first()) is not None:
                job = _job(row)
                # What was asked while a process that is now gone held it.
                if job.wanted != "run" and job.state == "running":
                    after: State = "paused" if job.wanted == "pause" else "cancelled"
                    values = self._entering(job, after)
                    connection.execute(update(jobs).where(jobs.c.id == job.id).values(values))
                    continue
                values = self._entering(job, "running")
                values |= {"lease": self.process, "beat": self.clock()}
                connection.execute(update(jobs).where(jobs.c.id == job.id).values(values))
                return _load(connection, job.id, None)
            return None

    def beat(self) -> None:
        """Renew this process's leases."""
        mine = jobs.c.lease == self.process
        with self._writer.begin() as connection:
            connection.execute(update(jobs).where(mine).values(beat=self.clock()))

    def wishes(self) -> dict[str, Job]:
        """The unfinished jobs that this process holds, by id: read ``wanted`` and ``state``."""
        mine = jobs.c.lease == self.process
        with self.engine.begin() as connection:
            return {row.id: _job(row) for row in connection.execute(select(*_COLUMNS).where(mine))}

    def release(self, kinds: Collection[str]) -> None:
        """Give the leases back without a change of state: the next process goes on."""
        mine = and_(jobs.c.lease == self.process, jobs.c.kind.in_(list(kinds)))
        with self._writer.begin() as connection:
            connection.execute(update(jobs).where(mine).values(lease=None, beat=None))

    def record(self, reports: Sequence[Report]) -> set[str]:
        """Write what happened to jobs that this process holds, in order and in one transaction.

        Returns the ids of jobs whose lease is no longer its own: nothing was written about them.
        Raises :class:`ForbiddenTransition`; then nothing was written at all.
        """
        lost = set()
        with self._writer.begin() as connection:
            for report in reports:
                job = _load(connection, report.job_id, None, lock=True)
                if job.lease != self.process:
                    lost.add(job.id)
                    continue
                self._record(connection, job, report)
        return lost

    def _record(self, connection: Connection, job: Job, report: Report) -> None:
        values: dict[str, Any] = {}
        if report.state is not None:
            require(job.id, job.state, report.state)
            values |= self._entering(job, report.state)
        if report.progress is not None:
            values["progress"] = dict(report.progress)
        if report.error is not None:
            values["error"] = report.error
        if values:
            connection.execute(update(jobs).where(jobs.c.id == job.id).values(values))
        self._note(connection, job.id, report.events)
        for made in report.artefacts:
            this = and_(artefacts.c.job_id == job.id, artefacts.c.name == made.name)
            connection.execute(delete(artefacts).where(this))
            connection.execute(insert(artefacts).values(job_id=job.id, **vars(made)))

    def _entering(self, job: Job, state: State) -> dict[str, Any]:
        """What changes when a job goes into a state."""
        values: dict[str, Any] = {"state": state}
        if state == "running" and job.started is None:
            values["started"] = self.clock()
        if state in FINISHED and job.state not in FINISHED:
            values |= {"finished": self.clock(), "lease": None, "beat": None}
        return values

    def _note(self, connection: Connection, job_id: str, notes: Sequence[NewEvent]) -> None:
        if not notes:
            return
        this = jobs.c.id == job_id
        added = jobs.c.num_events + len(notes)
        connection.execute(update(jobs).where(this).values(num_events=added))
        last = connection.execute(select(jobs.c.num_events).where(this)).scalar_one()
        rows = [
            {
                "job_id": job_id,
                "sequence": sequence,
                "time": self.clock() if note.time is None else note.time,
                "level": note.level,
                "kind": note.kind,
                "message": note.message,
                "data": dict(note.data),
            }
            for sequence, note in enumerate(notes, start=last - len(notes) + 1)
        ]
        connection.execute(insert(events), rows)

    def _free(self, connection: Connection) -> ColumnElement[bool]:
        """The condition that nobody alive holds a job."""
        holders = connection.execute(
            select(jobs.c.lease).where(jobs.c.lease.is_not(None)).distinct()
        )
        gone = [name for (name,) in holders if name != self.process and process.is_gone(name)]
        stale = jobs.c.beat < self.clock() - self.lease_seconds
        others = and_(jobs.c.lease != self.process, stale)
        return or_(jobs.c.lease.is_(None), others, jobs.c.lease.in_(gone) if gone else false())

    def _is_free(self, connection: Connection, job: Job) -> bool:
        this = and_(jobs.c.id == job.id, self._free(connection))
        return connection.execute(select(func.count()).where(this)).scalar_one() > 0


def page(
    connection: Connection, query: Select[Any], limit: int, make: Callable[[Any], Any]
) -> Page[Any]:
    """The first ``limit`` rows of an ordered query."""
    rows = connection.execute(query.limit(limit + 1)).all()
    return Page([make(row) for row in rows[:limit]], len(rows) > limit)


def behind(
    connection: Connection,
    table: Any,
    cursor: str,
    owner: str | None,
    descending: bool,
) -> ColumnElement[bool]:
    """The condition that a row comes after the one whose id is ``cursor``, by age."""
    query = select(table.c.created).where(table.c.id == cursor, *owned(table.c.owner, owner))
    created = connection.execute(query).scalar()
    if created is None:
        raise InvalidRequest("after", f"there is no {cursor[:100]!r} to go on from")
    if descending:
        further, tie = table.c.created < created, table.c.id < cursor
    else:
        further, tie = table.c.created > created, table.c.id > cursor
    return or_(further, and_(table.c.created == created, tie))


def owned(column: Any, owner: str | None) -> list[ColumnElement[bool]]:
    """The condition that a row may be seen; none without an owner."""
    return [] if owner is None else [column == owner]


def _load(connection: Connection, job_id: str, owner: str | None, lock: bool = False) -> Job:
    query = select(*_COLUMNS).where(jobs.c.id == job_id, *owned(jobs.c.owner, owner))
    if lock:
        query = query.with_for_update()
    row = connection.execute(query).first()
    if row is None:
        raise UnknownJob(f"there is no job {job_id[:100]!r}")
    return _job(row)


def _job(row: Any) -> Job:
    return Job(**{column.name: row._mapping[column.name] for column in _COLUMNS})


def _refuse_taken(connection: Connection, kind: str, target: str, name: str) -> None:
    query = select(jobs.c.id).where(
        jobs.c.kind == kind,
        jobs.c.target == target,
        jobs.c.name == name,
        jobs.c.state.not_in(FINISHED),
    )
    if connection.execute(query).first() is not None:
        raise NameTaken(f"an unfinished job already makes {name!r}; choose another name")
