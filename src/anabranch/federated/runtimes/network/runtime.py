"""The runtime whose clients are elsewhere and come over HTTPS."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import uvicorn

from anabranch.api.server import bind
from anabranch.errors import ConfigurationError
from anabranch.federated.errors import NotEnoughClients
from anabranch.federated.messages import Task
from anabranch.federated.node import Agreement
from anabranch.federated.runtimes.network import agreed
from anabranch.federated.runtimes.network.app import Office, create_app
from anabranch.federated.runtimes.network.certificate import ensure_certificate
from anabranch.federated.runtimes.network.desk import Desk
from anabranch.federated.runtimes.network.errors import InvitationError
from anabranch.federated.runtimes.network.invitation import Invitation
from anabranch.federated.runtimes.network.roster import Roster
from anabranch.federated.runtimes.wall_clock import WallClock

LOOK_S = 0.25
"""How often it is asked who came and went."""
LONGEST_POLL_S = 20.0
EVERYWHERE = ("0.0.0.0", "::", "")
GOODBYE_S = 20.0
"""How long sites may take to hear that the run is over."""


class Network(WallClock):
    """Sites open HTTPS connections to this process, ask for tasks and hand in replies.

    ``folder`` keeps who may take part (:class:`Roster`) and the certificate, for coming back under
    the same address. The run begins when ``clients`` sites are there, which ``waiting(names)`` is
    told about meanwhile; after ``join_timeout`` seconds (None: never) it gives up. A site of which
    nothing was heard for ``absent_after`` seconds has left; it may come back.

    ``address`` is what invitations say, by default ``host:port``; give it where ``host`` is
    ``0.0.0.0``. ``insecure`` serves without TLS. ``plan`` is shown to whoever is invited. Larger
    replies than ``max_bytes`` are refused.

    Example::

        network = Network(folder / "network", "0.0.0.0", 8443, clients=2, address="fl.example.org")
        print(network.invite(), network.invite())
        Federation(server, client, Sync(10), network, store=folder / "run").run()
    """

    def __init__(
        self,
        folder: str | Path,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        clients: int = 1,
        address: str | None = None,
        insecure: bool = False,
        plan: Mapping[str, Any] | None = None,
        absent_after: float = 60.0,
        join_timeout: float | None = None,
        max_bytes: int = 1 << 30,
        waiting: Callable[[list[str]], None] = lambda names: None,
    ) -> None:
        if clients < 1 or not absent_after > 0:
            raise ConfigurationError("a federation needs a client, and absent_after above 0")
        if address is None and host in EVERYWHERE:
            raise ConfigurationError(
                f"{host} is every address of this machine and none that sites can connect to; say "
                f"which one they can: --address HOST"
            )
        self.folder = Path(folder)
        self.roster = Roster(self.folder)
        self.desk = Desk(absent_after)
        self._host, self._port, self._public = host, port, address
        self._insecure = insecure
        self._clients = clients
        self._join_timeout = join_timeout
        self._tell_waiting = waiting
        self._office = Office(
            self.roster,
            self.desk,
            plan or {},
            self.report,
            max_bytes,
            min(LONGEST_POLL_S, absent_after / 3),
        )
        self._server: _Server | None = None
        self._counted = self._resumed = False
        self._closing = threading.Event()
        self.address = ""
        """Where sites come to, once it listens."""
        self._fingerprint = ""

    # For whoever runs it

    def listen(self) -> str:
        """Begin to answer, and give the address. Done by the run itself at the latest."""
        if self._server is None:
            tls = None if self._insecure else ensure_certificate(self.folder)
            listener = bind(self._host, self._port)
            where = _reached_at(self._public or self._host, listener.getsockname()[1])
            self.address = f"http{'s' if tls else ''}://{where}"
            self._fingerprint = tls.fingerprint if tls else ""
            self.roster.remember("address", self.address, replace=True)
            self.roster.remember("fingerprint", self._fingerprint, replace=True)
            files = (tls.certificate, tls.key) if tls else None
            self._server = _Server(self._office, listener, files)
            threading.Thread(target=self._watch, name="anabranch-desk", daemon=True).start()
        return self.address

    def invite(self, name: str | None = None) -> Invitation:
        """Admit one more site, once; only under this name, if one is given."""
        self.listen()
        return invitation(self.roster, name)

    # What the federation asks for

    def clients(self) -> Mapping[str, int]:
        """Waits until enough sites are there; in a resumed run, for those that were."""
        self.listen()
        if self._resumed:
            self._wait(lambda there, members: len(there) == len(members), self.desk.absent_after)
        elif not self._wait(lambda there, _: len(there) >= self._clients, self._join_timeout):
            names = ", ".join(self.desk.count(self.roster.examples())) or "none"
            raise NotEnoughClients(
                f"the run waits for {self._clients} sites; after {self._join_timeout:g} s there "
                f"are: {names}"
            )
        there = self.desk.count(self.roster.examples())
        self._counted = True
        return there

    def open(self, agreement: Agreement, resumed: float | None = None) -> None:
        """From now on sites are told what to do."""
        super().open(agreement, resumed)
        self._resumed = resumed is not None
        self.listen()
        self._office.agreement = agreed.to_json(agreement, self.desk.absent_after)

    def submit(self, task: Task) -> None:
        """The site will fetch it."""
        self.desk.give(task)
        self._ring(task.client)

    def recall(self, task: Task) -> None:
        """A site that works on it finds it again."""
        self.submit(task)

    def alive(self) -> bool:
        """Sites may always come."""
        return self._server is not None and self._server.thread.is_alive()

    def finish(self, reason: str) -> None:
        """Tell the sites that are there that the run is over."""
        self.desk.finish(reason)
        self._ring()
        until = time.monotonic() + GOODBYE_S
        while self.desk.unaware() and time.monotonic() < until and self.alive():
            time.sleep(0.02)

    def close(self) -> None:
        """Stop answering. Sites keep asking for a while: the same run may go on soon."""
        self._closing.set()
        self._office.closing = True
        self._ring()
        if self._server is not None:
            self._server.stop()

    def _ring(self, site: str | None = None) -> None:
        if self._server is not None:
            self._server.call(self._office.ring, site)

    def _wait(
        self, enough: Callable[[list[str], Mapping[str, int]], bool], seconds: float | None
    ) -> bool:
        """Whether enough sites came in time."""
        until = None if seconds is None else time.monotonic() + seconds
        while True:
            members = self.roster.examples()
            there = list(self.desk.count(members))
            self._tell_waiting(there)
            if enough(there, members):
                return True
            if until is not None and time.monotonic() >= until:
                return False
            time.sleep(min(LOOK_S, self.desk.absent_after / 4))

    def _watch(self) -> None:
        """Who came and went, from when both the coordinator and the desk can tell."""
        pause = min(LOOK_S, self.desk.absent_after / 4)
        while not self._closing.wait(pause):
            if self._counted and self._office.agreement is not None:
                for change in self.desk.changes(self.roster.examples()):
                    self.report(change)


def invitation(roster: Roster, name: str | None = None) -> Invitation:
    """A new invitation to the federation of a roster, which must have been served once."""
    address = roster.fact("address")
    if address is None:
        raise InvitationError(
            f"{roster.path.parent} was never served, so that no address is known; first: "
            f"anabranch federation serve JOB"
        )
    secret = roster.invite(name)
    return Invitation(address, roster.run, secret, roster.fact("fingerprint") or "")


def _reached_at(host: str, port: int) -> str:
    """``host:port``; a host that says its port already keeps it."""
    if re.search(r"^[^:]+:\d+$|\]:\d+$", host):
        return host
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


class _Server:
    """uvicorn in a thread of its own."""

    def __init__(
        self, office: Office, listener: socket.socket, tls: tuple[Path, Path] | None
    ) -> None:
        config = uvicorn.Config(
            create_app(office),
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=2,
            ssl_certfile=None if tls is None else str(tls[0]),
            ssl_keyfile=None if tls is None else str(tls[1]),
        )
        self._server = uvicorn.Server(config)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listener = listener
        self.thread = threading.Thread(target=self._serve, name="anabranch-network", daemon=True)
        self.thread.start()
        while not self._server.started:
            if not self.thread.is_alive():
                raise ConfigurationError("the coordinator cannot serve; its log says why")
            time.sleep(0.005)

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """In the server's thread, soon."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def stop(self) -> None:
        """Answer what is asked now, then no more."""
        self._server.should_exit = True
        self.thread.join(timeout=10.0)
        self._listener.close()

    def _serve(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._server.serve(sockets=[self._listener])
