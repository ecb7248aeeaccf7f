"""Where the time of an engine step goes, and how far it is from what the machine could do."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from anabranch.serving.batch import StepPlan
from anabranch.serving.runner.fused import FusedRunner
from anabranch.serving.sequence import Request, Segment, Sequence

REPEATS = 5


@dataclass(frozen=True)
class StepShape:
    """``sequences`` segments of ``tokens`` tokens each, after ``past`` tokens in the cache."""

    sequences: int
    tokens: int
    past: int

    def __str__(self) -> str:
        kind = "decode" if self.tokens == 1 else "prefill"
        return f"{kind} {self.sequences} x {self.tokens} after {self.past}"


SHAPES = (StepShape(1, 1, 128), StepShape(16, 1, 256), StepShape(64, 1, 256), StepShape(1, 256, 0))


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches on its own: bytes and operations per second."""

    bandwidth: float
    operations: float

    @classmethod
    def measure(cls, weights: str) -> Ceilings:
        """Read a large buffer, multiply large matrices in the format of the weights."""
        buffer = torch.ones(2**26)
        floats = torch.randn(1024, 1024)
        integers = torch.randint(-9, 9, (1024, 1024), dtype=torch.int8)
        multiply = (
            partial(torch._int_mm, integers, integers.T)
            if weights == "int8"
            else partial(torch.mm, floats, floats)
        )
        return cls(
            bandwidth=buffer.nbytes / _fastest(buffer.sum),
            operations=2 * 1024**3 / _fastest(multiply),
        )


@dataclass(frozen=True)
class StepReport:
    """One shape's time, the least that it could take, and the share of each operation."""

    shape: StepShape
    seconds: float
    roofline_seconds: float
    shares: dict[str, float] = field(default_factory=dict)

    @property
    def of_roofline(self) -> float:
        """1 would be as fast as the machine's ceilings allow."""
        return self.roofline_seconds / self.seconds


def profile_steps(runner: FusedRunner, ceilings: Ceilings) -> Iterator[StepReport]:
    """Measure every shape, fastest of five runs; shares come from one further run."""
    deepest = max(shape.sequences * pages(shape, runner) for shape in SHAPES)
    runner.allocate(deepest)
    for shape in SHAPES:
        plan = plan_of(shape, runner)
        seconds = _fastest(partial(runner.execute, plan))
        with timed_operations(runner) as times:
            began = time.perf_counter()
            runner.execute(plan)
            whole = time.perf_counter() - began
        times["everything else"] = whole - sum(times.values())
        yield StepReport(
            shape,
            seconds,
            roofline_seconds(shape, runner, ceilings),
            {name: spent / whole for name, spent in times.items()},
        )


def roofline_seconds(shape: StepShape, runner: FusedRunner, ceilings: Ceilings) -> float:
    """The larger of the time to move the bytes and to do the operations of a step.

    Every weight is read once, the cache once for each sequence; a multiply-add counts two.
    """
    rows = shape.sequences * shape.tokens
    layers, head = runner.weight_elements
    context = shape.past + shape.tokens
    cached = runner.page_bytes / runner.page_size * shape.sequences * context
    element = 1 if runner.weights == "int8" else 2
    moved = (layers + head) * element + cached
    seen = shape.sequences * shape.tokens * (shape.past + (shape.tokens + 1) / 2)
    operations = 2 * (layers * rows + head * shape.sequences) + 4 * runner.attention_width * seen
    return max(moved / ceilings.bandwidth, operations / ceilings.operations)


def plan_of(shape: StepShape, runner: FusedRunner) -> StepPlan:
    """A step of that shape, each sequence on pages of its own."""
    segments = []
    depth = pages(shape, runner)
    for index in range(shape.sequences):
        tokens = [(31 * i + index) % runner.vocabulary for i in range(shape.past + shape.tokens)]
        sequence = Sequence(Request(str(index), tokens), 0, tokens, max_tokens=1)
        sequence.pages = list(range(index * depth, (index + 1) * depth))
        segments.append(Segment(sequence, shape.past, len(tokens)))
    return StepPlan(tuple(segments), runner.page_size)


def pages(shape: StepShape, runner: FusedRunner) -> int:
    """Pages of one sequence."""
    return -(-(shape.past + shape.tokens) // runner.page_size)


@contextmanager
def timed_operations(runner: FusedRunner) -> Iterator[dict[str, float]]:
    """Collect the seconds spent in each kernel while the context is open."""
    times: dict[str, float] = defaultdict(float)
    with runner.operations_replaced(lambda name, run: _timed(name, run, times)):
        yield times


def _timed(name: str, run: Callable[..., Any], times: dict[str, float]) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        result = run(*arguments)
        times[name] += time.perf_counter() - began
        return result

    return timed


def _fastest(run: Callable[[], Any]) -> float:
    run()
    spent = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        run()
        spent.append(time.perf_counter() - began)
    return min(spent)
