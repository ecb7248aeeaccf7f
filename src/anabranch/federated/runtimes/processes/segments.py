"""Shared memory that never outlives its owner for long.

An owner has a folder of its own in ``/dev/shm``; a segment is a file there, which other processes
map or read by its key. Python's ``SharedMemory`` is not used: its tracker would unlink what another
process still needs, and a killed owner would leave its segments for ever.

The owner holds a lock in its folder for as long as it lives. Whoever makes a folder first removes
those whose lock nobody holds: their owners were killed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
import shutil
import tempfile
from pathlib import Path

from anabranch.errors import ConfigurationError
from anabranch.federated.errors import StoreFull

PREFIX = "anabranch-shm-"
VARIABLE = "ANABRANCH_SHARED_MEMORY"
"""Names a folder, best in memory: containers have a small ``/dev/shm`` unless told otherwise."""
KEY_BYTES = 16
_LOCK = "lock"


def shared_memory() -> Path:
    """Where segments live: :data:`VARIABLE`, else ``/dev/shm``, else where temporary
    files do."""
    if chosen := os.environ.get(VARIABLE):
        if not Path(chosen).is_dir():
            raise ConfigurationError(f"{VARIABLE} is {chosen}, where there is no folder")
        return Path(chosen)
    there = Path("/dev/shm")
    return there if there.is_dir() else Path(tempfile.gettempdir())


def new_key() -> str:
    """A key that nobody has."""
    return secrets.token_hex(KEY_BYTES)


def sweep() -> list[Path]:
    """Remove the folders of dead owners; says which."""
    removed = []
    for folder in shared_memory().glob(f"{PREFIX}*"):
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            lock = None  # killed between making the folder and locking it
        except OSError:
            continue  # another user's
        try:
            if lock is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
        except BlockingIOError:
            pass
        finally:
            if lock is not None:
                os.close(lock)
    return removed


class Segments:
    """A folder of segments. :meth:`owned` makes one; other processes open it by its path.

    A segment is written once, then read by anyone who has its key. Nobody counts readers: whoever
    knows that the last one is done calls :meth:`remove`. A reader that has it mapped keeps its
    memory, as with any file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: int | None = None

    @classmethod
    def owned(cls) -> Segments:
        """A new folder of this process, after those of dead ones were removed."""
        sweep()
        while True:
            made = cls(Path(tempfile.mkdtemp(prefix=PREFIX, dir=shared_memory())))
            with contextlib.suppress(FileNotFoundError):  # swept before it was locked: once more
                path = made.folder / _LOCK
                lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
                fcntl.flock(lock, fcntl.LOCK_EX)
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_ino == os.fstat(lock).st_ino:
                        made._lock = lock
                        return made
                os.close(lock)

    def part(self, name: str) -> Segments:
        """A folder within, made if need be: what one process writes, to be removed with it."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return Segments(folder)

    def put(self, data: bytes | memoryview) -> str:
        """Write a segment; returns its key. :class:`StoreFull` if there is no memory for it."""
        key = new_key()
        try:
            write_all(self.path(key), data)
        except BaseException:
            self.remove(key)
            raise
        return key

    def read(self, key: str) -> bytes:
        """A copy of a segment."""
        return self.path(key).read_bytes()

    def view(self, key: str) -> memoryview:
        """A segment as it lies in memory, to read; mapped for as long as somebody looks at it."""
        with self.path(key).open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return memoryview(b"")
            return memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))

    def size(self, key: str) -> int:
        """Bytes of a segment."""
        return self.path(key).stat().st_size

    def remove(self, key: str) -> None:
        """Give its memory back as soon as nobody has it mapped."""
        self.path(key).unlink(missing_ok=True)

    def path(self, key: str) -> Path:
        """The file of a key."""
        return self.folder / key

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def write_all(path: Path, data: bytes | memoryview) -> None:
    """Write a file of shared memory; :class:`StoreFull` if there is no memory for it.

    One that has as many bytes already keeps its pages, so that none has to be found and zeroed.
    Written, not mapped: new pages are not zeroed before they are filled, and memory that is not
    there is an error instead of a SIGBUS.
    """
    view, written = memoryview(data).cast("B"), 0
    try:
        with path.open("r+b" if path.exists() else "wb", buffering=0) as file:
            while written < len(view):
                written += file.write(view[written:]) or 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise _full(len(view)) from error


def _full(size: int) -> StoreFull:
    left = shutil.disk_usage(shared_memory()).free
    return StoreFull(
        f"{shared_memory()} has {left:,} bytes left, and {size:,} are needed; make it larger, "
        f"name another folder in {VARIABLE}, or let fewer workers run at once"
    )
