"""The frame that every claim runs in, and S46's experiment on fixed step times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from anabranch import registry
from anabranch.claims import Claim, Measurement, find, run_claim
from anabranch.claims import s46_deepspeed_fastgen as s46
from anabranch.cli import app
from anabranch.errors import UnknownName
from anabranch.evaluation import poisson_trace
from anabranch.models.progress import Progress
from anabranch.planning import CostModel

COST = CostModel(fixed=0.033, per_token=0.0011, per_context=1.2e-5)
"""Step times of a two-core machine in float32."""


def measured(holds: bool) -> type[Claim]:
    """A claim class that is no plug-in: it has no name of its own."""

    def measure(self: Claim, seed: int, progress: Progress) -> Measurement:
        progress("measuring", 0.5)
        return Measurement({"ratio": 2.0, "parts": {"a": {"b": 1}}}, holds, (seed, seed + 1))

    fields = dict.fromkeys(("id", "system", "paper", "baseline", "method", "threshold"), "x")
    return type("Fake", (Claim,), fields | {"name": "", "measure": measure})


def test_every_claim_says_everything_before_it_runs() -> None:
    for claim in registry.available("claims").values():
        for field in ("id", "name", "system", "paper", "baseline", "method", "threshold"):
            assert getattr(claim, field), f"{claim.__name__} lacks {field}"
        assert registry.summary(claim)


def test_found_by_id_and_slug_in_any_case() -> None:
    assert find("s46") is find("DeepSpeed-FastGen") is s46.DeepSpeedFastGen
    with pytest.raises(UnknownName, match="S46 deepspeed-fastgen"):
        find("S93")


@pytest.mark.parametrize("holds", [True, False])
def test_a_result_can_be_repeated_from_what_it_records(holds: bool) -> None:
    result = run_claim(measured(holds)(), seed=4)
    assert result.verdict == ("holds" if holds else "falls short")
    assert result.seeds == (4, 5)
    assert result.versions["torch"]
    assert result.machine["cores"] >= 1
    assert json.loads(json.dumps(result.to_dict()))["figures"]["ratio"] == 2.0


@pytest.mark.parametrize(("holds", "status"), [(True, 0), (False, 1)])
def test_the_command_prints_json_and_its_status_is_the_verdict(
    holds: bool, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path))
    monkeypatch.setattr("anabranch.claims.find", lambda name: measured(holds))
    ran = CliRunner().invoke(app, ["claims", "run", "one", "two", "--json", "--seed", "3"])
    assert ran.exit_code == status
    objects: list[Any] = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [entry["seeds"] for entry in objects] == [[3, 4], [3, 4]]
    assert CliRunner().invoke(app, ["claims", "run", "one"]).exit_code == status
    assert CliRunner().invoke(app, ["claims", "run"]).exit_code == 2


def test_splitfuse_beats_prefill_first_on_fixed_step_times() -> None:
    """The verdict of S46 without the machine in it."""
    budget = COST.saturating_tokens(0.85)
    rate = s46.LOAD * s46.saturation(COST, budget)
    traces = [poisson_trace(s, s46.REQUESTS, rate, s46.PROMPT, s46.OUTPUT) for s in range(5)]
    method = s46.simulate(COST, "splitfuse", budget, traces)
    baselines = [s46.simulate(COST, "prefill_first", b, traces) for b in s46.BASELINE_BUDGETS]
    targets = s46.Targets(COST)
    assert s46.tail_gap(method) <= 0.65 * min(map(s46.tail_gap, baselines))
    best = max(map(targets.effective_throughput, baselines))
    assert targets.effective_throughput(method) >= 1.15 * best
