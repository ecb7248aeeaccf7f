"""A coordinator and its sites in threads of this process, over real sockets."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from anabranch.federated import Federation, Simulation, Site, Sync
from anabranch.federated.randomness import generator
from anabranch.federated.runtimes.network import Network, join, work
from tests.federated.helpers import DIMENSIONS, EXAMPLES, VectorClient, VectorServer, names

ROUNDS = 3


class Quiet(VectorClient):
    """Like its base, but draws from its own generator only: threads share the global ones."""

    def run(self, ctx, kind, payload):
        self.executed.append((ctx.name, ctx.task))
        x = payload["x"]
        target = torch.from_numpy(generator("target", ctx.name).standard_normal(DIMENSIONS))
        moved = x - 0.1 * (x - target + torch.from_numpy(ctx.rng.standard_normal(DIMENSIONS)))
        ctx.state["tasks"].append(ctx.task)
        return {"x": moved - x}, EXAMPLES


def undisturbed(count: int = 3, rounds: int = ROUNDS, **options: Any) -> Federation:
    """The same run in simulation."""
    places = [Site(name, range(EXAMPLES)) for name in names(count)]
    federation = Federation(VectorServer(), Quiet(), Sync(rounds), Simulation(places), **options)
    federation.run()
    return federation


def over_network(
    folder: Path,
    count: int = 3,
    rounds: int = ROUNDS,
    *,
    schedule: Any = None,
    options: dict[str, Any] | None = None,
    **runtime: Any,
) -> Federation:
    settings = {"clients": count, "insecure": True, "join_timeout": 20.0, **runtime}
    network = Network(folder / "network", **settings)
    return Federation(
        VectorServer(),
        Quiet(),
        schedule or Sync(rounds, join_timeout=20.0),
        network,
        store=folder / "run",
        **(options or {}),
    )


class Working:
    """A function in a thread; ``outcome`` is what it returned, or raised."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.outcome: Any = None

        def run() -> None:
            try:
                self.outcome = function()
            except BaseException as error:
                self.outcome = error

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def end(self) -> Any:
        self.thread.join(timeout=60.0)
        assert not self.thread.is_alive(), "it goes on"
        return self.outcome


def in_threads(*functions: Callable[[], Any]) -> list[Working]:
    return [Working(function) for function in functions]


class SiteThread(Working):
    """A site that joins and works; ``outcome`` is why it ended, or the exception."""

    def __init__(
        self,
        invitation: Any,
        folder: Path,
        name: str,
        client: Any = None,
        examples: int = EXAMPLES,
        **options: Any,
    ) -> None:
        self.client = client or Quiet()
        watch = options.pop("watch", lambda task, reply: None)
        up = options.pop("up", None)
        settings = {"patience": 20.0, **options}

        def run() -> str:
            member = join(invitation, folder, name, examples, **settings)
            data = range(EXAMPLES)
            return work(member, folder, self.client, data, watch=watch, up=up, **settings)

        super().__init__(run)


def with_sites(
    federation: Federation, folder: Path, count: int = 3, make: Callable[..., Any] = SiteThread
) -> list[Any]:
    network = federation.runtime
    assert isinstance(network, Network)
    return [make(network.invite(), folder / "sites" / name, name) for name in names(count)]


def parameters(federation: Federation) -> torch.Tensor:
    assert isinstance(federation.server, VectorServer)
    return federation.server.x["x"]
