"""A coordinator and three sites as processes over TLS, killed with SIGKILL again and again.

    python -m tests.federated.network.crashing FOLDER KILLS

Everything is imported once; each process is a fork. Prints the final parameters, the incidents and
who was killed how often, as JSON.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from anabranch.federated.runtimes.network import Invitation, Roster, join, work
from anabranch.federated.runtimes.network.certificate import ensure_certificate
from anabranch.federated.store import RunStore
from tests.federated.helpers import EXAMPLES, names
from tests.federated.network.places import Quiet, over_network, parameters

torch.set_num_threads(1)
logging.disable(logging.CRITICAL)

SITES, ROUNDS = 3, 12


class Slow(Quiet):
    """Takes long enough to be killed in the middle."""

    def run(self, ctx, kind, payload):
        time.sleep(0.1)
        return super().run(ctx, kind, payload)


def coordinate(folder: Path, port: int) -> None:
    federation = over_network(
        folder, SITES, ROUNDS, port=port, insecure=False, absent_after=15.0, join_timeout=60.0
    )
    started = bool(RunStore(folder / "run").snapshots())
    result = federation.resume() if started else federation.run()
    outcome = {
        "parameters": parameters(federation).tolist(),
        "incidents": [[i.what, i.client, i.count] for i in result.incidents],
    }
    draft = folder / "outcome.tmp"
    draft.write_text(json.dumps(outcome))
    draft.rename(folder / "outcome")


def take_part(folder: Path, invitation: Invitation, name: str) -> None:
    member = join(invitation, folder, name, EXAMPLES, patience=30.0)
    work(member, folder, Slow(), range(EXAMPLES), patience=30.0)


def fork(function: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function()
            status = 0
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        finally:
            sys.stderr.flush()
            os._exit(status)
    return child


def ended(running: Mapping[str, int]) -> dict[str, int]:
    return {role: os.waitpid(process, 0)[1] for role, process in running.items()}


def latest(run: Path) -> set[tuple[str, int]]:
    """The files of a run and their sizes, which change with every event that the run stores."""
    found = set()
    for path in run.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_size))
    return found


def main() -> None:
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    fingerprint = ensure_certificate(folder / "network").fingerprint
    roster = Roster(folder / "network")
    address = f"https://127.0.0.1:{port}"
    roles: dict[str, Callable[[], None]] = {"coordinator": lambda: coordinate(folder, port)}
    for name in names(SITES):
        invitation = Invitation(address, roster.run, roster.invite(name), fingerprint)
        roles[name] = lambda name=name, given=invitation: take_part(  # type: ignore[misc]
            folder / name, given, name
        )
    running = {role: fork(start) for role, start in roles.items()}
    rng = random.Random(5)
    killed = dict.fromkeys(roles, 0)
    # Everyone once and the coordinator three times while there is certainly work left, then anyone.
    plan = rng.sample([*roles, "coordinator", "coordinator"], len(roles) + 2)
    plan += rng.choices([*roles, "coordinator"], k=kills - len(plan))
    seen = latest(folder / "run")
    for role in plan:
        while latest(folder / "run") == seen and not (folder / "outcome").exists():
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.05))
        if (folder / "outcome").exists():
            break
        os.kill(running[role], signal.SIGKILL)
        os.waitpid(running[role], 0)
        killed[role] += 1
        seen = latest(folder / "run")
        running[role] = fork(roles[role])
    statuses = ended(running)
    # Who was killed while it heard of the end asks for it in vain, until the same command is given.
    if late := [role for role, status in statuses.items() if status]:
        statuses |= ended({role: fork(roles[role]) for role in ["coordinator", *late]})
    outcome = json.loads((folder / "outcome").read_text())
    sys.stdout.write(json.dumps({**outcome, "killed": killed, "statuses": statuses}))


if __name__ == "__main__":
    main()
