"""Federations that are killed again and again, and the same undisturbed.

    python -m tests.federated.crashing FOLDER KILLS

Everything is imported once; each attempt is a fork that kills itself with SIGKILL at some write:
just before it, in the middle of it, or just after it. Prints, for each case, the fingerprints of
both runs and where the attempts were killed, as JSON.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from anabranch import adapters, registry
from anabranch.evaluation.testbeds import digits
from anabranch.federated import (
    Buffered,
    Deadline,
    Federation,
    Gossip,
    Graph,
    Simulation,
    Sync,
    Tree,
    Uniform,
    log_uniform,
    splits,
)
from anabranch.federated.aggregation import MultiKrum
from anabranch.federated.codecs import Chain, ErrorFeedback, Quantise, TopK
from anabranch.federated.gossip import Peer, Relay
from anabranch.federated.store import ClientStore, RunStore
from anabranch.federated.strategies import FedAvg, FedProx
from anabranch.federated.strategies.fedasync import FedAsync
from anabranch.federated.strategies.fedcompass import FedCompass
from anabranch.federated.strategies.ferret import Ferret
from anabranch.federated.topologies import metropolis, ring
from tests.federated.exchange import split_learning
from tests.federated.helpers import fingerprint

# A fork of a process whose OpenMP threads have worked would wait for threads that it does not have.
torch.set_num_threads(1)
logging.disable(logging.WARNING)

CLIENTS = 5


def places() -> Any:
    labels = digits.images()[0].labels.tolist()
    split = splits.dirichlet(labels, CLIENTS, 0.5, min_size=20)
    return digits.sites(split, log_uniform(CLIENTS, seed=3))


def simulated(strategy: Any, store: Path, **options: Any) -> Federation:
    options = {"rounds": 6, **options}
    local = digits.local(steps=3)
    model: Any = digits.perceptron()
    if strategy.adapter:
        model = adapters.build(strategy.adapter, model, r=8, target_modules=["0", "2"])
    return strategy.simulate(model, local, places(), store=store, **options)


def gossiping(store: Path) -> Federation:
    sites = places()
    graph = Graph([site.name for site in sites], metropolis(ring(CLIENTS)))
    client = FedAvg().client(digits.local(steps=3))
    runtime = Simulation(sites, digits.perceptron())
    return Federation(Relay(), Peer(client), Gossip(3), runtime, topology=graph, store=store)


def names() -> list[str]:
    return [site.name for site in places()]


FEEDBACK = ErrorFeedback(Chain([TopK(0.1), Quantise(8)]))
CASES: dict[str, Callable[[Path], Federation]] = {
    **{
        name: lambda store, cls=cls: simulated(cls(), store)
        for name, cls in registry.available("strategies").items()
    },
    # Their versions are of one reply or few: six would be over before anything is killed.
    "fedasync": lambda store: simulated(FedAsync(), store, rounds=50),
    "fedcompass": lambda store: simulated(FedCompass(max_steps=10, min_steps=2), store, rounds=40),
    "sampled, with error feedback": lambda store: simulated(
        FedAvg(), store, schedule=Sync(6, Uniform(3)), codec=FEEDBACK, down=Quantise(8)
    ),
    "buffered": lambda store: simulated(FedProx(0.1), store, schedule=Buffered(8, 2)),
    "deadline": lambda store: simulated(FedAvg(), store, schedule=Deadline(6, seconds=1.0)),
    "tree": lambda store: simulated(FedAvg(), store, topology=Tree.balanced(names(), 2)),
    "robust": lambda store: simulated(FedAvg(rule=MultiKrum(1), momentum=0.9), store),
    "ferret, pooled": lambda store: simulated(Ferret(16, momentum=0.5), store),
    "gossip": gossiping,
    "split learning": split_learning,
}


class Killer:
    """Kills this process at its n-th write, in one of three ways."""

    def __init__(self, at: int) -> None:
        self.left = at
        for cls, method in ((RunStore, "append"), (RunStore, "save"), (ClientStore, "save")):
            self.arm(cls, method)
        replace = Path.replace

        def before_rename(draft: Path, target: Any) -> Any:
            self.count()
            return replace(draft, target)

        Path.replace = before_rename  # type: ignore[method-assign, assignment]

    def arm(self, cls: type, method: str) -> None:
        original = getattr(cls, method)

        def counted(store: Any, *arguments: Any) -> None:
            self.count()
            original(store, *arguments)
            self.count()

        setattr(cls, method, counted)

    def count(self) -> None:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)


def attempt(case: str, folder: Path, kill_at: int) -> int | None:
    """Run or go on in a fork. The version that was stored when it was killed, or None."""
    child = os.fork()
    if child == 0:
        federation = CASES[case](folder)
        Killer(kill_at)
        try:
            if RunStore(folder).snapshots():
                federation.resume()
            else:
                federation.run()
            outcome = digest(federation)
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        (folder / "outcome").write_text(json.dumps(outcome))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        return None
    stored = RunStore(folder).snapshots()
    return stored[-1] if stored else 0


def digest(federation: Federation) -> dict[str, Any]:
    return {
        key: hashlib.sha256(repr(value).encode()).hexdigest() if len(repr(value)) > 80 else value
        for key, value in fingerprint(federation).items()
    }


def main() -> None:
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    warm = FedAvg().simulate(digits.perceptron(), digits.local(steps=1), places())
    warm.run()
    report = {}
    for case in CASES:
        rng = random.Random(case)
        whole, killed = folder / case / "whole", folder / case / "killed"
        whole.mkdir(parents=True)
        killed.mkdir()
        attempt(case, whole, 0)
        left_at = []
        for _ in range(kills):
            at = attempt(case, killed, rng.randint(1, 120))
            if at is None:
                break
            left_at.append(at)
        else:
            attempt(case, killed, 0)
        report[case] = {
            "whole": json.loads((whole / "outcome").read_text()),
            "killed": json.loads((killed / "outcome").read_text()),
            "left_at": left_at,
        }
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main()
