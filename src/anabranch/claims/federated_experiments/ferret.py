"""Ferret: held-out loss by round beside FedAvg and FedKSeed, and bytes."""

from __future__ import annotations

import statistics
from typing import Any

from anabranch.claims.base import Measurement
from anabranch.claims.federated_experiments import seeded
from anabranch.evaluation.plotting import Plot
from anabranch.evaluation.testbeds import tinyops
from anabranch.federated.strategies import FedAvg, Strategy
from anabranch.federated.strategies.fedkseed import FedKSeed
from anabranch.federated.strategies.ferret import Ferret
from anabranch.models.progress import Progress

ROUNDS, SEEDS, K, LARGER_K = 15, 2, 32, 128
STEPS = 10
FEDAVG, FERRET, LARGER = "fedavg", f"ferret, k = {K}", f"ferret, k = {LARGER_K}"
RATES = {FEDAVG: (0.05, 3.0), FERRET: (0.02, 1.0), LARGER: (0.02, 2.0)}
"""Local and server rate of each side."""


def measure(seed: int, progress: Progress) -> Measurement:
    """Losses over the seeds, then bytes of one round."""
    methods: dict[str, tuple[Strategy, dict[str, Any]]] = {
        FEDAVG: (FedAvg(server_lr=RATES[FEDAVG][1]), _sgd(RATES[FEDAVG][0])),
        "fedavg, server rate 1": (FedAvg(), _sgd(RATES[FEDAVG][0])),
        FERRET: (Ferret(K, RATES[FERRET][1]), _sgd(RATES[FERRET][0])),
        LARGER: (Ferret(LARGER_K, RATES[LARGER][1]), _sgd(RATES[LARGER][0])),
        "fedkseed": (FedKSeed(1024, 1e-3), {"steps": 20}),
    }
    curves: dict[str, list[list[float]]] = {name: [] for name in methods}
    up: dict[str, int] = {}
    down: dict[str, int] = {}
    for repeat in range(SEEDS):
        for name, (strategy, local) in methods.items():
            progress(f"{name}, seed {seed + repeat}", 0.8 * repeat / SEEDS)
            outcome = seeded.run(strategy, seed + repeat, ROUNDS, watched=True, **local)
            curves[name].append([figures["held_out"] for figures in outcome.result.history])
            messages = seeded.CLIENTS * ROUNDS
            up[name] = outcome.bytes("up") // messages
            down[name] = outcome.bytes("down") // messages
    progress("SmolLM2-135M", 0.8)
    language = {
        name: seeded.on_language_model(strategy, 1, optimizer="sgd", lr=1e-4).bytes("up")
        for name, strategy in ((FERRET, Ferret(K)), (FEDAVG, FedAvg()))
    }

    mean = {
        name: [statistics.fmean(losses) for losses in zip(*runs, strict=True)]
        for name, runs in curves.items()
    }
    final = {name: losses[-1] for name, losses in mean.items()}
    reached = next((i + 1 for i, x in enumerate(mean[FERRET]) if x <= final["fedkseed"]), None)
    times = language[FEDAVG] / language[FERRET]
    before = tinyops.score(seeded.base())["loss"]
    affordable = ROUNDS * up["fedkseed"] // up[FERRET]
    checks = {
        "within_15_percent_of_fedavg": final[FERRET] <= 1.15 * final[FEDAVG],
        "at_most_a_200th_of_the_upload": 200 * up[FERRET] <= up[FEDAVG],
        "fedkseeds_loss_in_half_the_rounds": reached is not None and reached <= ROUNDS // 2,
        "90_times_fewer_upload_bytes_on_smollm2": times >= 90,
    }
    return Measurement(
        figures={
            **checks,
            "loss_before": round(before, 3),
            "held_out_loss": {name: round(loss, 3) for name, loss in final.items()},
            "by_seed": {n: [round(r[-1], 3) for r in runs] for n, runs in curves.items()},
            "share_of_fedavgs_fall": {
                name: round((before - final[name]) / (before - final[FEDAVG]), 3)
                for name in (FERRET, LARGER)
            },
            "rounds_to_fedkseeds_loss": reached,
            "with_fedkseeds_bytes_up": {
                "rounds": affordable,
                "held_out_loss": round(mean[FERRET][affordable - 1] if affordable else before, 3),
            },
            "times_fewer_upload_bytes": {n: round(up[FEDAVG] / up[n]) for n in (FERRET, LARGER)},
            "bytes_up_per_client_and_round": up,
            "bytes_down_per_client_and_round": down,
            "smollm2_bytes_up": language,
            "smollm2_times_fewer": round(times),
        },
        holds=all(checks.values()),
        seeds=tuple(range(seed, seed + SEEDS)),
        note="Each side has the best on seed 100 of local rates 0.01, 0.02, 0.03, 0.05 and 0.1 and "
        "server rates 1, 2 and 3 (0.3 beside, for Ferret; rates beyond those at which a side got "
        "worse were left out). FedAvg gains from a server rate above 1 what Ferret cannot take: "
        "the squared error of a round's mean is about its square times weights over inner products "
        "over clients, 100 and 26 here. Measured before with 0.05 and server rate 1 on both sides: "
        "1.97 against 0.51. Linear decay (1.96 for 2.50; 0.90 for 0.52) and momentum 0.9 over a "
        "pool (2.50; 1.74) did not help on seed 100. k = 128 had 0.12 after 30 rounds of seed 0. "
        "SmolLM2-135M takes one local step with all weights trained, and only bytes are read. "
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


def _sgd(lr: float) -> dict[str, Any]:
    return {"optimizer": "sgd", "lr": lr, "steps": STEPS}
