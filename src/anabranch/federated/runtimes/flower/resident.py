"""The process that stays on a node: model, data and personal state outlive Flower's messages.

Flower starts a process for each message. That one brings the letter here, over a socket that only
this user can open, and takes the answer back; see :mod:`anabranch.federated.runtimes.flower.apps`.

    python -m anabranch.federated.runtimes.flower.resident FILE

``FILE`` holds a :class:`Resident`. It does one letter at a time, and exits after ``keep_alive``
seconds without any.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from anabranch.errors import AnabranchError, ConfigurationError
from anabranch.federated.client import Client
from anabranch.federated.codecs import Codec
from anabranch.federated.errors import FederationError, PayloadError
from anabranch.federated.messages import Task
from anabranch.federated.node import Node
from anabranch.federated.runtimes.flower.letter import Letter
from anabranch.federated.runtimes.network.agreed import agree
from anabranch.files import write_json, write_text

logger = logging.getLogger(__name__)

START_S = 600.0
"""How long a resident may take to load model and data."""
STOP_S = 30.0
TRIES = 2
"""Residents that may die over one letter before it is given up."""


@dataclass(frozen=True)
class Place:
    """A site: who it is, and what it works with. ``examples`` is what it declares."""

    name: str
    client: Client
    data: Any = None
    model: Any = None
    examples: int = 0
    up: Codec | None = None
    down: Codec | None = None


@dataclass(frozen=True)
class Resident:
    """Which process a node wants: the one of a folder that makes this site with these settings.

    ``site`` is ``module:function``; the function is given the settings and returns a
    :class:`Place`.
    """

    folder: str
    site: str
    settings: Mapping[str, str | int | float | bool]
    keep_alive: float = 900.0

    def __post_init__(self) -> None:
        check_site(self.site)

    @property
    def key(self) -> str:
        """Of this and no other resident."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()

    @property
    def file(self) -> Path:
        """Where it is described."""
        return Path(self.folder) / "residents" / f"{self.key}.json"

    def ask(self, letter: bytes) -> bytes:
        """Its answer. Starts it if it is not there, and once more if it dies over the letter.

        A task that it had begun then goes on from what the site stored: it takes effect once.
        """
        for _ in range(TRIES):
            try:
                with closing(self._reach()) as line:
                    line.send_bytes(letter)
                    return line.recv_bytes()
            except (EOFError, OSError) as error:
                logger.warning("the resident of %s is gone: %r", self.folder, error)
        raise FederationError(
            f"the resident of {self.folder} died {TRIES} times over one message; it wrote: "
            f"{self._last_words()}"
        )

    def _reach(self) -> Connection:
        if (line := self._connect()) is not None:
            return line
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.with_suffix(".lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (line := self._connect()) is not None:
                return line  # another message was quicker
            write_json(self.file, asdict(self))
            with self.file.with_suffix(".log").open("ab") as log:
                paths = os.pathsep.join(str(Path(path).absolute()) for path in sys.path)
                process = subprocess.Popen(
                    [sys.executable, "-m", __name__, str(self.file)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "PYTHONPATH": paths},
                    start_new_session=True,  # it outlives the process of this message
                )
            write_text(self.file.with_suffix(".pid"), str(process.pid))
            until = time.monotonic() + START_S
            while time.monotonic() < until and process.poll() is None:
                if (line := self._connect()) is not None:
                    return line
                time.sleep(0.05)
        process.kill()
        raise FederationError(f"the site {self.site} cannot be made: {self._last_words()}")

    def _connect(self) -> Connection | None:
        line = socket.socket(socket.AF_UNIX)
        try:
            line.connect(str(_address(self.key)))
        except OSError:
            line.close()
            return None
        return Connection(line.detach())

    def _last_words(self) -> str:
        log = self.file.with_suffix(".log")
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        return lines[-1] if lines else "nothing"


def check_site(site: str) -> None:
    """Raise :class:`ConfigurationError` unless a site is named as it must be."""
    if not all(site.partition(":")):
        raise ConfigurationError(f"a site is module:function, not {site!r}")


def stop_residents(folder: Path) -> None:
    """End the residents of a node, also in the middle of a task.

    What a site stores is stored whole or not at all, and the task may be asked for again.
    """
    for file in sorted((folder / "residents").glob("*.json")):
        resident = Resident(**json.loads(file.read_text()))
        with contextlib.suppress(FileNotFoundError, psutil.NoSuchProcess):
            process = psutil.Process(int(file.with_suffix(".pid").read_text()))
            if str(file) in process.cmdline():  # the number may be another one's by now
                process.kill()
                process.wait(STOP_S)
        _address(resident.key).unlink(missing_ok=True)
        file.unlink()


def serve(resident: Resident) -> None:
    """The whole life of a resident."""
    address = _address(resident.key)
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        site = _Site(resident)
        # Whoever starts it holds a lock, so that nobody listens here any more.
        address.unlink(missing_ok=True)
        listener.bind(str(address))
        listener.listen()
        listener.settimeout(resident.keep_alive)
        try:
            while True:
                _answer_one(listener, site)
        except TimeoutError:
            logger.info("nothing came for %g s", resident.keep_alive)
        finally:
            address.unlink(missing_ok=True)


def _answer_one(listener: socket.socket, site: _Site) -> None:
    """Wait for a letter and answer it. Raises TimeoutError if none comes."""
    caller, _ = listener.accept()
    with closing(Connection(caller.detach())) as line:
        try:
            line.send_bytes(site.answer(Letter.from_bytes(line.recv_bytes())).to_bytes())
        except (EOFError, OSError, PayloadError) as error:
            # The answer to a task is stored; whoever asks again gets it.
            logger.warning("a caller went away: %r", error)


class _Site:
    """A place, and its side of the protocol in the newest run that asked."""

    def __init__(self, resident: Resident) -> None:
        module, _, function = resident.site.partition(":")
        self._place: Place = getattr(importlib.import_module(module), function)(resident.settings)
        self._folder = Path(resident.folder)
        self._run = ""
        self._node: Node | None = None

    def answer(self, letter: Letter) -> Letter:
        """What to send back; a problem if it cannot be done at all."""
        place = self._place
        if letter.kind == "who":
            return Letter("here", {"name": place.name, "examples": place.examples})
        try:
            return Letter("reply", body=self._work(letter))
        except (AnabranchError, KeyError) as error:
            logger.warning("a task", exc_info=True)
            return Letter("problem", {"reason": f"{type(error).__name__}: {error}"})

    def _work(self, letter: Letter) -> bytes:
        place, run = self._place, letter.facts["run"]
        if not isinstance(run, str) or not run.isalnum():
            raise ConfigurationError(f"a run is named by letters and digits, not {run!r}")
        if self._node is None or self._run != run:
            folder = self._folder / f"run-{run}"
            agreement = agree(letter.facts["agreement"], place.client, place.up, place.down, folder)
            self._node = Node(place.name, agreement, place.data, place.model)
            self._run = run
        return self._node.handle(Task.from_bytes(letter.body)).to_bytes()


def _address(key: str) -> Path:
    """Short, because names of sockets may have about a hundred characters; private to the user."""
    folder = Path(tempfile.gettempdir()) / f"anabranch-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.stat(follow_symlinks=False)
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigurationError(f"{folder} belongs to somebody else, or is open to others")
    return folder / f"{key}.sock"


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    serve(Resident(**json.loads(Path(sys.argv[1]).read_text())))
