"""Five modes on TinyOps with LoRA, offsite tuning of an eight-layer TinyOps, and real tasks."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from anabranch.claims.base import Measurement
from anabranch.claims.federated_experiments import adapters as shared
from anabranch.claims.federated_experiments import seeded
from anabranch.evaluation.testbeds import tinyops
from anabranch.federated import Sync
from anabranch.federated.compare import ModeResult, compare
from anabranch.federated.comparing import compare_job
from anabranch.federated.emulator import align, make_emulator, plug_in
from anabranch.federated.job import FederateJob
from anabranch.federated.local import LocalTraining
from anabranch.federated.personal import own_losses
from anabranch.federated.shared import lent
from anabranch.federated.strategies import FedAvg
from anabranch.federated.strategies.fedit import FedIT
from anabranch.federated.strategies.offsite import Offsite
from anabranch.models.progress import Progress
from anabranch.training.options import parse_options
from anabranch.training.trainer import Trainer

ROUNDS, SEEDS = 20, 3
LAYERS, WIDTH, LEFT, RIGHT, DROP = 8, 48, 2, 6, 0.5
OFFSITE_ROUNDS, OFFSITE_STEPS, ALIGNMENT = 8, 8, 150
OFFSITE_RATE, FULL_RATE = 4e-3, 2e-3
"""The best of four on seeds 10 to 12: by the emulator's own loss, and by the full model's."""
TASKS, QUESTIONS = ("arc-easy", "openbookqa"), 16


def measure(seed: int, progress: Progress) -> Measurement:
    """Tables of modes, then losses of emulator and full model, then real tasks."""
    tables = []
    share = 0.0
    for repeat in range(SEEDS):
        progress(f"modes, seed {seed + repeat}", 0.5 * repeat / SEEDS)
        model = shared.lora(seed + repeat)
        tables.append(_modes(model, seed + repeat, not repeat))
        whole = sum(p.numel() for p in tinyops.network().parameters())
        share = tables[-1]["federated"].trained / whole
    progress("offsite tuning", 0.5)
    offsite = _offsite(seed, progress)
    progress("SmolLM2-135M on real tasks", 0.8)
    tasks = _real_tasks(seed, progress)

    losses = {
        mode: [round(table[mode].figures["loss"], 3) for table in tables if mode in table]
        for mode in ("zero-shot", "local", "federated", "global", "personal")
    }
    plain, aligned = offsite["emulator"], offsite["aligned"]
    checks = {
        "federated_at_most_0.3_of_local": all(
            table["federated"].figures["loss"] <= 0.3 * table["local"].figures["loss"]
            for table in tables
        ),
        "message_at_most_a_fifth_of_the_model": share <= 0.2,
        "plugged_in_at_most_half_of_before": plain["plugged_in"] <= 0.5 * offsite["before"],
        "alignment_lowers_by_a_tenth": aligned["plugged_in"] <= 0.9 * plain["plugged_in"],
        "full_fine_tuning_not_worse": offsite["full"]
        <= min(plain["plugged_in"], aligned["plugged_in"]),
    }
    return Measurement(
        figures={
            **checks,
            "loss": losses,
            "share_of_the_model_in_a_message": round(share, 3),
            "bytes_of_a_run": tables[0]["federated"].bytes,
            "own_loss_federated_and_personal": [
                round(tables[0][mode].figures["loss/own"], 3) for mode in ("federated", "personal")
            ],
            "offsite_loss": offsite,
            "accuracy_of_smollm2": tasks,
        },
        holds=all(checks.values()),
        seeds=tuple(range(seed, seed + SEEDS)),
        note="Pooled, personal and offsite tuning with the first seed only; the eight-layer base "
        "is pretrained once and kept. Alignment is on the operations that the base knows. "
        "Offsite tuning and full fine-tuning had 1e-3, the prototype's rate, at first: plugged in "
        "4.00 of 7.95 without alignment and 2.41 with, full 1.45. Now each has the best of 1e-3, "
        "2e-3, 4e-3 and 8e-3 on seeds 10 to 12, which is 4e-3 by the emulator's own loss (1.65, "
        "1.30, 1.10, 1.22) and 2e-3 for full fine-tuning (1.37, 1.13, 1.22, 1.39). "
        + (
            f"Real tasks: {QUESTIONS} questions each by log-likelihood, so that the standard "
            "error is about 0.12; no verdict hangs on them. Losses of SmolLM2-135M are in S43."
            if tasks
            else "ANABRANCH_DATA is not set: no real tasks were asked."
        ),
    )


def _modes(model: Any, seed: int, first: bool) -> dict[Any, ModeResult]:
    training = LocalTraining(tinyops.objective(), tinyops.training_options())
    every: tuple[Any, ...] = ("zero-shot", "local", "federated", "global", "personal")
    trainer = Trainer(
        model, tinyops.objective(), tinyops.training_options(), tinyops.items(4, 1, "any", seed)
    )
    own = {f"client-{i}": tinyops.items(4 + i, 64, "own", seed, i) for i in range(seeded.CLIENTS)}
    return compare(
        FedIT(upload="weights"),
        model,
        training,
        seeded.sites(seed),
        Sync(ROUNDS),
        lambda: tinyops.score(model.eval()),
        rounds=ROUNDS,
        seed=seed,
        modes=every if first else every[:3],
        own=own_losses(trainer, own),
    )


def _real_tasks(seed: int, progress: Progress) -> dict[str, Any]:
    """Accuracies before and after three clients learn together, two rounds of a step each."""
    if not os.environ.get("ANABRANCH_DATA"):
        return {}
    job = parse_options(
        FederateJob,
        {
            "federate": "tasks",
            "recipe": {
                "recipe": "science",
                "seed": seed,
                "data": [
                    {
                        "source": "builtin:reasoning-mcq/arc_easy.train",
                        "limit": 120,
                        "split": {"train": 0.9, "valid": 0.1},
                    }
                ],
                "template": "raw",
                "adapter": {"method": "lora", "r": 8, "target_modules": ["q_proj", "v_proj"]},
                "train": {"steps": 1, "batch": 4, "lr": 1e-3, "schedule": "constant", "warmup": 0},
                "evaluate": [],
            },
            "clients": {"count": 3, "held_out": 0.0},
            "schedule": {"rounds": 2},
            "local": {"steps": 1},
            "seed": seed,
            "evaluations": [{"name": name, "limit": QUESTIONS, "seed": seed} for name in TASKS],
        },
    )
    with TemporaryDirectory() as folder:
        found = compare_job(job, Path(folder) / "modes", progress, ("zero-shot", "federated"))
    return {
        mode: {
            "loss": round(result.figures["loss"], 3),
            **{name: round(result.figures[f"task/{name}"], 3) for name in TASKS},
        }
        for mode, result in found.items()
    } | {"chance": {name: found["federated"].figures[f"task/{name}/chance"] for name in TASKS}}


def _offsite(seed: int, progress: Progress) -> dict[str, Any]:
    full = tinyops.pretrained(layers=LAYERS, width=WIDTH, progress=progress)
    objective = tinyops.objective()
    offsite, everywhere = (
        LocalTraining(objective, tinyops.training_options(lr=rate, steps=OFFSITE_STEPS))
        for rate in (OFFSITE_RATE, FULL_RATE)
    )
    places = seeded.sites(seed)
    found: dict[str, Any] = {"before": round(tinyops.score(full)["loss"], 3)}
    for name, steps in (("emulator", 0), ("aligned", ALIGNMENT)):
        emulator, plan = make_emulator(full, LEFT, RIGHT, DROP)
        if steps:
            known = [item for o in tinyops.KNOWN for item in tinyops.items(o, 1024, "align", seed)]
            options = tinyops.training_options(lr=1e-3, batch=32, steps=steps)
            align(full, emulator, plan, known, objective, options)
        federation = Offsite(upload="weights").simulate(
            emulator, offsite, places, rounds=OFFSITE_ROUNDS, seed=seed
        )
        result = federation.run()
        tensors = federation.server.tensors  # type: ignore[attr-defined]
        with lent(emulator, tensors):
            emulated = tinyops.score(emulator)["loss"]
        with lent(full, plug_in(full, tensors, plan)):
            plugged = tinyops.score(full)["loss"]
        found[name] = {
            "emulator": round(emulated, 3),
            "plugged_in": round(plugged, 3),
            "bytes_per_message": result.ledger.total().payload // result.ledger.total().messages,
        }
    everything = FedAvg(upload="weights").simulate(
        full.requires_grad_(True), everywhere, places, rounds=OFFSITE_ROUNDS, seed=seed
    )
    everything.run()
    with lent(full, everything.server.tensors):  # type: ignore[attr-defined]
        found["full"] = round(tinyops.score(full)["loss"], 3)
    return found
