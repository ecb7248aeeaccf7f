"""FedKSeed: pools of two sizes, Pro, and the bytes of a model 1,300 times as large."""

from __future__ import annotations

import statistics

from anabranch.claims.base import Measurement
from anabranch.claims.federated_experiments import seeded
from anabranch.evaluation.testbeds import tinyops
from anabranch.federated.strategies.fedkseed import FedKSeed, FedKSeedPro
from anabranch.models.progress import Progress

ROUNDS, STEPS, RATE = 15, 20, 1e-3
SEEDS = 3
SMALL, LARGE, PAPER = 1024, 2**16, 4096
PAPER_STEPS = 200
SHORT = 2
"""Steps taken on SmolLM2-135M; each is two passes and a hundred million random values."""


def measure(seed: int, progress: Progress) -> Measurement:
    """Held-out losses over the seeds, then bytes."""
    before = tinyops.score(seeded.base())["loss"]
    losses: dict[str, list[float]] = {"fedkseed": [], "large pool": [], "pro": []}
    strategies = {
        "fedkseed": FedKSeed(SMALL, RATE),
        "large pool": FedKSeed(LARGE, RATE),
        "pro": FedKSeedPro(SMALL, RATE),
    }
    sent = 0
    for repeat in range(SEEDS):
        for name, strategy in strategies.items():
            if name == "pro" and repeat:
                continue
            progress(f"{name}, seed {seed + repeat}", repeat / SEEDS)
            outcome = seeded.run(strategy, seed + repeat, ROUNDS, steps=STEPS)
            losses[name].append(outcome.loss)
            if name == "fedkseed":
                sent = _per_round(outcome, seeded.CLIENTS * ROUNDS)
    progress("a model twice as wide", 0.9)
    wide = seeded.run(strategies["fedkseed"], seed, 1, 1, tinyops.network(width=128), steps=STEPS)
    progress("SmolLM2-135M", 0.92)
    language = seeded.on_language_model(FedKSeed(PAPER, 1e-7), SHORT)
    down, up = language.bytes("down"), language.bytes("up") // SHORT * PAPER_STEPS

    ours, large = (statistics.fmean(losses[name]) for name in ("fedkseed", "large pool"))
    checks = {
        "falls_by_3_nats": all(before - loss >= 3.0 for loss in losses["fedkseed"]),
        "within_10_percent_of_the_large_pool": ours <= 1.1 * large,
        "pro_at_most_10_percent_worse": losses["pro"][0] <= 1.1 * losses["fedkseed"][0],
        "bytes_within_bound": sent <= 8 * STEPS + 4 * SMALL + 64,
        "bytes_do_not_depend_on_the_model": _per_round(wide, 1) == sent,
        "below_18_kb_on_smollm2": down + up < 18_000,
    }
    return Measurement(
        figures={
            **checks,
            "loss_before": round(before, 3),
            "loss_after": {name: [round(x, 3) for x in found] for name, found in losses.items()},
            "bytes_per_client_and_round": sent,
            "smollm2_bytes_per_client_and_round": {"down": down, f"up, {PAPER_STEPS} steps": up},
        },
        holds=all(checks.values()),
        seeds=tuple(range(seed, seed + SEEDS)),
        note=f"SmolLM2-135M takes {SHORT} steps, all weights trained; its bytes up are scaled to "
        f"{PAPER_STEPS}. What it learns is not measured. Pro runs with the first seed only. The "
        "large pool has 65,536 directions, of which the 1,200 steps hit few twice.",
    )


def _per_round(outcome: seeded.Outcome, messages: int) -> int:
    return (outcome.bytes("down") + outcome.bytes("up")) // messages
