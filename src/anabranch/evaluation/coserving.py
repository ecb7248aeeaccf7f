"""Fine-tuning beside live traffic, in four ways: not at all, co-served, in turns, and apart.

All serve the same arrivals on the same machine and train the same adapter on the same rows. What
the clients saw and what was trained is measured in wall time.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from anabranch import adapters, models
from anabranch.evaluation.traffic import (
    Arrival,
    RequestTimes,
    percentile,
    replay,
    times_between_tokens,
)
from anabranch.planning import CostModel
from anabranch.serving import Engine, EngineModel, EngineOptions
from anabranch.serving.coserving import FinetuneJob
from anabranch.serving.simulation import SimulatedRunner, VirtualClock, WallClock
from anabranch.training.example import Item
from anabranch.training.language import LanguageObjective
from anabranch.training.losses.causal import Causal
from anabranch.training.options import TrainOptions, parse_options
from anabranch.training.trainer import Trainer

ADAPTER: dict[str, Any] = {"r": 16, "target_modules": ["down_proj"]}
OPTIONS = parse_options(
    TrainOptions,
    {
        "steps": 100_000,
        "batch": 1,
        "lr": 1e-4,
        "schedule": "constant",
        # After every sequence, a checkpoint would be the price of the baseline's short turns.
        "checkpoint": {"every": 100_000},
    },
)
"""One sequence to a step, which is the shortest turn that training can take."""


@dataclass(frozen=True)
class Outcome:
    """One way of serving and training at once, over ``seconds`` of wall time."""

    times: list[RequestTimes]
    seconds: float
    idle: float
    """Seconds in which nothing was computed."""
    trained: float
    """Tokens."""

    @property
    def trained_per_second(self) -> float:
        """Fine-tuning's throughput in tokens."""
        return self.trained / self.seconds

    def attainment(self, target: float) -> float:
        """Share of the times between two tokens of a stream that are within ``target`` seconds."""
        return float(np.mean(times_between_tokens(self.times) <= target))

    def requests_within(self, target: float) -> float:
        """Share of the requests whose mean time between tokens is within ``target``."""
        means = [np.mean(np.diff(seen.tokens)) for seen in self.times if len(seen.tokens) > 1]
        return float(np.mean(np.asarray(means) <= target))

    def figures(self, target: float) -> dict[str, float]:
        """What a table shows of it; times in milliseconds."""
        gaps = times_between_tokens(self.times) * 1e3
        first = np.array([seen.first_token for seen in self.times]) * 1e3
        tokens = sum(len(seen.token_ids) for seen in self.times)
        return {
            "finetune_tokens_per_second": round(self.trained_per_second, 1),
            "attainment": round(self.attainment(target), 4),
            "requests_within_target": round(self.requests_within(target), 4),
            "p50_between_tokens": round(percentile(gaps, 50), 1),
            "p99_between_tokens": round(percentile(gaps, 99), 1),
            "longest_between_tokens": round(float(gaps.max()), 1),
            "p95_first_token": round(percentile(first, 95), 1),
            "output_tokens_per_second": round(tokens / self.seconds, 1),
        }


class CoServingBench:
    """The default model on one runner, and everything that is done with it."""

    def __init__(self, **options: Any) -> None:
        model = EngineModel.load(
            options=EngineOptions(kv_memory=2**28, prefix_reuse=False, speculation="off", **options)
        )
        self.tokenizer = model.tokenizer
        self.options = model.engine.options
        self._runner = model.engine.runner
        self.items: Sequence[Item] = []
        """What is trained on."""
        self.trace: Sequence[Arrival] = []
        """When requests come."""

    def engine(self) -> Engine:
        """A new engine on the one copy of the weights."""
        return Engine(self._runner, options=self.options)

    def alone(self, seconds: float) -> float:
        """Tokens per second that the engine trains with nothing else to do."""
        engine = self.engine()
        with _job(engine, self.items):
            _run_for(engine, 2.0)  # until costs are known
            before, began = engine.coserving.statistics.tokens, time.perf_counter()
            _run_for(engine, seconds)
            passed = time.perf_counter() - began
            return (engine.coserving.statistics.tokens - before) / passed

    def serve(self) -> Outcome:
        """Requests alone."""
        return self._replay(self.engine(), lambda idle: False, lambda: 0)

    def coserve(self) -> Outcome:
        """Requests and a job in one engine."""
        engine = self.engine()
        with _job(engine, self.items):
            _run_for(engine, 2.0)
            before = engine.coserving.statistics.tokens
            return self._replay(
                engine, lambda idle: False, lambda: engine.coserving.statistics.tokens - before
            )

    def in_turns(self, every: int, requests: int | None = None) -> Outcome:
        """Temporal sharing: a whole training step after every so many steps of requests, and
        whenever there are none. ``requests`` cuts the trace short."""
        trainer = plain_trainer(self.items)
        trainer.step(trainer.next_items())
        before = trainer.tokens_done
        steps = 0

        def turn(idle: bool) -> bool:
            nonlocal steps
            steps += not idle
            if not idle and steps % every:
                return False
            trainer.step(trainer.next_items())
            return True

        def trained() -> int:
            return trainer.tokens_done - before

        return self._replay(self.engine(), turn, trained, requests)

    def apart(self) -> Outcome:
        """Separate: a second process with the plain trainer on the same cores."""
        context = multiprocessing.get_context("spawn")
        tokens, stop = context.Value("q", 0), context.Event()
        process = context.Process(target=_train_apart, args=(self.items, tokens, stop), daemon=True)
        process.start()
        try:
            while not tokens.value:  # until it is trained in
                process.join(0.1)
                if process.exitcode is not None:
                    raise RuntimeError(f"the training process ended with {process.exitcode}")
            before = tokens.value
            return self._replay(self.engine(), lambda idle: False, lambda: tokens.value - before)
        finally:
            stop.set()
            process.join()

    def _replay(
        self,
        engine: Engine,
        between: Callable[[bool], bool],
        trained: Callable[[], float],
        requests: int | None = None,
    ) -> Outcome:
        trace = self.trace[:requests]
        generator = np.random.default_rng(0)
        prompts = [
            generator.integers(100, self._runner.vocabulary, arrival.prompt_tokens).tolist()
            for arrival in trace
        ]
        clock = IdleClock()
        times = replay(engine, trace, clock, lambda i, _: prompts[i], between)
        return Outcome(times, clock(), clock.idle, trained())


class IdleClock(WallClock):
    """Wall time that counts how much of it was waited."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = 0.0

    def wait_until(self, moment: float) -> None:
        """Sleep, and count it."""
        self.idle += max(0.0, moment - self())
        super().wait_until(moment)


def busy_share(cost: CostModel, trace: Sequence[Arrival], budget: int) -> float:
    """Share of the time that an engine computes on a trace, by predicted step times."""

    class Counting(VirtualClock):
        busy = 0.0

        def advance(self, seconds: float) -> None:
            self.busy += seconds
            super().advance(seconds)

    clock = Counting()
    options = EngineOptions(
        token_budget=budget, kv_memory=2**16, prefix_reuse=False, speculation="off"
    )
    engine = Engine(SimulatedRunner(cost, clock), options=options, clock=clock)
    replay(engine, trace, clock, lambda _, arrival: [0] * arrival.prompt_tokens)
    return clock.busy / clock()


def plain_trainer(items: Sequence[Item]) -> Trainer[Item]:
    """The plain trainer on a copy of the default model of its own."""
    network: nn.Module = models.load(models.DEFAULT, dtype="float32", device="cpu").network
    adapted = adapters.build("lora", network, **ADAPTER)
    objective = LanguageObjective.from_options(Causal(), OPTIONS)
    return Trainer(adapted, objective, OPTIONS, items)


@contextmanager
def _job(engine: Engine, items: Sequence[Item]) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        job = FinetuneJob("bench", "bench", items, OPTIONS, Path(folder), method_options=ADAPTER)
        handle = engine.finetune(job)
        try:
            yield
        finally:
            handle.cancel()
            engine.coserving.has_work()


def _run_for(engine: Engine, seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        engine.step()


def _train_apart(items: Sequence[Item], tokens: Any, stop: Any) -> None:
    trainer = plain_trainer(items)
    while not stop.is_set():
        trainer.step(trainer.next_items())
        tokens.value = trainer.tokens_done
