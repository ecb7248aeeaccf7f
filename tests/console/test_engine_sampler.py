"""What the sampler makes of totals: rates, shares, and one sample for all who watch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from anabranch.api.metrics import Metrics
from anabranch.console.engine import HISTORY_SECONDS, EngineSampler, Sample
from anabranch.models.protocol import ModelStatistics, OutputDelta
from tests.api.conftest import EchoModel


class Counting(EchoModel):
    def __init__(self) -> None:
        super().__init__("m")
        self.now = ModelStatistics()
        self.looks = 0

    def statistics(self) -> ModelStatistics:
        self.looks += 1
        return self.now


def sampler_of(model: Counting) -> tuple[EngineSampler, Metrics]:
    metrics = Metrics([model])
    return EngineSampler([model], metrics), metrics


def test_rates_and_shares_of_the_time_between_two_looks() -> None:
    model = Counting()
    sampler, metrics = sampler_of(model)
    sampler.sample(0.0, 1000.0)
    assert not sampler.history["m"]  # nothing to compare with yet
    model.now = replace(
        model.now, generated_tokens=80, prompt_tokens=100, cached_prompt_tokens=60,
        finetune_tokens=120, drafted_tokens=20, accepted_tokens=15, slo_steps=10, slo_met=9,
        running=3, waiting=1, cache_usage=0.5, finetune_jobs=1,
    )  # fmt: skip
    timer = metrics.timer("m", 0.0)
    timer.delta(0, OutputDelta(0, "x", (1,)))
    sampler.sample(2.0, 1002.0)
    sample = sampler.history["m"][-1]
    assert (sample.generated, sample.prompt, sample.trained) == (40, 50, 60)
    assert sample.trained_share == pytest.approx(120 / (40 + 80 + 120))
    assert (sample.cached_share, sample.accepted_share, sample.target_kept) == (0.6, 0.75, 0.9)
    assert (sample.running, sample.waiting, sample.cache_usage) == (3, 1, 0.5)
    assert sample.first_token_p50 is not None and sample.between_tokens_p50 is None
    assert sample.between_tokens_target is None
    model.time_between_tokens = 0.05
    sampler.sample(3.0, 1003.0)
    idle = sampler.history["m"][-1]
    assert idle.generated == 0 and idle.trained_share is None and idle.target_kept is None
    assert idle.between_tokens_target == 0.05


def test_percentiles_between_tokens() -> None:
    model = Counting()
    sampler, metrics = sampler_of(model)
    sampler.sample(0.0, 0.0)
    gaps = metrics.inter_token.labels("m")
    for gap in [0.004] * 90 + [0.04] * 8 + [0.4] * 2:
        gaps.observe(gap)
    sampler.sample(1.0, 1.0)
    sample = sampler.history["m"][-1]
    assert sample.between_tokens_p50 is not None and 0.002 < sample.between_tokens_p50 <= 0.005
    assert sample.between_tokens_p95 is not None and 0.03 < sample.between_tokens_p95 <= 0.05
    assert sample.between_tokens_p99 is not None and 0.25 < sample.between_tokens_p99 <= 0.5


def test_all_watchers_share_one_look_and_one_that_fails_harms_nobody() -> None:
    model = Counting()
    sampler, _ = sampler_of(model)
    seen: list[Sample] = []

    def broken(samples: object) -> None:
        raise RuntimeError

    sampler.watch(broken)
    unwatch = [sampler.watch(lambda samples: seen.append(samples["m"])) for _ in range(20)]
    sampler.sample(0.0, 0.0)
    sampler.sample(1.0, 1.0)
    assert len(seen) == 20 and model.looks == 2
    for each in unwatch:
        each()
        each()  # a second time does no harm
    sampler.sample(2.0, 2.0)
    assert len(seen) == 20


def test_history_is_bounded() -> None:
    sampler, _ = sampler_of(Counting())
    for second in range(int(HISTORY_SECONDS) + 50):
        sampler.sample(float(second), float(second))
    assert len(sampler.history["m"]) == HISTORY_SECONDS
