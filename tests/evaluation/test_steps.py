"""The step profile: shapes are what they say, and shares add up."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from anabranch.cli import app
from anabranch.evaluation.steps import (
    SHAPES,
    Ceilings,
    StepShape,
    plan_of,
    profile_steps,
    roofline_seconds,
)
from anabranch.serving.runner.fused import FusedRunner
from tests.serving.test_fused_runner import rounded


@pytest.fixture(scope="module")
def runner() -> FusedRunner:
    return FusedRunner(rounded("LlamaConfig", {}), 1024)


def test_plans_have_the_shape_asked_for(runner: FusedRunner) -> None:
    plan = plan_of(StepShape(3, 5, 40), runner)
    assert plan.num_tokens == 15
    assert plan.num_context == 3 * 45
    used = [page for segment in plan.segments for page in segment.sequence.pages]
    assert len(used) == len(set(used)) == 6


def test_every_shape_is_measured_and_its_shares_add_up(runner: FusedRunner) -> None:
    before = vars(runner._ops).copy()
    reports = list(profile_steps(runner, Ceilings(bandwidth=1e9, operations=1e9)))
    assert [report.shape for report in reports] == list(SHAPES)
    for report in reports:
        assert report.seconds > 0
        assert sum(report.shares.values()) == pytest.approx(1.0)
        assert {"attention", "linear_bfloat16"} <= set(report.shares)
    assert vars(runner._ops) == before


def test_roofline_counts_bytes_and_operations(runner: FusedRunner) -> None:
    # hidden 128, 4 heads and 2 key heads of 32, MLP 192, vocabulary 96, two layers
    layer = 128 * (128 + 2 * 64) + 128 * 128 + 3 * 128 * 192
    assert runner.weight_elements == (2 * layer, 96 * 128)
    shape = StepShape(sequences=2, tokens=1, past=9)
    moved = (2 * layer + 96 * 128) * 2 + 2 * 10 * (2 * 2 * 2 * 32) * 4
    slow_memory = Ceilings(bandwidth=1.0, operations=1e30)
    assert roofline_seconds(shape, runner, slow_memory) == pytest.approx(moved)
    operations = 2 * 2 * (2 * layer + 96 * 128) + 4 * (2 * 4 * 32) * 2 * 10
    slow_compute = Ceilings(bandwidth=1e30, operations=1.0)
    assert roofline_seconds(shape, runner, slow_compute) == pytest.approx(operations)


def test_the_command_prints_json() -> None:
    ran = CliRunner().invoke(app, ["bench", "step", "--json", "--weights", "int8"])
    assert ran.exit_code == 0, ran.output
    report = json.loads(ran.stdout)
    assert len(report["steps"]) == len(SHAPES)
    assert report["bandwidth_bytes_per_second"] > 0
