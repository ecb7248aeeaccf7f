"""What is handed out as one file: a file as it is, or a folder as a ZIP archive."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from anabranch.errors import AnabranchError
from anabranch.files import replacing

_CHUNK = 1 << 20


class LeadsOutside(AnabranchError):
    """A folder has a link to something that is not in it: it is not handed out."""

    status = 409
    code = "leads_outside"


@dataclass(frozen=True)
class Download:
    """``size`` bytes with this SHA-256 (hexadecimal), to be kept as ``filename``.

    ``path`` is the file, or the folder that becomes an archive with one folder in it.
    """

    path: Path
    filename: str
    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path, name: str | None = None) -> Download:
        """Read all of it once, for its digest; ``name`` is another one than the path's.

        An archive of the same files always has the same bytes. Raises :class:`LeadsOutside`.
        """
        name = name or path.name
        digest, size = hashlib.sha256(), 0
        for chunk in _chunks(path, name):
            digest.update(chunk)
            size += len(chunk)
        filename = f"{name}.zip" if path.is_dir() else name
        return cls(path, filename, size, digest.hexdigest())

    def chunks(self) -> Iterator[bytes]:
        """The bytes, about a MiB at a time."""
        return _chunks(self.path, self.filename.removesuffix(".zip"))

    def save(self, folder: Path) -> Path:
        """Write it to a folder, whole or not at all; returns where.

        Raises :class:`AnabranchError` if the place is taken or the bytes changed meanwhile.
        """
        target = folder / self.filename
        if target.exists():
            raise AnabranchError(f"{target} exists; remove it, or choose another --output")
        digest = hashlib.sha256()
        with replacing(target) as draft:
            with draft.open("wb") as file:
                for chunk in self.chunks():
                    digest.update(chunk)
                    file.write(chunk)
            if digest.hexdigest() != self.sha256:
                raise AnabranchError(f"{self.path} changed while it was read; try again")
        return target


def _chunks(path: Path, name: str) -> Iterator[bytes]:
    if path.is_dir():
        yield from _archive(path, name)
        return
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _archive(folder: Path, name: str) -> Iterator[bytes]:
    """A ZIP archive without compression, which weights would not gain from."""
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for path in _files(folder):
            # The time of a new entry is 1980: the same files are the same bytes.
            entry = zipfile.ZipInfo(f"{name}/{path.relative_to(folder).as_posix()}")
            entry.external_attr = 0o644 << 16
            entry.file_size = path.stat().st_size  # large ones need another kind of header
            with path.open("rb") as source, archive.open(entry, "w") as target:
                while chunk := source.read(_CHUNK):
                    target.write(chunk)
                    yield sink.take()
        yield sink.take()
    yield sink.take()


def _files(folder: Path) -> list[Path]:
    root = folder.resolve()
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in found:
        if not path.resolve().is_relative_to(root):
            raise LeadsOutside(f"{path} is a link to what is not in {folder}; replace it by a copy")
    return found


class _Sink:
    """Takes what an archive is written to, as a file that cannot be wound back."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._pieces.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Nothing is open."""

    def take(self) -> bytes:
        """What was written since the last call."""
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)
