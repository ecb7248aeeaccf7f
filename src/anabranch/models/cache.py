"""The folder of models that Anabranch made or fetched, and the rules that keep it whole.

::

    <root>/models/<slug>/           a complete model; anabranch.json inside was written last
    <root>/models/.partial/<slug>   being written, or left behind by a process that was killed
    <root>/models/.locks/<slug>     lock file: shared while reading, exclusive while changing

A model is written below ``.partial``, flushed to disk and renamed into place, all under the
exclusive lock. So a folder that has its final name is complete, and a partial one whose lock can
be taken has no owner and may be deleted. Locks are ``flock``: they vanish with their process.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from anabranch.errors import ModelError
from anabranch.files import sync, sync_tree
from anabranch.models.card import ModelCard
from anabranch.models.progress import Progress, silent

RECORD = "anabranch.json"
_FORMAT = 1
_EDGE = 1 << 20


def root() -> Path:
    """``$ANABRANCH_CACHE``, else ``$XDG_CACHE_HOME/anabranch``, else ``~/.cache/anabranch``."""
    if own := os.environ.get("ANABRANCH_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").absolute() / "anabranch"


def slug(text: str) -> str:
    """A folder name for a model name: ``org/name`` becomes ``org--name``."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", text.replace("/", "--")).lstrip(".") or "model"


@dataclass(frozen=True)
class Stamp:
    """Identity of a source file. ``edges`` hashes its first and last MiB, ``sha256`` all of it."""

    path: str
    size: int
    mtime_ns: int
    edges: str
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """Read the whole file (about 1 GB a second)."""
        size, mtime_ns, edges = _look(path)
        return cls(str(path), size, mtime_ns, edges, file_sha256(path))

    def matches(self, path: Path) -> bool:
        """Whether the file still has the content that was stamped; usually without reading it."""
        if (self.size, self.mtime_ns, self.edges) == (look := _look(path)):
            return True
        # A reinstalled package has a new time and the same bytes: only the bytes decide.
        return look[0] == self.size and file_sha256(path) == self.sha256


@dataclass(frozen=True)
class Record:
    """What ``anabranch.json`` says. ``files`` are the sizes in bytes of the model's files."""

    kind: Literal["conversion", "download", "training"]
    card: ModelCard
    files: dict[str, int]
    source: Stamp | None = None


@dataclass(frozen=True)
class Entry:
    """One folder of the cache. It may not exist yet."""

    slug: str

    @property
    def path(self) -> Path:
        """Where the model is, or will be."""
        return root() / "models" / self.slug

    def record(self) -> Record | None:
        """The record, or None if the folder is missing or its record cannot be read."""
        try:
            return _record_from(json.loads((self.path / RECORD).read_text("utf-8")))
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def damage(self) -> str | None:
        """What is wrong with the files, with expected and actual bytes; None if nothing is."""
        record = self.record()
        if record is None:
            return f"{self.path / RECORD} is missing or unreadable"
        for name, expected in record.files.items():
            file = self.path / name
            actual = file.stat().st_size if file.is_file() else None
            if actual is None:
                return f"{file} is missing (expected {expected} bytes)"
            if actual != expected:
                return f"{file} has {actual} bytes, expected {expected}"
        return None

    @contextlib.contextmanager
    def reading(self) -> Iterator[Path]:
        """Hold the model in place while its files are opened."""
        with _locked(self.slug, fcntl.LOCK_SH, silent):
            yield self.path

    @contextlib.contextmanager
    def changing(self, progress: Progress = silent) -> Iterator[None]:
        """Be the only process that changes this entry; waits for another one to finish."""
        with _locked(self.slug, fcntl.LOCK_EX, progress):
            yield

    @contextlib.contextmanager
    def filling(self) -> Iterator[Path]:
        """An empty folder to write the new model into; published when the block succeeds.

        The caller holds :meth:`changing` and calls :func:`write_record` last. If the block raises,
        nothing of it remains and an existing model stays as it was.
        """
        partial = _hidden("partial") / self.slug
        try:
            _sweep(self.slug)
            partial.mkdir(parents=True)
            try:
                yield partial
                sync_tree(partial)
                _publish(partial, self.path)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        except OSError as error:
            raise ModelError(
                f"cannot write a model below the cache folder {root()}: {error}; free some space, "
                f"or set ANABRANCH_CACHE to a folder that can be written"
            ) from error

    def delete(self) -> int:
        """Remove the folder; returns the bytes freed."""
        with self.changing():
            size = sum(f.lstat().st_size for f in self.path.rglob("*") if not f.is_dir())
            doomed = _hidden("partial") / self.slug
            _sweep(self.slug)
            doomed.parent.mkdir(parents=True, exist_ok=True)
            # Renamed first: a kill half-way leaves a partial folder, never half a model.
            self.path.rename(doomed)
            shutil.rmtree(doomed)
        return size


def entries() -> list[Entry]:
    """All models in the cache, damaged ones included, by slug."""
    folder = root() / "models"
    if not folder.is_dir():
        return []
    found = (f for f in folder.iterdir() if f.is_dir() and not f.is_symlink())
    return [Entry(f.name) for f in sorted(found) if not f.name.startswith(".")]


def named(name: str) -> list[Entry]:
    """The entries whose slug or card has this name."""
    found = []
    for entry in entries():
        record = entry.record()
        if name == entry.slug or (record is not None and name == record.card.name):
            found.append(entry)
    return found


def write_record(folder: Path, record: Record) -> None:
    """Describe the files of ``folder`` in its ``anabranch.json``; the last file to be written."""
    files = {str(f.relative_to(folder)): f.stat().st_size for f in folder.rglob("*") if f.is_file()}
    document = {"format": _FORMAT, **asdict(replace(record, files=files))}
    (folder / RECORD).write_text(json.dumps(document, indent=2) + "\n", "utf-8")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sweep() -> None:
    """Delete what killed processes left behind; what a living one writes is not touched."""
    partial = _hidden("partial")
    for folder in sorted(partial.iterdir()) if partial.is_dir() else []:
        with contextlib.suppress(OSError, ModelError), _locked(folder.name, fcntl.LOCK_EX, None):
            _sweep(folder.name)


def _record_from(document: Any) -> Record:
    if document.pop("format") != _FORMAT:
        raise ValueError("written by another version")
    source = document.pop("source")
    card = ModelCard(**document.pop("card"))
    return Record(card=card, source=Stamp(**source) if source else None, **document)


def _look(path: Path) -> tuple[int, int, str]:
    status = path.stat()
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(_EDGE))
        file.seek(max(0, status.st_size - _EDGE))
        digest.update(file.read(_EDGE))
    return status.st_size, status.st_mtime_ns, digest.hexdigest()


def _hidden(name: str) -> Path:
    return root() / "models" / f".{name}"


@contextlib.contextmanager
def _locked(slug: str, mode: int, progress: Progress | None) -> Iterator[None]:
    """Hold the slug's lock. ``progress`` None: do not wait, raise BlockingIOError instead."""
    file = _open_lock(slug, required=mode == fcntl.LOCK_EX)
    try:
        if file is not None:
            _wait_for(file, mode, slug, progress)
        yield
    finally:
        if file is not None:
            os.close(file)


def _open_lock(slug: str, required: bool) -> int | None:
    path = _hidden("locks") / slug
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if not required:
            return None  # a cache that nobody here can write needs no lock to be read
        raise ModelError(
            f"cannot write to the cache folder {root()}: {error}; "
            f"set ANABRANCH_CACHE to a folder that can be written"
        ) from error


def _wait_for(file: int, mode: int, slug: str, progress: Progress | None) -> None:
    try:
        fcntl.flock(file, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        if progress is None:
            raise
        progress(f"waiting for another process that prepares {slug}", None)
        fcntl.flock(file, mode)


def _sweep(slug: str) -> None:
    leftover = _hidden("partial") / slug
    if leftover.exists():
        shutil.rmtree(leftover)


def _publish(partial: Path, final: Path) -> None:
    if final.exists():
        # Readers hold the shared lock, so nobody sees the moment in between.
        outdated = partial / ".outdated"
        final.rename(outdated)
        shutil.rmtree(outdated)
    partial.rename(final)
    sync(final.parent)
