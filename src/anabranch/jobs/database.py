"""Tables, and how the database is opened.

SQLite runs in WAL mode with full synchronisation: readers never wait, and what was committed is
still there after a power cut. A writing transaction takes SQLite's only write lock when it begins,
so that what it read cannot change under it; other databases lock the rows it changes.
"""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Connection,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    func,
    insert,
    inspect,
    make_url,
    select,
    update,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from anabranch.jobs.errors import StoreTooNew, StoreUnusable
from anabranch.jobs.migrations import MIGRATIONS

metadata = MetaData()

version_table = Table("anabranch_schema", metadata, Column("version", Integer, nullable=False))

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("kind", String(32), nullable=False),
    Column("target", String(255), nullable=False, default=""),
    Column("name", String(255), nullable=False, default=""),
    Column("owner", String(64)),
    Column("state", String(16), nullable=False),
    Column("wanted", String(16), nullable=False, default="run"),
    Column("priority", Integer, nullable=False, default=0),
    Column("spec", JSON, nullable=False),
    Column("progress", JSON, nullable=False),
    Column("error", Text),
    Column("created", Float(53), nullable=False),
    Column("started", Float(53)),
    Column("finished", Float(53)),
    Column("lease", String(255)),
    Column("beat", Float(53)),
    Column("num_events", Integer, nullable=False, default=0),
    Index("jobs_by_turn", "kind", "state", "priority", "created"),
    Index("jobs_by_age", "kind", "owner", "created", "id"),
    Index("jobs_by_name", "kind", "target", "name"),
    Index("jobs_by_lease", "lease"),
)

events = Table(
    "events",
    metadata,
    Column("job_id", String(64), primary_key=True),
    Column("sequence", Integer, primary_key=True, autoincrement=False),
    Column("time", Float(53), nullable=False),
    Column("level", String(8), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("message", Text, nullable=False),
    Column("data", JSON, nullable=False),
    Index("events_by_kind", "job_id", "kind", "sequence"),
)

artefacts = Table(
    "artefacts",
    metadata,
    Column("job_id", String(64), primary_key=True),
    Column("name", String(255), primary_key=True),
    Column("path", Text, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
)

files = Table(
    "files",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(64)),
    Column("filename", Text, nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("created", Float(53), nullable=False),
    Index("files_by_age", "owner", "created", "id"),
)


def sqlite_url(path: Path) -> str:
    """The URL of a SQLite file; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{path.absolute()}"


def open_database(url: str) -> Engine:
    """Connect and bring the schema up to date.

    Raises :class:`StoreTooNew` for a schema of a later version, :class:`StoreUnusable` for an
    address that is none, a missing driver or a database that refuses.
    """
    try:
        shown = make_url(url).render_as_string(hide_password=True)
        engine = _engine(url)
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise StoreUnusable(
            f"cannot use the job store's URL: {error}; write for example "
            f"sqlite:////var/lib/anabranch/jobs.sqlite or postgresql+psycopg://user@host/name"
        ) from error
    try:
        with writing(engine).begin() as connection:
            _migrate(connection, shown)
    except DBAPIError as error:
        engine.dispose()
        raise StoreUnusable(f"cannot open the job store {shown}: {error.orig}") from error
    except StoreTooNew:
        engine.dispose()
        raise
    return engine


def writing(engine: Engine) -> Engine:
    """The same database, for transactions that write."""
    return engine.execution_options(anabranch_writes=True)


def alone(connection: Connection) -> None:
    """Let nobody else be between here and the end of the transaction, which writes.

    For what a row's lock cannot protect: that something is not there.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))
    # SQLite has one writer at a time anyway.


def write_ahead(connection: sqlite3.Connection) -> None:
    """Switch a connection to SQLite to WAL mode.

    Of two that switch at once SQLite refuses one without waiting, lest they wait for each other
    (https://sqlite.org/c3ref/busy_handler.html).
    """
    give_up = time.monotonic() + _PATIENCE
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL").close()
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > give_up:
                raise
        time.sleep(0.01)


_LOCK = int.from_bytes(b"anabrnch", "big")
"""Any number below 2**63 that other programs are unlikely to lock in the same database."""

_PATIENCE = 30
"""Seconds for which SQLite's lock is waited for."""


def _engine(url: str) -> Engine:
    if make_url(url).get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True)
    engine = create_engine(url, connect_args={"timeout": _PATIENCE, "check_same_thread": False})

    @event.listens_for(engine, "connect")
    def configure(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # transactions begin where we say, not the driver
        write_ahead(connection)
        connection.execute("PRAGMA synchronous=FULL").close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("anabranch_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _migrate(connection: Connection, shown: str) -> None:
    newest = 1 + len(MIGRATIONS)
    alone(connection)
    if not inspect(connection).has_table(version_table.name):
        metadata.create_all(connection)
        connection.execute(insert(version_table).values(version=newest))
        return
    found = connection.execute(select(version_table.c.version).with_for_update()).scalar_one()
    if found > newest:
        raise StoreTooNew(
            f"the job store {shown} has schema version {found}, which a newer Anabranch wrote; "
            f"this one knows versions up to {newest}: update it, or use another store"
        )
    for migrate in MIGRATIONS[found - 1 :]:
        migrate(connection)
    if found < newest:
        connection.execute(update(version_table).values(version=newest))
