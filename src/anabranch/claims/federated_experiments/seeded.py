"""What the claims on seeded methods share: TinyOps with every weight trained, and SmolLM2-135M."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from anabranch import models
from anabranch.evaluation.testbeds import tinyops
from anabranch.federated import RunResult, Site
from anabranch.federated.coordinator import Coordinator
from anabranch.federated.core import Federation
from anabranch.federated.local import LocalTraining
from anabranch.federated.shared import lent
from anabranch.federated.strategies import Strategy
from anabranch.models.packaged import DEFAULT
from anabranch.training.example import Example

CLIENTS = 4
EXAMPLES = 128


@dataclass(frozen=True)
class Outcome:
    """A finished run: held-out loss on the four new operations, and what it sent."""

    loss: float
    result: RunResult
    federation: Federation

    def bytes(self, direction: str) -> int:
        """Payload bytes of all clients and rounds."""
        return self.result.ledger.total(direction=direction).payload


def base() -> Any:
    """TinyOps with all its weights trained; it knows operations 0 to 3."""
    return tinyops.pretrained().requires_grad_(True)


def sites(seed: int, count: int = CLIENTS) -> list[Site]:
    """One new operation each."""
    return [
        Site(f"client-{i}", tinyops.items(4 + i % 4, EXAMPLES, "train", seed, i))
        for i in range(count)
    ]


def run(
    strategy: Strategy,
    seed: int,
    rounds: int,
    count: int = CLIENTS,
    model: Any = None,
    places: list[Site] | None = None,
    watched: bool = False,
    **local: Any,
) -> Outcome:
    """Run a method; ``local`` are the clients' training options.

    ``watched`` puts ``held_out``, the loss of every version, in the history.
    """
    model = base() if model is None else model
    training = LocalTraining(tinyops.objective(), tinyops.training_options(**local))

    def held_out(coordinator: Coordinator) -> dict[str, float]:
        with lent(model, coordinator.server.tensors):  # type: ignore[attr-defined]
            return {"held_out": tinyops.score(model)["loss"]}

    federation = strategy.simulate(
        model,
        training,
        places or sites(seed, count),
        rounds=rounds,
        seed=seed,
        watch=held_out if watched else None,
    )
    result = federation.run()
    with lent(model, federation.server.tensors):  # type: ignore[attr-defined]
        loss = tinyops.score(model)["loss"]
    return Outcome(loss, result, federation)


def on_language_model(strategy: Strategy, steps: int, rounds: int = 1, **local: Any) -> Outcome:
    """One client of SmolLM2-135M with all weights trained, on a few tokens: only bytes count.

    Its held-out loss is not measured.
    """
    model = models.load(DEFAULT, dtype="float32").network.requires_grad_(True)
    example = Example(tuple(range(100, 108)), (False,) * 4 + (True,) * 4, "tokens")
    options = tinyops.training_options(steps=steps, batch=1, **local)
    training = LocalTraining(tinyops.objective(), options)
    federation = strategy.simulate(model, training, [Site("client-0", [(example,)])], rounds=rounds)
    return Outcome(float("nan"), federation.run(), federation)
