"""Prometheus metrics: load and totals from the models, times and lengths from the requests.

Each app has its own registry, so that two apps in one process do not mix.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from anabranch.models.protocol import Model, ModelStatistics, OutputDelta

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
RATE_WINDOW_SECONDS = 10.0

_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 10)
_FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 30, 120)
_REQUEST_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_RATES = {
    "generated_tokens": ("tokens_per_second", "Generated tokens"),
    "finetune_tokens": ("finetune_tokens_per_second", "Tokens trained through"),
}
"""Total -> the gauge that says how fast it grows, and what it counts."""
_LENGTHS = tuple(2**i for i in range(18))


class Metrics:
    """All metrics of one server, and the rendering of ``/metrics``."""

    def __init__(self, models: Sequence[Model]) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._models = models
        self._rates = {
            model.name: {name: SlidingRate(RATE_WINDOW_SECONDS) for name in _RATES}
            for model in models
        }
        self.registry.register(_ModelCollector(self))

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            name = f"anabranch_{name}"
            return Histogram(name, text, ["model"], buckets=buckets, registry=self.registry)

        self.first_token = histogram(
            "time_to_first_token_seconds", "Arrival to first token.", _FIRST_TOKEN_SECONDS
        )
        self.inter_token = histogram(
            "inter_token_seconds", "Time between two tokens of one choice.", _TOKEN_SECONDS
        )
        self.request = histogram(
            "request_seconds", "Arrival to last token, finished requests.", _REQUEST_SECONDS
        )
        self.prompt_length = histogram("request_prompt_tokens", "Prompt lengths.", _LENGTHS)
        self.output_length = histogram(
            "request_output_tokens", "Answer lengths, all choices together.", _LENGTHS
        )
        self.requests = Counter(
            "anabranch_requests",
            "Answered HTTP requests.",
            ["endpoint", "status"],
            registry=self.registry,
        )
        self.aborted = Counter(
            "anabranch_aborted",
            "Requests whose client went away.",
            ["model"],
            registry=self.registry,
        )
        for model in models:
            self.aborted.labels(model.name)  # shown as 0 before the first one

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)

    def sample(self) -> dict[str, tuple[ModelStatistics, dict[str, float]]]:
        """Each model's statistics and how fast :data:`_RATES` grow; called about once a second."""
        now = time.monotonic()
        sampled = {}
        for model in self._models:
            statistics = model.statistics()
            rates = self._rates[model.name]
            for name, rate in rates.items():
                rate.observe(now, getattr(statistics, name))
            speeds = {name: rate.per_second() for name, rate in rates.items()}
            sampled[model.name] = (statistics, speeds)
        return sampled

    def timer(self, model: str, started: float) -> RequestTimer:
        """Observes one request to ``model`` that arrived at ``started`` (perf_counter)."""
        return RequestTimer(self, model, started)


class RequestTimer:
    """Turns one request's deltas into observations and counts its tokens."""

    def __init__(self, metrics: Metrics, model: str, started: float) -> None:
        self._started = started
        self._first = metrics.first_token.labels(model)
        self._inter = metrics.inter_token.labels(model)
        self._request = metrics.request.labels(model)
        self._prompt = metrics.prompt_length.labels(model)
        self._output = metrics.output_length.labels(model)
        self._aborted = metrics.aborted.labels(model)
        self._last: dict[int, float] = {}
        self.output_tokens = 0

    def delta(self, index: int, delta: OutputDelta) -> None:
        """One delta of choice ``index`` has arrived."""
        count = len(delta.token_ids)
        if not count:
            return
        now = time.perf_counter()
        if self.output_tokens == 0:
            self._first.observe(now - self._started)
        self.output_tokens += count
        last = self._last.get(index)
        self._last[index] = now
        if last is not None:
            # Tokens that arrive together share the wait for them.
            for _ in range(count):
                self._inter.observe((now - last) / count)

    def finished(self, prompt_tokens: int) -> None:
        """All choices are complete."""
        self._request.observe(time.perf_counter() - self._started)
        self._prompt.observe(prompt_tokens)
        self._output.observe(self.output_tokens)

    def aborted(self) -> None:
        """The client went away."""
        self._aborted.inc()


class SlidingRate:
    """How fast a total grew over the last ``window`` seconds. Reads no clock."""

    def __init__(self, window: float) -> None:
        self._window = window
        self._samples: deque[tuple[float, int]] = deque()

    def observe(self, now: float, total: int) -> None:
        """``total`` as of ``now`` (seconds, never decreasing)."""
        samples = self._samples
        samples.append((now, total))
        # The newest sample that is a window old stays: it is where the window begins.
        while len(samples) > 2 and samples[1][0] <= now - self._window:
            samples.popleft()

    def per_second(self) -> float:
        """0 before two samples exist."""
        if len(self._samples) < 2:
            return 0.0
        (start, low), (end, high) = self._samples[0], self._samples[-1]
        return (high - low) / (end - start) if end > start else 0.0


class _ModelCollector(Collector):
    """Reads the models when scraped, so that these numbers are never stale."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        sampled = self._metrics.sample()
        gauges = {
            "waiting_requests": ("Requests that wait for memory or a turn.", "waiting"),
            "running_requests": ("Requests that are in the batch.", "running"),
            "cache_usage_ratio": ("Share of the key-value cache in use, 0 to 1.", "cache_usage"),
            "finetune_jobs": ("Fine-tuning jobs that run.", "finetune_jobs"),
        }
        for name, (text, attribute) in gauges.items():
            gauge = GaugeMetricFamily(f"anabranch_{name}", text, labels=["model"])
            for model, (statistics, _) in sampled.items():
                gauge.add_metric([model], getattr(statistics, attribute))
            yield gauge
        for total, (name, what) in _RATES.items():
            text = f"{what} per second over {RATE_WINDOW_SECONDS:g} s."
            speed = GaugeMetricFamily(f"anabranch_{name}", text, labels=["model"])
            for model, (_, speeds) in sampled.items():
                speed.add_metric([model], speeds[total])
            yield speed
        counters = {
            "prompt_tokens": ("Prompt tokens.", "prompt_tokens"),
            "cached_prompt_tokens": ("Prompt tokens reused from memory.", "cached_prompt_tokens"),
            "generated_tokens": ("Generated tokens.", "generated_tokens"),
            "drafted_tokens": ("Drafted tokens that were verified.", "drafted_tokens"),
            "accepted_tokens": ("Drafted tokens that were accepted.", "accepted_tokens"),
            "preemptions": ("Requests set back for want of memory.", "preemptions"),
            "steps": ("Batches that the engine computed.", "steps"),
            "finetune_tokens": ("Tokens that fine-tuning trained through.", "finetune_tokens"),
            "steps_slo": ("Steps to which the latency target applies.", "slo_steps"),
            "steps_slo_met": ("Those of them that kept it.", "slo_met"),
        }
        for name, (text, attribute) in counters.items():
            counter = CounterMetricFamily(f"anabranch_{name}", text, labels=["model"])
            for model, (statistics, _) in sampled.items():
                counter.add_metric([model], getattr(statistics, attribute))
            yield counter
