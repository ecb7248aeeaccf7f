"""A federation of quadratics: clients pull a vector towards their own targets, in microseconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from anabranch.federated import (
    Client,
    DeviceProfile,
    Federation,
    Reply,
    Server,
    Simulation,
    Site,
    Task,
)
from anabranch.federated.errors import EmptyRound
from anabranch.federated.randomness import generator
from anabranch.federated.runtimes import Lost
from anabranch.federated.store import RunStore
from anabranch.federated.trees import dump

DIMENSIONS = 6
EXAMPLES = 10


class VectorServer(Server):
    """Adds the mean change, weighted by examples. Exact in float64 up to rounding."""

    associative = True

    def __init__(self) -> None:
        self.x = {"x": torch.zeros(DIMENSIONS, dtype=torch.float64)}
        self.folded: list[tuple[str, int, int]] = []

    def message(self, client, kind):
        return self.x

    def expects(self, client, kind):
        return self.x

    def fold(self, acc, update):
        acc = acc or {"sum": torch.zeros(DIMENSIONS, dtype=torch.float64), "weight": 0}
        self.folded.append((update.client, update.task, update.examples))
        return {
            "sum": acc["sum"] + update.payload["x"] * update.examples,
            "weight": acc["weight"] + update.examples,
        }

    def merge(self, one, other):
        return {key: one[key] + other[key] for key in one}

    def commit(self, acc):
        if not acc["weight"]:
            raise EmptyRound("all weights are 0")
        self.x = {"x": self.x["x"] + acc["sum"] / acc["weight"]}
        return {"norm": float(self.x["x"].norm())}

    def state_dict(self):
        return {"x": self.x}

    def load_state_dict(self, state):
        self.x = state["x"]


class VectorClient(Client):
    """Noisy gradient steps towards the site's target; counts its tasks in personal state."""

    def __init__(self) -> None:
        self.executed: list[tuple[str, int]] = []

    def setup(self, ctx):
        ctx.state["tasks"] = []
        ctx.state["memory"] = torch.zeros(2)

    def run(self, ctx, kind, payload):
        self.executed.append((ctx.name, ctx.task))
        x = payload["x"]
        target = torch.from_numpy(generator("target", ctx.name).standard_normal(DIMENSIONS))
        moved = x.clone()
        for _ in range(ctx.work.steps or 3):
            noise = 0.01 * torch.from_numpy(ctx.rng.standard_normal(DIMENSIONS))
            moved -= 0.1 * (moved - target + noise + 0.01 * torch.rand(DIMENSIONS))
            ctx.spend(1)
        ctx.state["tasks"].append(ctx.task)
        ctx.state["memory"] += float(moved[0])
        ctx.report(distance=float((moved - target).norm()))
        return {"x": moved - x}, EXAMPLES


def names(count: int) -> list[str]:
    return [f"c{index}" for index in range(count)]


def sites(count: int, **changes: Any) -> list[Site]:
    """Sites whose speeds differ by their number."""
    return [
        Site(name, range(EXAMPLES), DeviceProfile(0.1 * (1 + index), 1e4, 1e4, 0.05), **changes)
        for index, name in enumerate(names(count))
    ]


def vectors(
    schedule,
    count: int = 4,
    *,
    places: Sequence[Site] | None = None,
    faults: Any = None,
    order: Any = None,
    server: Server | None = None,
    client: Client | None = None,
    strict: bool = True,
    **options: Any,
) -> Federation:
    runtime = Simulation(
        sites(count) if places is None else places, faults=faults, order=order, strict=strict
    )
    return Federation(
        server or VectorServer(), client or VectorClient(), schedule, runtime, **options
    )


def fingerprint(federation: Federation) -> dict[str, Any]:
    """Everything that two equal runs have alike, bit for bit."""
    run = federation.coordinator.state
    return {
        "server": tree_bytes(federation.server.state_dict()),
        "ledger": run.ledger.state_dict(),
        "incidents": run.incidents.state_dict(),
        "seconds": run.now,
        "version": run.version,
        "history": repr(run.history),
        "personal": {
            n: tree_bytes(federation.runtime.node(n).state) for n in federation.runtime.sites
        },
    }


def tree_bytes(tree: Any) -> bytes:
    return dump(tree)


class Tamper:
    """``Tamper({("c1", 2): fault})``: what happens to c1's second reply. Faults are below."""

    def __init__(self, script: dict[tuple[str, int], Callable[[Task, Reply], list[Any]]]) -> None:
        self.script = script
        self.seen: dict[str, int] = {}

    def __call__(self, task, reply):
        count = self.seen[task.client] = self.seen.get(task.client, 0) + 1
        fault = self.script.get((task.client, count))
        return [reply] if fault is None else fault(task, reply)


def lost(task, reply):
    return [Lost(task.id, f"{task.client} vanished")]


def random_order(seed: int):
    rng = np.random.default_rng(seed)

    def shuffle(tasks):
        return [tasks[index] for index in rng.permutation(len(tasks))]

    return shuffle


class Crash(BaseException):
    """The coordinator's process is gone; the sites live on."""


def crash_after(inputs):
    """A store whose process dies before it can act on an input it has just written."""

    class Dying(RunStore):
        left = inputs

        def append(self, tree):
            super().append(tree)
            self.left -= 1
            if not self.left:
                raise Crash

        def retract(self):
            pass

    return Dying


def assert_killed_ends_the_same(make, folder, inputs):
    """A run that dies after so many inputs and is resumed equals one that does not.

    ``make(store)`` makes the federation.
    """
    whole = make(folder / "whole")
    whole.run()
    for count in inputs:
        parts = folder / str(count)
        with pytest.raises(Crash):
            make(crash_after(count)(parts)).run()
        again = make(parts)
        again.resume()
        assert fingerprint(again) == fingerprint(whole)
