"""Ferret: held-out loss by round beside FedAvg and FedKSeed, and bytes."""

from __future__ import annotations

import statistics
from typing import Any

from anabranch.claims.base import Measurement
from anabranch.claims.federated_experiments import seeded
from anabranch.evaluation.plotting import Plot
from anabranch.federated.strategies import FedAvg
from anabranch.federated.strategies.fedkseed import FedKSeed
from anabranch.federated.strategies.ferret import Ferret
from anabranch.models.progress import Progress

ROUNDS, SEEDS, K = 15, 2, 32
GRADIENT_STEPS: dict[str, Any] = {"optimizer": "sgd", "lr": 0.05, "steps": 10}


def measure(seed: int, progress: Progress) -> Measurement:
    """Losses over the seeds, then bytes of one round."""
    curves: dict[str, list[list[float]]] = {"ferret": [], "fedavg": [], "fedkseed": []}
    up: dict[str, int] = {}
    down: dict[str, int] = {}
    for repeat in range(SEEDS):
        for name, strategy, local in (
            ("ferret", Ferret(K), GRADIENT_STEPS),
            ("fedavg", FedAvg(), GRADIENT_STEPS),
            ("fedkseed", FedKSeed(1024, 1e-3), {"steps": 20}),
        ):
            progress(f"{name}, seed {seed + repeat}", 0.8 * repeat / SEEDS)
            outcome = seeded.run(strategy, seed + repeat, ROUNDS, watched=True, **local)
            curves[name].append([figures["held_out"] for figures in outcome.result.history])
            messages = seeded.CLIENTS * ROUNDS
            up[name] = outcome.bytes("up") // messages
            down[name] = outcome.bytes("down") // messages
    progress("SmolLM2-135M", 0.8)
    one_step: dict[str, Any] = {**GRADIENT_STEPS, "lr": 1e-4, "steps": 1}
    language = {
        name: seeded.on_language_model(strategy, **one_step).bytes("up")
        for name, strategy in (("ferret", Ferret(K)), ("fedavg", FedAvg()))
    }

    mean = {
        name: [statistics.fmean(losses) for losses in zip(*runs, strict=True)]
        for name, runs in curves.items()
    }
    final = {name: losses[-1] for name, losses in mean.items()}
    reached = next(
        (i + 1 for i, loss in enumerate(mean["ferret"]) if loss <= final["fedkseed"]), None
    )
    times = language["fedavg"] / language["ferret"]
    checks = {
        "within_15_percent_of_fedavg": final["ferret"] <= 1.15 * final["fedavg"],
        "at_most_a_200th_of_the_upload": 200 * up["ferret"] <= up["fedavg"],
        "fedkseeds_loss_in_half_the_rounds": reached is not None and reached <= ROUNDS // 2,
        "90_times_fewer_upload_bytes_on_smollm2": times >= 90,
    }
    return Measurement(
        figures={
            **checks,
            "held_out_loss": {name: round(loss, 3) for name, loss in final.items()},
            "by_seed": {n: [round(r[-1], 3) for r in runs] for n, runs in curves.items()},
            "rounds_to_fedkseeds_loss": reached,
            "bytes_up_per_client_and_round": up,
            "bytes_down_per_client_and_round": down,
            "smollm2_bytes_up": language,
            "smollm2_times_fewer": round(times),
        },
        holds=all(checks.values()),
        seeds=tuple(range(seed, seed + SEEDS)),
        note="SmolLM2-135M takes one local step with all weights trained, and only bytes are read. "
        "Bytes down of Ferret are the inner products of all clients.",
        plots=(
            Plot(
                "Held-out loss",
                "round",
                "loss, nats",
                {
                    name: [(i + 1, round(loss, 4)) for i, loss in enumerate(losses)]
                    for name, losses in mean.items()
                },
            ),
        ),
    )
