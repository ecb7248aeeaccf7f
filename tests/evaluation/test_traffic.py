"""Replay on virtual time against times worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from anabranch.evaluation import (
    Arrival,
    RequestTimes,
    effective_throughput,
    percentile,
    poisson_trace,
    replay,
    times_between_tokens,
)
from anabranch.planning import CostModel
from anabranch.serving import Engine, EngineOptions
from anabranch.serving.simulation import SimulatedRunner, VirtualClock


def run(trace: list[Arrival], policy: str, budget: int) -> list[RequestTimes]:
    clock = VirtualClock()
    runner = SimulatedRunner(CostModel(fixed=1.0, per_token=0.1), clock)
    options = EngineOptions(policy=policy, token_budget=budget, kv_memory=4096, speculation="off")
    engine = Engine(runner, options=options, clock=clock)
    return replay(engine, trace, clock, lambda _, arrival: [0] * arrival.prompt_tokens)


def test_times_are_those_of_the_steps() -> None:
    # A prefills 10 tokens (2 s), decodes once with B's prefill of 9 (2 s), then once alone (1.1 s).
    trace = [Arrival(0.0, 10, 3), Arrival(1.0, 9, 1)]
    first, second = run(trace, "splitfuse", 10)
    assert first.tokens == pytest.approx([2.0, 4.0, 5.1])
    assert second.tokens == pytest.approx([4.0])
    assert second.first_token == pytest.approx(3.0)


def test_prefill_first_stalls_the_stream() -> None:
    trace = [Arrival(0.0, 10, 3), Arrival(1.0, 9, 1)]
    first, second = run(trace, "prefill_first", 10)
    assert second.tokens == pytest.approx([3.9])
    assert first.tokens == pytest.approx([2.0, 5.0, 6.1])


def test_an_idle_engine_waits_for_the_next_arrival() -> None:
    times = run([Arrival(0.0, 1, 1), Arrival(50.0, 1, 1)], "splitfuse", 10)
    assert times[1].tokens == pytest.approx([51.1])


def test_effective_throughput_counts_requests_that_met_both_targets() -> None:
    fast = RequestTimes(Arrival(0.0, 10, 3), [1.0, 1.5, 2.0])
    late = RequestTimes(Arrival(0.0, 10, 3), [3.0, 3.5, 4.0])
    slow = RequestTimes(Arrival(0.0, 10, 3), [1.0, 3.0, 5.0])
    one = RequestTimes(Arrival(4.0, 10, 1), [5.0])
    times = [fast, late, slow, one]
    assert effective_throughput(times, prompt_rate=5.0, token_rate=1.0) == pytest.approx(2 / 5)
    assert effective_throughput(times, prompt_rate=1.0, token_rate=0.1) == pytest.approx(4 / 5)
    assert slow.slowest_speed == pytest.approx(0.5)
    assert sorted(times_between_tokens(times)) == pytest.approx([0.5] * 4 + [2.0] * 2)
    assert percentile(np.array([]), 95) == 0.0


def test_poisson_trace_has_the_rate_and_lengths_asked_for() -> None:
    trace = poisson_trace(1, 4000, rate=5.0, prompt=(300.0, 90.0), output=(24.0, 7.0))
    assert trace == poisson_trace(1, 4000, rate=5.0, prompt=(300.0, 90.0), output=(24.0, 7.0))
    assert 4000 / trace[-1].seconds == pytest.approx(5.0, rel=0.1)
    assert np.mean([a.prompt_tokens for a in trace]) == pytest.approx(300, rel=0.02)
    assert min(a.output_tokens for a in trace) >= 1
