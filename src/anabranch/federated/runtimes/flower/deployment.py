"""Flower on this machine: a SuperLink and SuperNodes that hear each other on loopback only.

Connections are under TLS and SuperNodes prove who they are by keys, both made here; ``insecure``
leaves that out. For deployments of your own machines see Flower's documentation: the apps are the
same ones.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from anabranch.errors import ConfigurationError
from anabranch.federated.errors import FederationError
from anabranch.federated.runtimes.flower.keys import make_certificate, make_key
from anabranch.federated.runtimes.flower.resident import stop_residents
from anabranch.federated.runtimes.flower.warden import Warden, end, end_all
from anabranch.files import write_json, write_text

HOST = "127.0.0.1"
START_S = 60.0
"""How long a SuperLink may take until it listens."""
LOOK_S = 5.0
"""How often Flower is asked how a run is."""

Settings = Mapping[str, str | int | float | bool]


class Deployment:
    """A SuperLink, and a SuperNode for each of ``nodes``, which are their settings.

    ``folder`` gets certificates, keys, logs and a folder for each node. If this process is killed,
    a :class:`Warden` ends what was started here. If that was killed, too, the next deployment in
    the folder does it first.

    Example::

        with Deployment(folder, [{"index": 0}, {"index": 1}]) as flower:
            flower.wait(flower.run(app, {"rounds": 2}))
    """

    def __init__(self, folder: Path, nodes: Sequence[Settings], insecure: bool = False) -> None:
        if not nodes:
            raise ConfigurationError("a deployment needs a node")
        self.folder = folder.absolute()
        self.nodes = [
            {"folder": str(self.folder / f"node-{index}"), **settings}
            for index, settings in enumerate(nodes)
        ]
        self.insecure = insecure
        self.processes: list[subprocess.Popen[bytes]] = []
        self._warden: Warden | None = None

    def __enter__(self) -> Deployment:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._end_leftovers()
        try:
            self._warden = Warden([Path(str(node["folder"])) for node in self.nodes])
            self._start_all()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def run(self, app: Path, settings: Settings | None = None) -> int:
        """Submit the Flower App in a folder; returns the number of the run."""
        chosen = ["--run-config", _toml(settings)] if settings else []
        return int(self._flwr("run", str(app), "here", *chosen)["run-id"])

    def status(self, run: int) -> str:
        """Flower's word for how a run is, as in ``finished:completed``."""
        answer = self._flwr("list", "here", "--run-id", str(run))
        return str(answer["runs"][0]["status"])

    def wait(self, run: int, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Until a run is over; every now and then call ``meanwhile``.

        Raises :class:`FederationError` if it did not end well.
        """
        while not (status := self.status(run)).startswith("finished"):
            meanwhile()
            for process in self.processes:
                self._check(process)
            time.sleep(LOOK_S)
        if status != "finished:completed":
            raise FederationError(f"Flower's run is {status}: {self._last_words(run)}")

    def close(self) -> None:
        """End everything that was started, the nodes' residents too."""
        for process in reversed(self.processes):
            end(process.pid)
        for process in self.processes:
            process.wait()
        self.processes.clear()
        for node in self.nodes:
            stop_residents(Path(str(node["folder"])))
        (self.folder / "processes.json").unlink(missing_ok=True)
        if self._warden is not None:
            self._warden.close()
            self._warden = None

    def _start_all(self) -> None:
        port = _free_port()
        address = f"{HOST}:{port}"
        connection: dict[str, Any] = {"address": address, "insecure": True}
        serving, joining = ["--insecure"], ["--insecure"]
        if not self.insecure:
            certificate, key = self.folder / "certificate.pem", self.folder / "key.pem"
            if not certificate.exists():
                make_certificate(certificate, key, HOST)
            connection = {"address": address, "root-certificates": str(certificate)}
            serving = ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]
            serving += ["--ssl-ca-certfile", str(certificate), "--enable-supernode-auth"]
            joining = ["--root-certificates", str(certificate)]
        here = _toml(connection, between="\n")
        write_text(
            self.folder / "home" / "config.toml",
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\n{here}\n',
        )
        serving += ["--host", HOST, "--port", str(port)]
        # Otherwise each run would ask the internet for the app's dependencies.
        serving += ["--disable-runtime-dependency-installation"]
        self._start("superlink", "superlink", *serving)
        self._wait_for(port)
        for index, settings in enumerate(self.nodes):
            proof = [] if self.insecure else self._prove(Path(str(settings["folder"])))
            own = ["--host", HOST, "--port", str(_free_port()), "--node-config", _toml(settings)]
            self._start(
                f"node-{index}", "supernode", "--superlink", address, *joining, *proof, *own
            )

    def _prove(self, node: Path) -> list[str]:
        """Make a node known to the SuperLink by its key, and say how it proves that it has it."""
        if not (node / "node.pem").exists():
            make_key(node)
        self._flwr("supernode", "register", str(node / "node.pub"), "here")
        return ["--auth-supernode-private-key", str(node / "node.pem")]

    def _start(self, name: str, program: str, *options: str) -> None:
        path = self._log(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as log:
            process = subprocess.Popen(
                [str(Path(sys.executable).with_name(f"flower-{program}")), *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment(),
                start_new_session=True,
            )
        self.processes.append(process)
        assert self._warden is not None
        self._warden.watch(process.pid, psutil.Process(process.pid).create_time())
        write_json(
            self.folder / "processes.json",
            [[p.pid, psutil.Process(p.pid).create_time()] for p in self.processes if _runs(p)],
        )

    def _end_leftovers(self) -> None:
        for node in self.nodes:
            stop_residents(Path(str(node["folder"])))
        path = self.folder / "processes.json"
        if not path.exists():
            return
        end_all(json.loads(path.read_text()))
        path.unlink()

    def _wait_for(self, port: int) -> None:
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            self._check(self.processes[0])
            try:
                socket.create_connection((HOST, port), timeout=1.0).close()
            except OSError:
                time.sleep(0.1)
            else:
                return
        raise FederationError(f"the SuperLink does not listen; see {self._log('superlink')}")

    def _check(self, process: subprocess.Popen[bytes]) -> None:
        if not _runs(process):
            name = Path(str(process.args[0])).name  # type: ignore[index]
            raise FederationError(
                f"{name} ended with {process.returncode}; see {self._log('superlink').parent}"
            )

    def _last_words(self, run: int) -> str:
        """The end of what the run's ServerApp printed; all of it is kept."""
        said = self._call("log", str(run), "here", "--show").stdout.strip()
        path = self._log(f"run-{run}")
        write_text(path, said + "\n")
        return f"{said.splitlines()[-1] if said else 'it printed nothing'}; see {path}"

    def _call(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Flower's own program."""
        return subprocess.run(
            [str(Path(sys.executable).with_name("flwr")), *command],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    def _flwr(self, *command: str) -> Any:
        """What a command of it says, as JSON."""
        done = self._call(*command, "--format", "json")
        start = done.stdout.find("{")
        answer = json.loads(done.stdout[start:]) if start >= 0 else {}
        if done.returncode or not answer.get("success"):
            said = answer.get("error-message") or done.stderr or done.stdout
            raise FederationError(f"flwr {' '.join(command[:2])}: {said.strip()}")
        return answer

    def _log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def _environment(self) -> dict[str, str]:
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        paths = os.pathsep.join(str(Path(path).absolute()) for path in sys.path)
        # Flower finds the programs that it starts by itself on the path.
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        own = {"FLWR_HOME": str(self.folder / "home"), "PYTHONPATH": paths, "PATH": programs}
        return {**os.environ, **quiet, **own}


def _toml(settings: Mapping[str, Any] | None, between: str = " ") -> str:
    # Strings, numbers and truth values are written alike in JSON and TOML.
    return between.join(f"{name}={json.dumps(value)}" for name, value in (settings or {}).items())


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


def _runs(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is None
