"""One set-up in five modes: together, each client alone, on pooled data, untrained, and personal.

FederatedScope-LLM (Kuang et al. 2023, section 3) compares every federated run like this. All modes
begin with the same model and take the same number of steps where data is; pooled training takes as
many as all clients together. Personal is what comes of the federation when each client then tunes
it for itself, which is one task more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.federated.core import Federation
from anabranch.federated.local import LocalTraining
from anabranch.federated.personal import personal_tensors
from anabranch.federated.result import RunResult
from anabranch.federated.runtimes import Simulation, Site
from anabranch.federated.scheduling import Schedule, Sync
from anabranch.federated.shared import lent, shared_tensors
from anabranch.federated.store import RunStore
from anabranch.federated.strategies import FedAvg, Strategy
from anabranch.models.progress import Progress, silent

Mode = Literal["federated", "local", "global", "zero-shot", "personal"]
MODES: tuple[Mode, ...] = ("federated", "local", "global", "zero-shot", "personal")

Score = Callable[[], Mapping[str, float]]
"""Held-out figures of the model as it is now."""

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class ModeResult:
    """How a mode did.

    ``figures`` are held-out. In modes ``local`` and ``personal``, which have a model for each
    client, they are means over the clients. ``clients`` has the figures of each: all of its own
    model, or, of a model that all share, those of the client's own held-out examples. ``bytes`` are
    those of all messages, ``seconds`` virtual, ``trained`` how many values are trained.
    """

    figures: Mapping[str, float]
    bytes: int = 0
    seconds: float = 0.0
    trained: int = 0
    clients: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def spread(self) -> dict[str, tuple[float, float]]:
        """Smallest and largest of each figure that all clients have."""
        found = {name: [f[name] for f in self.clients.values()] for name in _common(self.clients)}
        return {name: (min(values), max(values)) for name, values in found.items()}


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
    own: Mapping[str, Score] | None = None,
    tuning: LocalTraining | None = None,
    store: Path | None = None,
    done: Callable[[Mode, ModeResult], None] = lambda mode, result: None,
    progress: Progress = silent,
    **options: Any,
) -> dict[Mode, ModeResult]:
    """Results by mode; ``done`` is told each as soon as it is there.

    ``score()`` is called with the mode's weights in ``model``, which is as before afterwards; so is
    ``own[client]()``, for figures of the client's own held-out examples. ``schedule`` and
    ``options`` (of :class:`Federation`) are for the federation, which goes on in ``store`` if it
    was cut off; the others do ``rounds`` tasks one after the other, by FedAvg with a single site.
    They take steps, as epochs of more data would be more of them. ``tuning`` is the one task of
    mode ``personal``, by default ``local``; a method that keeps personal models is not tuned
    further.
    """
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise ConfigurationError(f"no mode {unknown[0]!r}; there are {', '.join(MODES)}")
    strategy.check(local)
    made = _Comparison(
        strategy, model, local, sites, schedule, score, rounds, seed, own or {},
        tuning or local, store, options, shared_tensors(model),
    )  # fmt: skip
    found: dict[Mode, ModeResult] = {}
    with lent(model, made.start):
        for number, mode in enumerate(modes):
            progress(f"mode {mode}", number / len(modes))
            found[mode] = made.result(mode)
            done(mode, found[mode])
    return found


@dataclass
class _Comparison:
    """What the modes have in common. ``start`` is what the model trains, untrained."""

    strategy: Strategy
    model: Any
    local: LocalTraining
    sites: Sequence[Site]
    schedule: Schedule
    score: Score
    rounds: int
    seed: int
    own: Mapping[str, Score]
    tuning: LocalTraining
    store: Path | None
    options: Mapping[str, Any]
    start: Tensors
    _together: tuple[Federation, RunResult] | None = None

    def result(self, mode: Mode) -> ModeResult:
        """Train, and score what comes of it."""
        trained = sum(tensor.numel() for tensor in self.start.values())
        if mode == "federated":
            federation, run = self.together()
            made = self.shared(_tensors(federation))
            sent, seconds = run.ledger.total().payload, run.seconds
            return replace(made, bytes=sent, seconds=seconds, trained=trained)
        if mode == "global":
            pooled = Site("everyone", [item for site in self.sites for item in site.data])
            longer = _longer(self.local, len(self.sites))
            tensors, seconds = self.single(pooled, longer, self.rounds, self.start)
            return replace(self.shared(tensors), seconds=seconds, trained=trained)
        if mode == "zero-shot":
            return self.shared(self.start)
        each = self.alone if mode == "local" else self.personal
        clients, slowest = {}, 0.0
        for site in self.sites:
            if len(site.data):
                tensors, seconds = each(site)
                clients[site.name] = self.scored(tensors, site.name)
                slowest = max(slowest, seconds)
        sent = self.together()[1].ledger.total().payload if mode == "personal" else 0
        return ModeResult(_means(clients), sent, slowest, trained, clients)

    def alone(self, site: Site) -> tuple[Tensors, float]:
        """A client without the others."""
        return self.single(site, self.local, self.rounds, self.start)

    def personal(self, site: Site) -> tuple[Tensors, float]:
        """The client's own model, if the method keeps one; else the federation's, tuned once."""
        federation, run = self.together()
        state = federation.runtime.node(site.name).state  # type: ignore[attr-defined]
        if kept := personal_tensors(state):
            return kept, run.seconds
        tensors, seconds = self.single(site, self.tuning, 1, _tensors(federation))
        return tensors, run.seconds + seconds

    def together(self) -> tuple[Federation, RunResult]:
        """The federation, run once."""
        if self._together is None:
            federation = Federation(
                self.strategy.begin(self.model),
                self.strategy.client(self.local),
                self.schedule,
                Simulation(self.sites, self.model),
                seed=self.seed,
                store=self.store,
                **self.options,
            )
            stored = self.store is not None and RunStore(self.store).snapshots()
            self._together = federation, federation.resume() if stored else federation.run()
        return self._together

    def single(
        self, site: Site, training: LocalTraining, rounds: int, start: Tensors
    ) -> tuple[Tensors, float]:
        """What one site makes of ``start``, and its virtual seconds."""
        plain = FedAvg(upload="weights")
        runtime = Simulation([site], self.model)
        federation = Federation(
            plain.server(start), plain.client(training), Sync(rounds), runtime, seed=self.seed
        )
        result = federation.run()
        return _tensors(federation), result.seconds

    def shared(self, tensors: Tensors) -> ModeResult:
        """Figures of one model for all, also on each client's own examples."""
        with lent(self.model, tensors), torch.no_grad():
            figures = dict(self.score())
            clients = {name: dict(score()) for name, score in self.own.items()}
        return ModeResult(figures | _means(clients), clients=clients)

    def scored(self, tensors: Tensors, client: str) -> dict[str, float]:
        """Figures of one client's model."""
        with lent(self.model, tensors), torch.no_grad():
            return {**self.score(), **(self.own[client]() if client in self.own else {})}


def _tensors(federation: Federation) -> Tensors:
    tensors: Tensors = federation.server.tensors  # type: ignore[attr-defined]
    return tensors


def _longer(local: LocalTraining, times: int) -> LocalTraining:
    if local.options.steps is None:
        return local  # an epoch of everything is as many steps already
    options = local.options.model_copy(update={"steps": local.options.steps * times})
    return replace(local, options=options)


def _means(clients: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {name: fmean(f[name] for f in clients.values()) for name in _common(clients)}


def _common(clients: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Figures that every client has."""
    first = next(iter(clients.values()), {})
    return [name for name in first if all(name in figures for figures in clients.values())]
