"""A PostgreSQL of the tests' own, where it is installed."""

from __future__ import annotations

import itertools
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_numbers = itertools.count()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URL of a server without its database, which is still to be named."""
    reason = "PostgreSQL or its driver is not installed: pip install pgserver 'psycopg[binary]'"
    pgserver = pytest.importorskip("pgserver", reason=reason)
    pytest.importorskip("psycopg", reason=reason)
    # Not below pytest's folder: as root it runs as a user of its own, who may not go there.
    with tempfile.TemporaryDirectory(prefix="anabranch-postgresql-") as folder:
        server = pgserver.get_server(Path(folder) / "data", cleanup_mode="stop")
        try:
            yield f"postgresql+psycopg://postgres:@/{{name}}?host={folder}/data"
        finally:
            # At once: an orderly end would bring databases to the disk that nobody needs.
            os.kill(server.get_pid(), signal.SIGQUIT)
            server.cleanup()


@pytest.fixture
def empty_postgresql(postgresql: str) -> str:
    """The URL of a new database."""
    import psycopg

    name = f"test_{next(_numbers)}"
    address = postgresql.replace("+psycopg", "")
    with psycopg.connect(address.format(name="postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return postgresql.format(name=name)
