"""Clients that worker processes can import, and a run to kill.

    python -m tests.federated.processes.sites FOLDER

runs :func:`slow_run` in a folder, or goes on with it, and prints the workers' process ids.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from anabranch.federated import Federation, Sync
from anabranch.federated.codecs import ErrorFeedback, TopK
from anabranch.federated.runtimes.processes import Processes
from anabranch.federated.store import RunStore
from anabranch.files import write_text
from tests.federated.helpers import VectorClient, VectorServer, sites


class Slow(VectorClient):
    """Takes its time."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def run(self, ctx, kind, payload):
        time.sleep(self.seconds)
        return super().run(ctx, kind, payload)


class StuckOnce(VectorClient):
    """c1 never ends the first task that it gets at version 1, and says in a file who is at it."""

    def __init__(self, mark: Path) -> None:
        super().__init__()
        self.mark = mark

    def run(self, ctx, kind, payload):
        if ctx.name == "c1" and ctx.version == 1 and not self.mark.exists():
            write_text(self.mark, str(os.getpid()))
            time.sleep(600)
        return super().run(ctx, kind, payload)


class Fails(VectorClient):
    """c0 has an error of its own in every task."""

    def run(self, ctx, kind, payload):
        if ctx.name == "c0":
            raise ZeroDivisionError("of its own")
        return super().run(ctx, kind, payload)


class Stillborn(VectorClient):
    """Its process dies when it is brought there."""

    def __setstate__(self, state):
        os._exit(3)


class Weights(VectorClient):
    """Reports what the model holds, writes into it, and what the site's data is."""

    def run(self, ctx, kind, payload):
        weight = ctx.model.weight
        ctx.report(weight=float(weight.sum()), data=float(ctx.data.sum()))
        with torch.no_grad():
            weight.add_(0.0)
        return super().run(ctx, kind, payload)


def model() -> torch.nn.Module:
    made = torch.nn.Linear(3, 1, bias=False)
    torch.nn.init.constant_(made.weight, 2.0)
    return made


def broken_model() -> torch.nn.Module:
    raise RuntimeError("no such weights")


def slow_run(folder: Path, seconds: float) -> Federation:
    return Federation(
        VectorServer(),
        Slow(seconds),
        Sync(5),
        Processes(sites(3), workers=2),
        codec=ErrorFeedback(TopK(0.5)),
        store=folder,
    )


if __name__ == "__main__":
    place = Path(sys.argv[1])
    federation = slow_run(place, 0.05)

    def tell(_):
        sys.stdout.write(f"{' '.join(map(str, federation.runtime.pool.pids))}\n")
        sys.stdout.flush()

    federation.coordinator.watch = tell
    if RunStore(place).snapshots():
        federation.resume()
    else:
        federation.run()
