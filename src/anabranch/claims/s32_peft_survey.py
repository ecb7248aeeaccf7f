"""S32, PEFT survey: every family of the taxonomy adapts a base, and forgets less than full tuning.

A tiny Llama that knows one synthetic language learns another by twelve methods of five leaves, each
with 2 % of the weights, and by full fine-tuning.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from anabranch.claims.base import Claim, Measurement
from anabranch.evaluation.adapter_comparison import FULL, Comparison, Row, compare
from anabranch.evaluation.languages import adaptation_problem
from anabranch.models.progress import Progress

LORA_FAMILY = ("lora", "dora", "delora", "loha", "lora_sb")
ADAPTERS = ("parallel", "houlsby")
SOFT_PROMPTS = ("prefix_tuning", "prompt_tuning")
SELECTIVE = ("shira", "pafi", "fishmask")
METHODS = (*LORA_FAMILY, *ADAPTERS, *SOFT_PROMPTS, *SELECTIVE)
SHARE = 0.02
SEEDS = 3
STEPS = 80
BATCH = 8
LENGTH = 32
PRETRAINING = 400


class PEFTSurvey(Claim):
    """Twelve methods at two per cent of the weights against full fine-tuning."""

    id = "S32"
    name = "peft-survey"
    system = "PEFT survey (taxonomy)"
    paper = (
        "no single method wins; LoRA-like ones lead in practice; in PEFT's run LoRA 47.8, full "
        "47.2, prefix tuning 18.6-41.6 % on GSM8K"
    )
    baseline = "full fine-tuning from the same base on the same items"
    method = "12 methods of five leaves with 2 % (within a fifth) of the weights"
    threshold = (
        "each closes >= 30 % of full fine-tuning's gap; median of the LoRA family >= of the soft "
        "prompts; forgetting of low-rank and selective ones <= of full; base intact to the last bit"
    )

    def measure(self, seed: int, progress: Progress) -> Measurement:
        """One base; full fine-tuning and every method with three seeds."""
        progress("pretraining the base", 0.0)
        base, problem = adaptation_problem(
            pretraining=PRETRAINING, steps=STEPS, batch=BATCH, length=LENGTH, seed=seed
        )
        total = sum(p.numel() for p in base.parameters())
        seeds = tuple(range(seed, seed + SEEDS))
        result = compare(
            [FULL, *METHODS], base, problem, round(SHARE * total), seeds, progress, brief=True
        )
        return verdict(result, seeds, total)


def verdict(result: Comparison, seeds: tuple[int, ...], total: int) -> Measurement:
    """The four checks on finished runs; ``total`` is the weights of the base."""

    def mean(method: str, figure: str) -> float:
        return statistics.fmean(getattr(row, figure) for row in result.rows if row.method == method)

    gap = {name: mean(name, "gap_closed") for name in METHODS if name not in result.refused}
    forgetting = {name: mean(name, "forgetting") for name in (FULL, *gap)}
    kept = [name for name in (*LORA_FAMILY, *SELECTIVE) if name in gap]
    families = {
        "lora_family": _median(gap, LORA_FAMILY),
        "soft_prompts": _median(gap, SOFT_PROMPTS),
        "adapters": _median(gap, ADAPTERS),
        "selective": _median(gap, SELECTIVE),
    }
    checks = {
        "every_method_closes_30_percent": len(gap) == len(METHODS) and min(gap.values()) >= 0.3,
        "lora_family_at_least_soft_prompts": families["lora_family"] >= families["soft_prompts"],
        "low_rank_and_selective_forget_no_more_than_full": statistics.fmean(
            forgetting[name] for name in kept
        )
        <= forgetting[FULL],
        "base_intact_to_the_last_bit": all(row.base_intact for row in result.rows),
    }
    return Measurement(
        figures={
            **checks,
            "gap_closed_median": {name: round(value, 3) for name, value in families.items()},
            "gap_closed": {name: round(value, 3) for name, value in gap.items()},
            "forgetting_nats": {name: round(value, 3) for name, value in forgetting.items()},
            "nll": {name: round(mean(name, "nll"), 3) for name in (FULL, *gap)},
            "base_nll": round(mean(FULL, "base_nll"), 3),
            "trained_weights": {name: _trained(result.rows, name) for name in gap},
            "base_weights": total,
            "stored_bytes": {
                name: next(r.saved_bytes for r in result.rows if r.method == name)
                for name in (FULL, *gap)
            },
            "step_time_over_full": {
                name: round(mean(name, "step_seconds") / mean(FULL, "step_seconds"), 2)
                for name in gap
            },
            "refused": result.refused,
            "steps": STEPS,
        },
        holds=all(checks.values()),
        seeds=seeds,
        note=f"{STEPS} steps of {BATCH} x {LENGTH} bytes; one learning rate for each "
        "leaf of the taxonomy, chosen once on seed 0.",
    )


def _median(gap: dict[str, float], family: Sequence[str]) -> float:
    return statistics.median(gap[name] for name in family if name in gap)


def _trained(rows: Sequence[Row], name: str) -> int:
    return next(row.trainable for row in rows if row.method == name)
