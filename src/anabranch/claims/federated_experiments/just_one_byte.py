"""Just One Byte: codes of one byte, of four, one machine, and one that joins late."""

from __future__ import annotations

import statistics
from dataclasses import replace

from anabranch.claims.base import Measurement
from anabranch.claims.federated_experiments import seeded
from anabranch.evaluation.testbeds import tinyops
from anabranch.federated import DeviceProfile
from anabranch.federated.strategies.one_byte import JustOneByte
from anabranch.models.progress import Progress

ITERATIONS, SAMPLES, RATE = 150, 2, 1e-3
SEEDS = 2
SHORT = 40
"""Iterations of the run that a fifth machine joins half-way."""


def measure(seed: int, progress: Progress) -> Measurement:
    """Held-out losses over the seeds, digests of the late joiner, then bytes."""
    before = tinyops.score(seeded.base())["loss"]
    byte, wide = JustOneByte(RATE), JustOneByte(RATE, codes="float32")
    losses: dict[str, list[float]] = {"one byte": [], "float32": [], "one machine": []}
    sent: set[int] = set()
    for repeat in range(SEEDS):
        for name, strategy, count in (
            ("one byte", byte, seeded.CLIENTS),
            ("float32", wide, seeded.CLIENTS),
            ("one machine", byte, 1),
        ):
            progress(f"{name}, seed {seed + repeat}", repeat / SEEDS)
            outcome = seeded.run(strategy, seed + repeat, ITERATIONS, count, steps=SAMPLES)
            losses[name].append(outcome.loss)
            if name == "one byte":
                ups = outcome.result.ledger.by("direction", "version")
                sent |= {t.payload for (way, _), t in ups.items() if way == "up"}
    progress("a fifth machine joins", 0.85)
    same, peers = _join(byte, seed)
    progress("SmolLM2-135M", 0.92)
    language = seeded.on_language_model(JustOneByte(1e-6), 1)

    ours, theirs, alone = (statistics.fmean(found) for found in losses.values())
    weights = sum(tensor.numel() for tensor in seeded.base().parameters())
    checks = {
        "one_byte_within_5_percent_of_float32": ours <= 1.05 * theirs,
        "eight_bytes_an_iteration": sent == {SAMPLES * seeded.CLIENTS},
        "one_byte_a_slope_on_smollm2": language.bytes("up") == 1,
        "four_machines_end_lower_than_one": ours < alone,
        "late_joiner_has_the_same_model": same and peers == seeded.CLIENTS + 1,
    }
    return Measurement(
        figures={
            **checks,
            "loss_before": round(before, 3),
            "loss_after": {name: [round(x, 3) for x in found] for name, found in losses.items()},
            "bytes_up_per_iteration": sorted(sent),
            "bytes_of_one_gradient": 4 * weights,
            "smollm2_bytes_up_per_slope": language.bytes("up"),
        },
        holds=all(checks.values()),
        seeds=tuple(range(seed, seed + SEEDS)),
        note="Bytes are payloads; envelopes of the messages come on top and are counted apart. "
        "On SmolLM2-135M one slope is taken with all weights trained, and only bytes are read. "
        f"The fifth machine joins at iteration {SHORT // 2} of {SHORT}. Measured before at a rate "
        "of 4e-3, too high for this network: losses fell to 4.4 in 14 iterations and rose again, "
        "to 5.40 and 5.23 with a byte, 4.85 and 4.70 with float32. 1e-3 was chosen on seed 100. "
        "Codes of float8_e4m3, run once beside this, ended at 3.68 and 3.04 on seeds 0 and 1.",
    )


def _join(strategy: JustOneByte, seed: int) -> tuple[bool, float]:
    """Whether nobody's model ever differed from the others', and the peers at the end."""
    places = [
        replace(site, profile=DeviceProfile(1.0)) for site in seeded.sites(seed, seeded.CLIENTS + 1)
    ]
    places[-1] = replace(places[-1], joins=SHORT // 2 * SAMPLES - 0.5)
    result = seeded.run(strategy, seed, SHORT, places=places, steps=SAMPLES).result
    return all("astray" not in figures for figures in result.history), result.metrics["peers"]
