"""Who may take part: invitations and sites of a federation, in a small database.

Secrets and keys are stored as SHA-256 digests; they are random, so that a digest tells nothing. The
command line and a running coordinator use the same file at the same time.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from anabranch.errors import ConfigurationError, UnknownName
from anabranch.federated.runtimes.network.errors import NameTaken, NotAllowed, NotKnown

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS invitations (digest TEXT PRIMARY KEY, name TEXT, used_by TEXT);
CREATE TABLE IF NOT EXISTS sites (
    name TEXT PRIMARY KEY, digest TEXT UNIQUE NOT NULL, examples INTEGER NOT NULL,
    joined REAL NOT NULL, revoked REAL
);
"""


@dataclass(frozen=True)
class Member:
    """A site that joined. ``examples`` is what it declared then; times are seconds since 1970."""

    name: str
    examples: int
    joined: float
    revoked: float | None = None


class Roster:
    """The members of the federation in a folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "sites.sqlite"
        if not self.path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            self.path.touch(mode=0o600)
        with self._database() as database:
            database.executescript(_TABLES)
        self.run = self.remember("run", secrets.token_hex(8))
        """The id of this federation."""

    def remember(self, name: str, value: str, replace: bool = False) -> str:
        """Store a fact if there is none of this name, or in any case; what is stored then."""
        verb = "REPLACE" if replace else "INSERT OR IGNORE"
        with self._database() as database:
            database.execute(f"{verb} INTO facts VALUES (?, ?)", (name, value))
        return self.fact(name) or value

    def fact(self, name: str) -> str | None:
        """A stored fact, such as the address under which the coordinator was served last."""
        with self._database() as database:
            row = database.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def invite(self, name: str | None = None) -> str:
        """A new secret that admits one site; only one of this name, if one is given."""
        if name is not None:
            require_name(name)
            if name in {site.name for site in self.sites()}:
                raise NameTaken(f"there is a site {name} already; choose another name")
        secret = secrets.token_urlsafe(24)
        with self._database() as database:
            database.execute("INSERT INTO invitations VALUES (?, ?, NULL)", (_digest(secret), name))
        return secret

    def invited(self, secret: str) -> bool:
        """Whether this secret is one that nobody has used."""
        with self._database() as database:
            row = database.execute(
                "SELECT used_by FROM invitations WHERE digest = ?", (_digest(secret),)
            ).fetchone()
        return row is not None and row[0] is None

    def open_invitations(self) -> int:
        """How many nobody has used."""
        with self._database() as database:
            query = "SELECT COUNT(*) FROM invitations WHERE used_by IS NULL"
            return int(database.execute(query).fetchone()[0])

    def join(self, secret: str, key: str, name: str, examples: int) -> Member:
        """Exchange an invitation's secret for membership under a key that the site has chosen.

        A site that did not hear the answer may ask again with the same key. Raises
        :class:`NotAllowed` if the secret was used with another one.
        """
        require_name(name)
        with self._database() as database:
            found = database.execute(
                "SELECT name, used_by FROM invitations WHERE digest = ?", (_digest(secret),)
            ).fetchone()
            if found is None:
                raise NotKnown("nobody was invited with this secret; ask for a new invitation")
            wanted, used_by = found
            if used_by is not None:
                member = _member(database, "digest", _digest(key))
                if member is None or member.name != used_by:
                    raise NotAllowed(
                        f"this invitation was used by {used_by}; ask for a new one: "
                        f"anabranch federation invite"
                    )
                return _in_force(member)
            if wanted not in (None, name):
                raise NotAllowed(f"this invitation is for {wanted}, not for {name}")
            if _member(database, "name", name) is not None:
                raise NameTaken(f"there is a site {name} already; choose another with --name")
            database.execute(
                "INSERT INTO sites VALUES (?, ?, ?, ?, NULL)",
                (name, _digest(key), examples, time.time()),
            )
            database.execute(
                "UPDATE invitations SET used_by = ? WHERE digest = ?", (name, _digest(secret))
            )
        return Member(name, examples, time.time())

    def member(self, key: str) -> Member:
        """The site that this key belongs to; :class:`NotAllowed` if none, or one revoked."""
        with self._database() as database:
            found = _member(database, "digest", _digest(key))
        if found is None:
            raise NotKnown("this key is no site's; join with an invitation")
        return _in_force(found)

    def revoke(self, name: str) -> None:
        """From now on a site is refused; its name stays taken."""
        with self._database() as database:
            names = [row[0] for row in database.execute("SELECT name FROM sites")]
            if name not in names:
                raise UnknownName("site", name, names)
            database.execute(
                "UPDATE sites SET revoked = ? WHERE name = ? AND revoked IS NULL",
                (time.time(), name),
            )

    def sites(self) -> list[Member]:
        """Everyone who ever joined, sorted by name."""
        with self._database() as database:
            rows = database.execute("SELECT name, examples, joined, revoked FROM sites").fetchall()
        return sorted((Member(*row) for row in rows), key=lambda member: member.name)

    def examples(self) -> Mapping[str, int]:
        """What each site that is not revoked declared."""
        return {site.name: site.examples for site in self.sites() if site.revoked is None}

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """One transaction. Connections belong to threads, so each has its own."""
        database = sqlite3.connect(self.path, timeout=30.0, isolation_level=None)
        try:
            database.execute("BEGIN IMMEDIATE")
            yield database
            if database.in_transaction:  # a script ends it by itself
                database.execute("COMMIT")
        finally:
            database.close()  # rolls back what was not committed


def require_name(name: str) -> None:
    """Raises :class:`ConfigurationError` for a name that no site may have."""
    if not NAME.fullmatch(name):
        raise ConfigurationError(
            f"{name[:80]!r} is no name for a site: use up to 64 letters, digits, dots, - and _"
        )


def _member(database: sqlite3.Connection, column: str, value: str) -> Member | None:
    row = database.execute(
        f"SELECT name, examples, joined, revoked FROM sites WHERE {column} = ?", (value,)
    ).fetchone()
    return None if row is None else Member(*row)


def _in_force(member: Member) -> Member:
    if member.revoked is not None:
        raise NotAllowed(f"{member.name} was revoked; ask whoever runs the coordinator")
    return member


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
