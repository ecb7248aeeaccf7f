"""Results of MaskBench as one object: figures for programs, tables for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np

from anabranch.evaluation.structured_output.maskbench import CaseResult, Outcome

PERCENTILES = (25, 50, 75, 90, 95, 99, 99.9)


@dataclass(frozen=True)
class Summary:
    """One back-end over one group of schemas. Times in seconds by percentile."""

    backend: str
    group: str
    schemas: int
    outcomes: dict[str, int]
    instances: int
    disputed: int
    drawn: int
    compile_seconds: dict[str, float]
    first_mask_seconds: dict[str, float]
    mask_seconds: dict[str, float]

    @property
    def accepted(self) -> int:
        """Schemas that the back-end says it honours."""
        return sum(self.outcomes[name] for name in _ACCEPTED)

    @property
    def declared(self) -> float:
        """Declared coverage."""
        return self.accepted / self.schemas if self.schemas else 0.0

    @property
    def sound(self) -> bool:
        """No accepted schema let an invalid answer through."""
        return self.outcomes["under-constrained"] == 0


_ACCEPTED = ("passed", "over-constrained", "under-constrained")


@dataclass(frozen=True)
class Report:
    """All results of a run."""

    results: tuple[CaseResult, ...]

    def summaries(self, by: str = "backend") -> list[Summary]:
        """One for each back-end, or for each back-end and ``dataset`` or ``category``."""
        groups: dict[tuple[str, str], list[CaseResult]] = {}
        for result in self.results:
            group = "all" if by == "backend" else str(getattr(result, by))
            groups.setdefault((result.backend, group), []).append(result)
        return [_summary(*key, results) for key, results in groups.items()]

    def failures(self, outcome: Outcome) -> list[CaseResult]:
        """Cases with one outcome."""
        return [result for result in self.results if result.outcome == outcome]

    def refused_keywords(self, backend: str) -> Counter[str]:
        """Why schemas were refused, by keyword; by the message where none is named."""
        return Counter(
            result.keyword or result.reason[:60]
            for result in self.results
            if result.backend == backend and result.outcome == "refused"
        )

    def common(self) -> Report:
        """Only the schemas that every back-end accepted, which is what times are compared on."""
        backends = {result.backend for result in self.results}
        accepted = Counter(r.name for r in self.results if r.outcome in _ACCEPTED)
        return Report(tuple(r for r in self.results if accepted[r.name] == len(backends)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "summaries": [
                asdict(summary) | {"declared": summary.declared}
                for by in ("backend", "dataset")
                for summary in self.summaries(by)
            ],
            "results": [
                {key: value for key, value in asdict(result).items() if key != "mask_seconds"}
                for result in self.results
            ],
        }

    def markdown(self, by: str = "dataset") -> str:
        """A table of one row a group."""
        lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        lines += ["| " + " | ".join(cells(each)) + " |" for each in self.summaries(by)]
        return "\n".join(lines) + "\n"


COLUMNS = (
    "back-end", "schemas", "count", "declared", "passed", "over", "under", "timeout", "crash",
    "compile p50/p95 ms", "first mask p50 ms", "mask p50/p99 µs",
)  # fmt: skip


def cells(summary: Summary) -> list[str]:
    """A summary as texts, under :data:`COLUMNS`."""
    outcomes = summary.outcomes
    compiled, masks = summary.compile_seconds, summary.mask_seconds
    return [
        summary.backend,
        summary.group,
        str(summary.schemas),
        f"{summary.declared:.1%}",
        *(
            str(outcomes[name])
            for name in ("passed", "over-constrained", "under-constrained", "timeout", "crash")
        ),
        f"{compiled['p50'] * 1e3:.1f} / {compiled['p95'] * 1e3:.1f}" if compiled else "-",
        f"{summary.first_mask_seconds['p50'] * 1e3:.2f}" if compiled else "-",
        f"{masks['p50'] * 1e6:.0f} / {masks['p99'] * 1e6:.0f}" if masks else "-",
    ]


def _summary(backend: str, group: str, results: Sequence[CaseResult]) -> Summary:
    outcomes = Counter(result.outcome for result in results)
    return Summary(
        backend,
        group,
        len(results),
        {name: outcomes[name] for name in get_args(Outcome)},
        sum(result.instances for result in results),
        sum(result.disputed for result in results),
        sum(result.drawn for result in results),
        _percentiles([r.compile_seconds for r in results if r.compile_seconds is not None]),
        _percentiles([r.first_mask_seconds for r in results if r.first_mask_seconds is not None]),
        _percentiles([seconds for result in results for seconds in result.mask_seconds]),
    )


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    """Empty where nothing was measured."""
    if not values:
        return {}
    found = np.percentile(values, PERCENTILES)
    return {f"p{p:g}": float(v) for p, v in zip(PERCENTILES, found, strict=True)}
