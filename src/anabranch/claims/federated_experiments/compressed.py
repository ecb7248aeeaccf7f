"""SCALLION and SCAFCOM against themselves uncompressed, and against compressed FedAvg."""

from __future__ import annotations

import statistics

from anabranch.claims.base import Measurement
from anabranch.claims.federated_experiments import non_iid
from anabranch.evaluation.testbeds import digits
from anabranch.federated import splits
from anabranch.federated.codecs import Chain, Codec, Identity, Quantise, TopK
from anabranch.federated.scheduling import Uniform
from anabranch.federated.strategies import FedAvg, Strategy
from anabranch.federated.strategies.scallion import Scafcom, Scallion
from anabranch.models.progress import Progress

CLIENTS, SAMPLED = 100, 10
ROUNDS, STEPS, BATCH, RATE = 100, 10, 16, 0.2
SEEDS = 3
FEWER = 16
WITHIN = 0.01


def measure(seed: int, progress: Progress) -> Measurement:
    """Four runs on three splits."""
    methods: dict[str, Strategy] = {
        "scafcom": Scafcom(codec=Identity()),
        "scafcom, 5 % of 8 bits": Scafcom(codec=small()),
        "scallion": Scallion(codec=Identity()),
        "scallion, 2 bits": Scallion(bits=2),
    }
    local = digits.local(lr=RATE, batch=BATCH, steps=STEPS)
    labels = digits.images()[0].labels.tolist()
    found: dict[str, list[non_iid.Outcome]] = {name: [] for name in methods}
    baseline = []
    for number in range(SEEDS):
        sites = digits.sites(splits.shards(labels, CLIENTS, 2, seed=seed + number))
        for index, (name, strategy) in enumerate(methods.items()):
            done = number * (1 + len(methods)) + index
            progress(f"{name}, split {number + 1}", done / (SEEDS * (1 + len(methods))))
            found[name].append(
                non_iid.run(strategy, local, sites, ROUNDS, seed + number, Uniform(SAMPLED))
            )
        baseline.append(
            non_iid.run(
                FedAvg(weighting="uniform"),
                local,
                sites,
                ROUNDS,
                seed + number,
                Uniform(SAMPLED),
                codec=small(),
            )
        )
    found["fedavg, 5 % of 8 bits"] = baseline

    accuracy = {n: statistics.mean(o.final for o in os) for n, os in found.items()}
    uplink = {n: statistics.mean(o.uplink for o in os) for n, os in found.items()}
    lost = accuracy["scafcom"] - accuracy["scafcom, 5 % of 8 bits"]
    fewer = uplink["scafcom"] / uplink["scafcom, 5 % of 8 bits"]
    return Measurement(
        figures={
            "accuracy": {n: round(x, 4) for n, x in accuracy.items()},
            "accuracy_by_split": {n: [round(o.final, 3) for o in os] for n, os in found.items()},
            "bytes_a_client_sends_a_round": {
                n: round(x / (ROUNDS * SAMPLED)) for n, x in uplink.items()
            },
            "scafcom_accuracy_lost": round(lost, 4),
            "scafcom_times_fewer_bytes": round(fewer, 1),
            "scallion_accuracy_lost": round(accuracy["scallion"] - accuracy["scallion, 2 bits"], 4),
            "scallion_times_fewer_bytes": round(uplink["scallion"] / uplink["scallion, 2 bits"], 1),
        },
        holds=lost <= WITHIN
        and fewer >= FEWER
        and accuracy["scafcom, 5 % of 8 bits"] > accuracy["fedavg, 5 % of 8 bits"],
        seeds=tuple(range(seed, seed + SEEDS)),
        note=f"{CLIENTS} clients of two label shards, {SAMPLED} a round, {ROUNDS} rounds of "
        f"{STEPS} steps; accuracy is the mean of the last ten versions. Bytes are those of encoded "
        "payloads, headers, positions and scales included. FedAvg has the same codec without error "
        "feedback.",
    )


def small() -> Codec:
    """5 % of the values with 8 bits and their places."""
    return Chain([TopK(0.05), Quantise(8)])
