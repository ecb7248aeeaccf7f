"""A site in a process of its own: joins once, then works for the coordinator until the run is over.

Its folder holds ``site.json`` (the key, readable by its owner only), ``state/`` (personal state and
last replies, see :mod:`anabranch.federated.node`) and ``lock``. Killed at any time and started
again with the same folder it goes on as if nothing had happened.
"""

from __future__ import annotations

import fcntl
import json
import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from anabranch.federated.client import Client
from anabranch.federated.codecs import Codec
from anabranch.federated.errors import StoreError
from anabranch.federated.messages import Reply, Task
from anabranch.federated.node import Node
from anabranch.federated.runtimes.network.agreed import agree
from anabranch.federated.runtimes.network.certificate import write_private
from anabranch.federated.runtimes.network.errors import InvitationError, Refused
from anabranch.federated.runtimes.network.invitation import Invitation
from anabranch.federated.runtimes.network.link import Link, Over
from anabranch.federated.runtimes.network.roster import require_name

logger = logging.getLogger(__name__)

BEATS = 4
"""Signs of life in the time after which a silent site has left."""

Watch = Callable[[Task, Reply | None], None]
"""Called before each task, and with its reply after it was handed in."""


@dataclass(frozen=True)
class Membership:
    """How a site is known to a coordinator: what ``site.json`` holds."""

    address: str
    fingerprint: str
    run: str
    name: str
    key: str
    joined: bool = False

    @classmethod
    def load(cls, folder: Path) -> Membership | None:
        """The membership stored in a folder."""
        path = folder / "site.json"
        try:
            return cls(**json.loads(path.read_text())) if path.exists() else None
        except (OSError, ValueError, TypeError) as error:
            raise StoreError(
                f"{path} cannot be read: {error}; join again with a new invitation in a new folder"
            ) from None

    def save(self, folder: Path) -> None:
        """Store it."""
        folder.mkdir(parents=True, exist_ok=True)
        write_private(folder / "site.json", json.dumps(asdict(self)).encode())

    def link(self, **options: Any) -> Link:
        """A connection under the site's key. ``options`` are those of :class:`Link`."""
        return Link(self.address, self.fingerprint, self.key, **options)


def join(
    invitation: Invitation, folder: Path, name: str, examples: int, **options: Any
) -> Membership:
    """Become a member, or find that one is already. ``examples`` cannot be changed afterwards.

    The key is chosen here and stored before it is sent, so that an answer that gets lost costs
    nothing: asking again with the same key is answered alike.
    """
    require_name(name)
    member = Membership.load(folder)
    if member is None:
        key = secrets.token_urlsafe(32)
        member = Membership(invitation.address, invitation.fingerprint, invitation.run, name, key)
        member.save(folder)
    elif member.run != invitation.run:
        raise InvitationError(
            f"{folder} belongs to {member.name} of another federation; choose another folder"
        )
    if member.joined:
        return member
    link = Link(invitation.address, invitation.fingerprint, invitation.secret, **options)
    try:
        name = link.join(name, member.key, examples)
    finally:
        link.close()
    member = replace(member, name=name, joined=True)
    member.save(folder)
    return member


def work(
    member: Membership,
    folder: Path,
    client: Client,
    data: Any,
    model: Any = None,
    *,
    up: Codec | None = None,
    down: Codec | None = None,
    watch: Watch = lambda task, reply: None,
    **options: Any,
) -> str:
    """Do what the coordinator asks for until the run is over; returns why it is.

    ``options`` are those of :class:`Link`. Errors of the method's own code become replies that say
    so. Raises :class:`NotAllowed` when the site is revoked.
    """
    link = member.link(**options)
    with _locked(folder):
        try:
            values = link.agreement()
            node = Node(member.name, agree(values, client, up, down, folder / "state"), data, model)
            with _heard(link, values["absent_after"] / BEATS):
                while True:
                    task = link.next_task()
                    watch(task, None)
                    reply = node.handle(task)
                    _hand_in(link, reply)
                    watch(task, reply)
        except Over as over:
            return str(over)
        finally:
            link.close()


def _hand_in(link: Link, reply: Reply) -> None:
    try:
        link.send(reply)
    except Refused as error:
        logger.warning("the reply to task %d was refused: %s", reply.task, error)
        if error.status == 413:  # it would be asked for for ever
            failed = Reply(reply.task, reply.client, reply.kind, reply.version, error=str(error))
            link.send(failed)


@contextmanager
def _heard(link: Link, pause: float) -> Iterator[None]:
    """Signs of life meanwhile, however long a task takes."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(pause):
            try:
                link.alive()
            except Exception as error:
                # The work itself goes on; whoever hands in its result learns what is the matter.
                logger.debug("no sign of life: %s", error)

    thread = threading.Thread(target=beat, name="anabranch-alive", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StoreError(f"{folder} is in use by another process") from None
        yield
