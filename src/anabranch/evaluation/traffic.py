"""Traffic for serving experiments: traces of arrivals, their replay, and what clients saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from anabranch.models.protocol import SamplingParameters
from anabranch.serving import Engine, Request
from anabranch.serving.simulation import Clock

EMA_WEIGHT = 0.1
"""Weight of the newest token in the moving average of a stream's speed."""


@dataclass(frozen=True)
class Arrival:
    """A request of a trace: when it arrives (seconds) and how long it is (tokens)."""

    seconds: float
    prompt_tokens: int
    output_tokens: int


@dataclass
class RequestTimes:
    """When a request arrived and when each of its tokens came, in seconds."""

    arrival: Arrival
    tokens: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    @property
    def first_token(self) -> float:
        """Seconds from arrival to the first token."""
        return self.tokens[0] - self.arrival.seconds

    @property
    def slowest_speed(self) -> float:
        """Lowest moving average of tokens per second over the stream; infinite for one token."""
        speeds = [1.0 / gap for gap in np.diff(self.tokens) if gap > 0]
        if not speeds:
            return float("inf")
        average = slowest = speeds[0]
        for speed in speeds[1:]:
            average += EMA_WEIGHT * (speed - average)
            slowest = min(slowest, average)
        return slowest


def poisson_trace(
    seed: int,
    requests: int,
    rate: float,
    prompt: tuple[float, float],
    output: tuple[float, float],
) -> list[Arrival]:
    """Arrivals at ``rate`` per second; lengths are normal (mean, deviation), at least 1."""
    generator = np.random.default_rng(seed)
    seconds = np.cumsum(generator.exponential(1.0 / rate, requests))
    prompts = generator.normal(*prompt, requests).round().clip(1).astype(int)
    outputs = generator.normal(*output, requests).round().clip(1).astype(int)
    return [
        Arrival(float(s), int(p), int(o)) for s, p, o in zip(seconds, prompts, outputs, strict=True)
    ]


def replay(
    engine: Engine,
    trace: Sequence[Arrival],
    clock: Clock,
    prompt_of: Callable[[int, Arrival], list[int]],
    between: Callable[[bool], bool] = lambda idle: False,
) -> list[RequestTimes]:
    """Send a trace to an engine without requests and record when their tokens come.

    ``prompt_of(index, arrival)`` gives the tokens of a prompt. Outputs are greedy and exactly as
    long as the trace says. ``between(idle)`` is called between steps, and when there is nothing to
    do; it says whether it did something then, instead of which the next arrival is awaited.
    """
    times = [RequestTimes(arrival) for arrival in trace]
    upcoming = list(enumerate(trace))[::-1]
    start = clock()
    while upcoming or engine.scheduler.has_work:
        idle = not engine.has_work
        if not between(idle) and idle:
            clock.wait_until(start + upcoming[-1][1].seconds)
        while upcoming and start + upcoming[-1][1].seconds <= clock():
            index, arrival = upcoming.pop()
            sampling = SamplingParameters(arrival.output_tokens, temperature=0.0, ignore_eos=True)
            engine.add(Request(str(index), prompt_of(index, arrival), sampling))
        for output in engine.step():
            seen = times[int(output.request_id)]
            seen.tokens.append(clock() - start)
            seen.token_ids.extend(output.delta.token_ids)
    return times


def times_between_tokens(times: Sequence[RequestTimes]) -> np.ndarray:
    """All gaps between consecutive tokens of the same stream, in seconds."""
    return np.concatenate([np.diff(seen.tokens) for seen in times])


def percentile(values: np.ndarray, percent: float) -> float:
    """A percentile as a plain number; 0 for no values."""
    return float(np.percentile(values, percent)) if len(values) else 0.0


def effective_throughput(
    times: Sequence[RequestTimes], prompt_rate: float, token_rate: float
) -> float:
    """Requests per second that met both targets: the effective throughput of FastGen.

    The first token must come within ``prompt_tokens / prompt_rate`` seconds, and the stream must
    never fall below ``token_rate`` tokens per second in its moving average.
    """
    met = sum(
        seen.first_token <= seen.arrival.prompt_tokens / prompt_rate
        and seen.slowest_speed >= token_rate
        for seen in times
    )
    return met / max(seen.tokens[-1] for seen in times)
