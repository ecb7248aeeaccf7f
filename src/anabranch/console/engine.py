"""What the engines do, sampled once a second for all tabs together."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from anabranch.api.metrics import Metrics
from anabranch.console.latency import RecentPercentiles, snapshot
from anabranch.console.live import Unwatch, Watchers
from anabranch.models.protocol import Model, ModelStatistics

SAMPLE_SECONDS = 1.0
HISTORY_SECONDS = 300.0
LATENCY_WINDOW_SECONDS = 30.0
RANKS = (0.5, 0.95, 0.99)


@dataclass(frozen=True)
class Sample:
    """One model in the second before ``time`` (seconds since 1970).

    Rates are tokens per second. Shares are fractions of 1, and None where there was nothing to
    share. Latencies are seconds over the last :data:`LATENCY_WINDOW_SECONDS`; None: no requests.
    """

    time: float
    generated: float
    prompt: float
    trained: float
    cache_usage: float
    running: int
    waiting: int
    finetune_jobs: int
    trained_share: float | None
    """Of all tokens that the engine computed, those that fine-tuning trained through."""
    cached_share: float | None
    accepted_share: float | None
    target_kept: float | None
    first_token_p50: float | None
    first_token_p95: float | None
    between_tokens_p50: float | None
    between_tokens_p95: float | None
    between_tokens_p99: float | None
    between_tokens_target: float | None
    """What the model's streams are promised; None: nothing."""


Samples = Mapping[str, Sample]
"""By model."""


class EngineSampler:
    """Samples ``models`` while it runs, keeps five minutes, and tells who watches."""

    def __init__(self, models: Iterable[Model], metrics: Metrics) -> None:
        self._models = list(models)
        self._metrics = metrics
        self._before: dict[str, tuple[float, ModelStatistics]] = {}
        windows = ("first", "between")
        self._latencies = {
            model.name: {name: RecentPercentiles(LATENCY_WINDOW_SECONDS) for name in windows}
            for model in self._models
        }
        self._watchers: Watchers[Samples] = Watchers()
        length = int(HISTORY_SECONDS / SAMPLE_SECONDS)
        self.history: dict[str, deque[Sample]] = {
            model.name: deque(maxlen=length) for model in self._models
        }
        """Oldest first."""

    def watch(self, watcher: Callable[[Samples], None]) -> Unwatch:
        """Call ``watcher`` with every new sample."""
        return self._watchers.add(watcher)

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            self.sample(time.monotonic(), time.time())
            await asyncio.sleep(SAMPLE_SECONDS)

    def sample(self, now: float, wall: float) -> None:
        """Take one sample; ``now`` is a clock that never goes back, ``wall`` the time of day."""
        fresh: dict[str, Sample] = {}
        for model in self._models:
            statistics = model.statistics()
            before = self._before.get(model.name)
            self._before[model.name] = (now, statistics)
            latencies = self._observe_latencies(model.name, now)
            if before is not None and now > before[0]:
                seconds, grown = now - before[0], _Growth(before[1], statistics)
                target = model.time_between_tokens
                fresh[model.name] = _sample(wall, seconds, statistics, grown, latencies, target)
                self.history[model.name].append(fresh[model.name])
        if fresh:
            self._watchers.tell(fresh)

    def _observe_latencies(self, model: str, now: float) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        histograms = {"first": self._metrics.first_token, "between": self._metrics.inter_token}
        for name, histogram in histograms.items():
            window = self._latencies[model][name]
            window.observe(now, snapshot(histogram, model))
            for rank, value in zip(RANKS, window.percentiles(RANKS), strict=True):
                found[f"{name}_p{100 * rank:.0f}"] = value
        return found


class _Growth:
    """How much each total grew between two looks."""

    def __init__(self, before: ModelStatistics, after: ModelStatistics) -> None:
        self._before = before
        self._after = after

    def __getitem__(self, name: str) -> int:
        return max(0, int(getattr(self._after, name) - getattr(self._before, name)))

    def share(self, part: str, whole: str) -> float | None:
        """The growth of one as a share of the other's."""
        return self[part] / self[whole] if self[whole] else None


def _sample(
    wall: float,
    seconds: float,
    now: ModelStatistics,
    grown: _Growth,
    latencies: Mapping[str, float | None],
    target: float | None,
) -> Sample:
    computed = grown["prompt_tokens"] - grown["cached_prompt_tokens"] + grown["generated_tokens"]
    everything = max(0, computed) + grown["finetune_tokens"]
    return Sample(
        time=wall,
        generated=grown["generated_tokens"] / seconds,
        prompt=grown["prompt_tokens"] / seconds,
        trained=grown["finetune_tokens"] / seconds,
        cache_usage=now.cache_usage,
        running=now.running,
        waiting=now.waiting,
        finetune_jobs=now.finetune_jobs,
        trained_share=grown["finetune_tokens"] / everything if everything else None,
        cached_share=grown.share("cached_prompt_tokens", "prompt_tokens"),
        accepted_share=grown.share("accepted_tokens", "drafted_tokens"),
        target_kept=grown.share("slo_met", "slo_steps"),
        first_token_p50=latencies["first_p50"],
        first_token_p95=latencies["first_p95"],
        between_tokens_p50=latencies["between_p50"],
        between_tokens_p95=latencies["between_p95"],
        between_tokens_p99=latencies["between_p99"],
        between_tokens_target=target,
    )
