"""One set-up in four modes: together, each client alone, on pooled data, and untrained.

FederatedScope-LLM (Kuang et al. 2023, section 3) compares every federated run like this. All modes
begin with the same model and take the same number of steps where data is; pooled training takes as
many as all clients together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Literal

import torch

from anabranch.errors import ConfigurationError
from anabranch.federated.core import Federation
from anabranch.federated.local import LocalTraining
from anabranch.federated.runtimes import Simulation, Site
from anabranch.federated.scheduling import Schedule, Sync
from anabranch.federated.shared import lent, shared_tensors
from anabranch.federated.strategies import FedAvg, Strategy
from anabranch.models.progress import Progress, silent

Mode = Literal["federated", "local", "global", "zero-shot"]
MODES: tuple[Mode, ...] = ("federated", "local", "global", "zero-shot")

Score = Callable[[], Mapping[str, float]]
"""Held-out figures of the model as it is now."""


@dataclass(frozen=True)
class ModeResult:
    """How a mode did.

    ``figures`` are held-out: in mode ``local`` means over the clients, each of which is in
    ``clients``. ``bytes`` are those of all messages, ``seconds`` virtual, ``trained`` how many
    values are trained.
    """

    figures: Mapping[str, float]
    bytes: int = 0
    seconds: float = 0.0
    trained: int = 0
    clients: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def spread(self) -> dict[str, tuple[float, float]]:
        """Smallest and largest of each figure among the clients."""
        return {
            name: (
                min(found[name] for found in self.clients.values()),
                max(found[name] for found in self.clients.values()),
            )
            for name in self.figures
            if self.clients
        }


def compare(
    strategy: Strategy,
    model: Any,
    local: LocalTraining,
    sites: Sequence[Site],
    schedule: Schedule,
    score: Score,
    *,
    rounds: int,
    seed: int = 0,
    modes: Sequence[Mode] = MODES,
    done: Callable[[Mode, ModeResult], None] = lambda mode, result: None,
    progress: Progress = silent,
    **options: Any,
) -> dict[Mode, ModeResult]:
    """Results by mode; ``done`` is told each as soon as it is there.

    ``score()`` is called with the mode's weights in ``model``, which is as before afterwards.
    ``schedule`` and ``options`` (of :class:`Federation`) are for the mode ``federated``; the others
    do ``rounds`` tasks one after the other, by FedAvg with a single site. They take steps, as
    epochs of more data would be more of them.
    """
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise ConfigurationError(f"no mode {unknown[0]!r}; there are {', '.join(MODES)}")
    strategy.check(local)
    start = shared_tensors(model)
    trained = sum(tensor.numel() for tensor in start.values())

    def run(federation: Federation) -> tuple[Mapping[str, float], int, float]:
        result = federation.run()
        with lent(model, federation.server.tensors):  # type: ignore[attr-defined]
            return dict(score()), result.ledger.total().payload, result.seconds

    def single(site: Site, training: LocalTraining) -> tuple[Mapping[str, float], float]:
        plain = FedAvg(upload="weights")
        runtime = Simulation([site], model)
        figures, _, seconds = run(
            Federation(plain.begin(model), plain.client(training), Sync(rounds), runtime, seed=seed)
        )
        return figures, seconds

    found: dict[Mode, ModeResult] = {}
    with lent(model, start):
        for number, mode in enumerate(modes):
            progress(f"mode {mode}", number / len(modes))
            if mode == "federated":
                runtime = Simulation(sites, model)
                figures, sent, seconds = run(
                    Federation(
                        strategy.begin(model),
                        strategy.client(local),
                        schedule,
                        runtime,
                        seed=seed,
                        **options,
                    )
                )
                made = ModeResult(figures, sent, seconds, trained)
            elif mode == "local":
                runs = {site.name: single(site, local) for site in sites if len(site.data)}
                clients = {name: figures for name, (figures, _) in runs.items()}
                means = {n: fmean(f[n] for f in clients.values()) for n in _common(clients)}
                slowest = max(seconds for _, seconds in runs.values())
                made = ModeResult(means, 0, slowest, trained, clients)
            elif mode == "global":
                pooled = Site("everyone", [item for site in sites for item in site.data])
                figures, seconds = single(pooled, _longer(local, len(sites)))
                made = ModeResult(figures, 0, seconds, trained)
            else:
                with torch.no_grad():
                    made = ModeResult(dict(score()))
            found[mode] = made
            done(mode, made)
    return found


def _longer(local: LocalTraining, times: int) -> LocalTraining:
    if local.options.steps is None:
        return local  # an epoch of everything is as many steps already
    options = local.options.model_copy(update={"steps": local.options.steps * times})
    return replace(local, options=options)


def _common(clients: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Figures that every client has."""
    first = next(iter(clients.values()))
    return [name for name in first if all(name in figures for figures in clients.values())]
