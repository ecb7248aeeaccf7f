"""MaskBench over several back-ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from anabranch.evaluation.structured_output.cases import SchemaCase
from anabranch.evaluation.structured_output.default_tokenizer import default_tokenizer
from anabranch.evaluation.structured_output.isolation import run_isolated
from anabranch.evaluation.structured_output.maskbench import CaseResult
from anabranch.evaluation.structured_output.report import Report
from anabranch.models.progress import Progress, silent


def maskbench(
    cases: Sequence[SchemaCase],
    backends: Sequence[str] = ("llguidance", "xgrammar"),
    *,
    tokenizer: Callable[[], tuple[Any, int, tuple[int, ...]]] = default_tokenizer,
    timeout: float = 40.0,
    draws: int = 2,
    seed: int = 0,
    progress: Progress = silent,
) -> Report:
    """Every case through every back-end, each back-end in a process of its own.

    ``timeout`` is in seconds for compiling one schema; ``draws`` are random answers per schema.
    """
    results: list[CaseResult] = []
    for backend in backends:
        for result in run_isolated(
            cases, backend, tokenizer, timeout=timeout, draws=draws, seed=seed
        ):
            results.append(result)
            done = len(results) / (len(cases) * len(backends))
            progress(f"{backend}: {result.dataset}", done)
    return Report(tuple(results))
