"""S70, JSONSchemaBench: what is accepted as supported is honoured, at hardly any cost.

MaskBench over both back-ends on a sample of every data set and of the official test suite; then the
default model answers easy schemas on the engine, with and without their constraints.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import torch

from anabranch import models
from anabranch.claims.base import Claim, Measurement
from anabranch.evaluation.structured_output import coverage, load, maskbench, summarise
from anabranch.evaluation.structured_output.cases import SchemaCase, datasets
from anabranch.evaluation.structured_output.coverage import CoverageResult
from anabranch.evaluation.structured_output.generation import EngineGenerator
from anabranch.evaluation.structured_output.maskbench import CaseResult
from anabranch.evaluation.structured_output.report import Report
from anabranch.models.constraint import OutputConstraint
from anabranch.models.loading import LoadedModel
from anabranch.models.progress import Progress
from anabranch.models.protocol import SamplingParameters
from anabranch.serving import Request
from anabranch.serving.adjustment import Row, adjust
from anabranch.serving.sampling import draw
from anabranch.serving.sequence import Sequence as Choice

SCHEMAS_PER_SET = 96
"""Eleven sets: more than a thousand schemas."""
EVERY = {"llguidance": 1, "xgrammar": 8}
"""Of these schemas the slower back-end gets every eighth: it compiles for most of a second.
``anabranch structured masks`` runs them all."""
COMPILE_SECONDS = 5.0
ANSWERS = 40
MAX_TOKENS = 160
BATCH = 8
MASK_SHARE = 0.05
STEPS = 200
"""In which masks are timed."""
CALLS_PER_TOKEN = 0.85
EASY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 4},
        "note": {"type": "string"},
    },
    "required": ["name", "age", "tags", "note"],
    "additionalProperties": False,
}


class JsonSchemaBench(Claim):
    """Compliance of two constraint back-ends, and what masks cost on the engine."""

    id = "S70"
    name = "jsonschemabench"
    system = "JSONSchemaBench (constrained decoding)"
    paper = "frameworks differ twofold in coverage; constraints can speed generation up to 50 %"
    baseline = "the same engine without constraints; xgrammar as the other back-end"
    method = "llguidance on normalised schemas, refusing what is not honoured; forced text drafted"
    threshold = (
        "no accepted schema, of >= 1,000, lets an invalid answer through; all finished answers "
        "valid; masks <= 5 % of a step at batch 8; <= 0.85 model calls per token"
    )

    def measure(self, seed: int, progress: Progress) -> Measurement:
        """MaskBench in processes of its own, then the model."""
        cases = sample(seed)

        results: list[CaseResult] = []
        for number, (backend, every) in enumerate(EVERY.items()):

            def part(message: str, fraction: float | None, done: int = number) -> None:
                progress(message, 0.35 * (done + (fraction or 0.0)))

            found = maskbench(
                cases[::every],
                [backend],
                timeout=COMPILE_SECONDS,
                draws=1,
                seed=seed,
                progress=part,
            )
            results += found.results
        report = Report(tuple(results))
        progress("loading the model", 0.7)
        loaded = models.load(models.DEFAULT, dtype="float32", device="cpu")
        progress("answers with and without constraints", 0.72)
        easy = load(easy_sets(), ANSWERS, seed)
        batched = EngineGenerator(loaded, "llguidance", BATCH)
        constrained = coverage(easy, batched, True, MAX_TOKENS)
        free = coverage(easy, batched, False, MAX_TOKENS)
        progress("what masks cost", 0.9)
        overhead = mask_overhead(loaded, seed)
        progress("forced text", 0.95)
        calls = calls_per_token(loaded, easy[:12])

        with_constraint, without = summarise(constrained), summarise(free)
        sound = all(summary.sound for summary in report.summaries())
        figures = {
            "schemas": len(cases),
            **by_backend(report),
            "answers_constrained": figures_of(constrained),
            "answers_free": figures_of(free),
            "mask": overhead,
            "model_calls_per_token": calls,
        }
        return Measurement(
            figures=figures,
            holds=(
                sound
                and len(cases) >= 1000
                and with_constraint.compliance == 1.0
                and with_constraint.compliance > without.compliance
                and overhead["share_of_step"] <= MASK_SHARE
                and calls["with_forced_drafts"] <= CALLS_PER_TOKEN
            ),
            seeds=(seed,),
            note="Compliance counts answers that ended; the others ran into their limit of tokens, "
            "as a small model does in free text. The jsonschema library decides, formats included.",
        )


def sample(seed: int) -> list[SchemaCase]:
    """Schemas of every set, or generated ones where there is no data."""
    if datasets() == ["generated"]:
        return load(["generated"], 1000, seed)
    return load(None, SCHEMAS_PER_SET, seed)


def easy_sets() -> list[str]:
    """The sets whose schemas a small model can be asked to follow."""
    return ["glaive"] if "glaive" in datasets() else ["generated"]


def by_backend(report: Report) -> Mapping[str, Any]:
    """Coverage and times of each back-end, the latter on schemas that both accept."""
    shared = {summary.backend: summary for summary in report.common().summaries()}
    figures: dict[str, Any] = {}
    for summary in report.summaries():
        times = shared.get(summary.backend, summary)
        figures[summary.backend] = {
            "schemas": summary.schemas,
            "declared": round(summary.declared, 4),
            **{name.replace("-", "_"): count for name, count in summary.outcomes.items()},
            "answers_drawn": summary.drawn,
            "instances": summary.instances,
            "compile_ms_p50": round(times.compile_seconds.get("p50", 0.0) * 1e3, 2),
            "compile_ms_p95": round(times.compile_seconds.get("p95", 0.0) * 1e3, 2),
            "mask_us_p50": round(times.mask_seconds.get("p50", 0.0) * 1e6, 1),
            "mask_us_p99": round(times.mask_seconds.get("p99", 0.0) * 1e6, 1),
        }
        broken = [f"{r.name}: {r.reason}" for r in report.failures("under-constrained")]
        if broken:
            figures[summary.backend]["let_through"] = broken[:5]
    return figures


def figures_of(results: Sequence[CoverageResult]) -> dict[str, Any]:
    """Counts, and the compliance rate of answers that ended."""
    summary = summarise(results)
    counts = {k: v for k, v in asdict(summary).items() if not k.startswith(("seconds", "compile"))}
    counts.pop("first_token_seconds")
    return counts | {"compliance": round(summary.compliance, 4)}


def mask_overhead(loaded: LoadedModel, seed: int) -> dict[str, float]:
    """Seconds that eight rows' masks add to choosing tokens, beside a step without constraints.

    Steps compute one token a row: drafts would make them longer, and the share look smaller. Both
    are medians in one process, taken in turn, so that a busy machine slows both.
    """
    unconstrained = EngineGenerator(loaded, "llguidance", BATCH, speculation="off")
    engine, compiler = unconstrained.engine, unconstrained.compiler
    compiled = compiler.compile(OutputConstraint.json_schema(EASY))
    sampling = SamplingParameters(2 * STEPS, temperature=0.0, ignore_eos=True)
    for index in range(BATCH):
        prompt = list(range(100 + index, 300 + index))
        engine.add(Request(f"mask {index}", prompt, sampling))
    while engine.scheduler.num_running < BATCH or engine.statistics().waiting:
        engine.step()
    constraint = OutputConstraint.json_schema(EASY)
    greedy = SamplingParameters(temperature=0.0)
    request = Request("row", [1], replace(greedy, constraint=constraint), constraint=compiled)
    rows = [Row(Choice(request, i, [1], 400, constraint=compiled.start())) for i in range(BATCH)]
    plain = [Row(Choice(Request("row", [1], greedy), i, [1], 400)) for i in range(BATCH)]
    generator = torch.Generator().manual_seed(seed)
    steps, masked, unmasked = [], [], []
    for _ in range(STEPS):
        logits = torch.randn(BATCH, len(compiler.vocabulary), generator=generator)
        steps.append(timed(engine.step))
        unmasked.append(timed(lambda logits=logits: draw(adjust(logits, plain), plain)))
        masked.append(timed(lambda logits=logits: advance(draw(adjust(logits, rows), rows), rows)))
    for index in range(BATCH):
        engine.abort(f"mask {index}")
    added = median(masked) - median(unmasked)
    return {
        "ms_per_step": round(added * 1e3, 3),
        "step_ms": round(median(steps) * 1e3, 2),
        "share_of_step": round(added / median(steps), 4),
    }


def advance(tokens: Sequence[int], rows: Sequence[Row]) -> None:
    """Add a token to each row; an answer that is complete begins again."""
    for row, token in zip(rows, tokens, strict=True):
        choice = row.sequence
        assert choice.constraint is not None and choice.request.constraint is not None
        if not choice.constraint.accept(token):
            raise AssertionError(f"the mask allowed token {token}, and the state refused it")
        choice.constraint.forced()
        if choice.constraint.complete:
            choice.constraint = choice.request.constraint.start()


def timed(work: Any) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def calls_per_token(loaded: LoadedModel, cases: Sequence[SchemaCase]) -> dict[str, float]:
    """Engine steps per output token, one answer at a time, nothing drafted but forced text."""
    figures = {}
    for constrained, name in ((True, "with_forced_drafts"), (False, "without_constraint")):
        generator = EngineGenerator(loaded, "llguidance", 1, speculation="off", token_budget=2048)
        results = coverage(cases, generator, constrained, MAX_TOKENS)
        tokens = sum(result.answer.tokens for result in results)
        figures[name] = round(generator.engine.statistics().steps / max(tokens, 1), 3)
    return figures
