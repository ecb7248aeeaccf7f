"""Files that clients upload and jobs leave for them: whole, or not there."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sqlalchemy import Engine, delete, insert, select

from anabranch.files import sync
from anabranch.jobs import database
from anabranch.jobs.database import files
from anabranch.jobs.errors import FileTooLarge, UnknownFile
from anabranch.jobs.records import Page
from anabranch.jobs.store import behind, owned, page

MAX_BYTES = 512 * 1024 * 1024
ABANDONED_SECONDS = 24 * 3600.0
"""After which what has a place on the disk and none in the store belongs to nobody alive."""

_CHUNK = 1 << 20


@dataclass(frozen=True)
class StoredFile:
    """What is known of a file. ``created`` is in seconds since 1970, UTC."""

    id: str
    filename: str
    purpose: str
    size: int
    sha256: str
    created: float
    owner: str | None = None


class FileStore:
    """Files in a folder, named by their id, with their facts in the job store's database.

    A file is flushed and in its place before its row is written, and its row is gone before it is
    deleted: a row always has its file. What a crash leaves in between is swept later.
    """

    def __init__(self, engine: Engine, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._engine = engine
        self._writer = database.writing(engine)
        folder.mkdir(parents=True, exist_ok=True)

    def save(
        self,
        source: BinaryIO,
        filename: str,
        purpose: str,
        *,
        owner: str | None = None,
        check: Callable[[Path], None] | None = None,
    ) -> StoredFile:
        """Keep a copy. It is on the disk when this returns.

        ``check`` reads the copy and raises if it is not acceptable; then nothing of it remains.
        Raises :class:`FileTooLarge` above ``max_bytes``.
        """
        id_ = f"file-{uuid.uuid4().hex}"
        draft = self.folder / f".{id_}.tmp"
        try:
            size, digest = self._copy(source, draft)
            if check is not None:
                check(draft)
            sync(draft)
            draft.replace(self.folder / id_)
            sync(self.folder)
        finally:
            draft.unlink(missing_ok=True)
        stored = StoredFile(id_, filename, purpose, size, digest, time.time(), owner)
        with self._writer.begin() as connection:
            connection.execute(insert(files).values(**vars(stored)))
        return stored

    def get(self, file_id: str, owner: str | None = None) -> StoredFile:
        """One file's facts; :class:`UnknownFile` if there is none that the owner may see."""
        query = select(files).where(files.c.id == file_id, *owned(files.c.owner, owner))
        with self._engine.begin() as connection:
            row = connection.execute(query).first()
        if row is None:
            raise UnknownFile(f"there is no file {file_id[:100]!r}")
        return StoredFile(**row._mapping)

    def path(self, file: StoredFile) -> Path:
        """Where its bytes are."""
        return self.folder / file.id

    def find(
        self,
        *,
        owner: str | None = None,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 10_000,
        descending: bool = True,
    ) -> Page[StoredFile]:
        """By age, from behind the file ``after``."""
        query = select(files).where(*owned(files.c.owner, owner))
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        with self._engine.begin() as connection:
            if after is not None:
                query = query.where(behind(connection, files, after, owner, descending))
            columns = (files.c.created, files.c.id)
            query = query.order_by(*(c.desc() if descending else c.asc() for c in columns))
            return page(connection, query, limit, lambda row: StoredFile(**row._mapping))

    def delete(self, file_id: str, owner: str | None = None) -> None:
        """Forget a file; a reader that has it open reads on. :class:`UnknownFile` if absent."""
        this = select(files.c.id).where(files.c.id == file_id, *owned(files.c.owner, owner))
        with self._writer.begin() as connection:
            if connection.execute(delete(files).where(files.c.id.in_(this))).rowcount == 0:
                raise UnknownFile(f"there is no file {file_id[:100]!r}")
        (self.folder / file_id).unlink(missing_ok=True)

    def sweep(self) -> int:
        """Delete what crashes left behind a day ago or earlier; returns how many files."""
        old = time.time() - ABANDONED_SECONDS
        swept = 0
        for path in self.folder.iterdir():
            try:
                if path.stat().st_mtime > old or (path.name[0] != "." and self._knows(path.name)):
                    continue
                path.unlink()
                swept += 1
            except FileNotFoundError:
                continue  # another process sweeps too
        return swept

    def _knows(self, file_id: str) -> bool:
        with self._engine.begin() as connection:
            return (
                connection.execute(select(files.c.id).where(files.c.id == file_id)).first()
                is not None
            )

    def _copy(self, source: BinaryIO, target: Path) -> tuple[int, str]:
        digest, size = hashlib.sha256(), 0
        with target.open("xb") as file:
            while chunk := source.read(_CHUNK):
                size += len(chunk)
                if size > self.max_bytes:
                    raise FileTooLarge(
                        f"the file has more than {self.max_bytes} bytes, the most that this "
                        f"server keeps of one"
                    )
                digest.update(chunk)
                file.write(chunk)
        return size, digest.hexdigest()
