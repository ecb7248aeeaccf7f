"""Flower on this machine: a SuperLink and SuperNodes that hear each other on loopback only.

Connections are under TLS and SuperNodes prove who they are by keys, both made here; ``insecure``
leaves that out. For deployments of your own machines see Flower's documentation: the apps are the
same ones.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from anabranch.errors import ConfigurationError
from anabranch.federated.errors import FederationError
from anabranch.federated.runtimes.flower.resident import stop_residents
from anabranch.federated.runtimes.network.certificate import write_private
from anabranch.files import write_json, write_text

HOST = "127.0.0.1"
START_S = 60.0
"""How long a SuperLink may take until it listens."""
STOP_S = 10.0
DAYS = 3650
LOOK_S = 2.0
"""How often Flower is asked how a run is."""

Settings = Mapping[str, str | int | float | bool]


class Deployment:
    """A SuperLink, and a SuperNode for each of ``nodes``, which are their settings.

    ``folder`` gets certificates, keys, logs and a folder for each node. What an earlier deployment
    in it left running, because its process was killed, is ended first.

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

    def __enter__(self) -> Deployment:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._end_leftovers()
        try:
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

    def wait(self, run: int) -> None:
        """Until a run is over. Raises :class:`FederationError` if it did not end well."""
        while not (status := self.status(run)).startswith("finished"):
            for process in self.processes:
                self._check(process)
            time.sleep(LOOK_S)
        if status != "finished:completed":
            raise FederationError(f"Flower's run is {status}: {self._last_words(run)}")

    def close(self) -> None:
        """End everything that was started, the nodes' residents too."""
        for process in reversed(self.processes):
            _end(process.pid)
        for process in self.processes:
            process.wait()
        self.processes.clear()
        for node in self.nodes:
            stop_residents(Path(str(node["folder"])))
        (self.folder / "processes.json").unlink(missing_ok=True)

    def _start_all(self) -> None:
        port = _free_port()
        address = f"{HOST}:{port}"
        connection = {"address": address, **({"insecure": True} if self.insecure else {})}
        serving, joining = ["--insecure"], ["--insecure"]
        if not self.insecure:
            certificate, key = self.folder / "certificate.pem", self.folder / "key.pem"
            if not certificate.exists():
                _make_certificate(certificate, key)
            files = ["--ssl-certfile", certificate, "--ssl-keyfile", key]
            serving = [*map(str, files), "--ssl-ca-certfile", str(certificate)]
            serving += ["--enable-supernode-auth"]
            joining = ["--root-certificates", str(certificate)]
            connection["root-certificates"] = str(certificate)
        write_text(
            self.folder / "home" / "config.toml",
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\n{_toml(connection, chr(10))}\n',
        )
        self._start(
            "superlink",
            ["superlink", "--host", HOST, "--port", str(port), *serving]
            + ["--disable-runtime-dependency-installation"],
        )
        self._wait_for(port)
        for index, settings in enumerate(self.nodes):
            own = Path(str(settings["folder"]))
            proof: list[str] = []
            if not self.insecure:
                if not (own / "node.pem").exists():
                    _make_key(own)
                self._flwr("supernode", "register", str(own / "node.pub"), "here")
                proof = ["--auth-supernode-private-key", str(own / "node.pem")]
            self._start(
                f"node-{index}",
                ["supernode", "--superlink", address, *joining, *proof, "--host", HOST]
                + ["--port", str(_free_port()), "--node-config", _toml(settings)],
            )

    def _start(self, name: str, command: Sequence[str]) -> None:
        program = Path(sys.executable).with_name(f"flower-{command[0]}")
        path = self._log(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as log:
            process = subprocess.Popen(
                [str(program), *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment(),
                start_new_session=True,
            )
        self.processes.append(process)
        write_json(
            self.folder / "processes.json",
            [[p.pid, psutil.Process(p.pid).create_time()] for p in self.processes if _runs(p)],
        )

    def _end_leftovers(self) -> None:
        path = self.folder / "processes.json"
        if not path.exists():
            return
        for pid, created in json.loads(path.read_text()):
            # A number may belong to another process by now, which began at another time.
            if psutil.pid_exists(pid) and psutil.Process(pid).create_time() == created:
                _end(pid)
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


def _end(pid: int) -> None:
    """End a process and those that it started: by a word, then by force."""
    try:
        top = psutil.Process(pid)
        family = [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        _tell(process, signal.SIGTERM)
    _, left = psutil.wait_procs(family, timeout=STOP_S)
    for process in left:
        _tell(process, signal.SIGKILL)


def _tell(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        pass


def _make_certificate(certificate: Path, key: Path) -> None:
    """Of an authority that vouches for itself, on this machine's own addresses."""
    made = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "anabranch flower")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address(HOST))]
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(made.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(made, hashes.SHA256())
    )
    write_private(key, _pem(made))
    write_private(certificate, signed.public_bytes(serialization.Encoding.PEM))


def _make_key(folder: Path) -> None:
    """A SuperNode's key, on a curve that Flower takes."""
    folder.mkdir(parents=True, exist_ok=True)
    made = ec.generate_private_key(ec.SECP384R1())
    public = made.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    (folder / "node.pub").write_bytes(public)
    write_private(folder / "node.pem", _pem(made, serialization.PrivateFormat.OpenSSH))


def _pem(
    key: ec.EllipticCurvePrivateKey,
    form: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8,
) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        form,
        serialization.NoEncryption(),
    )
