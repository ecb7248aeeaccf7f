"""Fed-SB beside FedIT on TinyOps: loss and bytes, then what the noise of privacy costs each."""

from __future__ import annotations

from typing import Any

from anabranch import adapters
from anabranch.adapters import lora_sb
from anabranch.claims.base import Measurement
from anabranch.claims.federated_experiments import adapters as shared
from anabranch.claims.federated_experiments import seeded
from anabranch.evaluation.testbeds import tinyops
from anabranch.federated import Site
from anabranch.federated.local import LocalTraining
from anabranch.federated.strategies import Strategy
from anabranch.federated.strategies.fed_sb import FedSB
from anabranch.federated.strategies.fedit import FedIT
from anabranch.models.progress import Progress
from anabranch.training.privacy import Privacy

ROUNDS, SEEDS, RANK = 20, 3, 23
PRIVATE_ROUNDS, PRIVATE_SEEDS, PRIVATE_EXAMPLES = 6, 2, 512
NOISE, CLIP, DELTA, BATCH = 2.0, 0.5, 1e-4, 32
PUBLIC, FIRST_STEP = 12, 1e-3
OWN = ", first gradient private"
"""Fed-SB without public examples: the clients' first gradient is clipped and noised, too."""
RATES = {"fedit": 5e-3, "fed-sb": 2e-2}
PRIVATE_RATES = {"fedit": 1e-2, "fed-sb": 3e-2}


def measure(seed: int, progress: Progress) -> Measurement:
    """Losses and bytes over the seeds, then with and without noise."""
    losses: dict[str, list[float]] = {"fedit": [], "fed-sb": []}
    sent: dict[str, int] = {}
    init: dict[str, int] = {}
    errors = []
    for repeat in range(SEEDS):
        for name in losses:
            progress(f"{name}, seed {seed + repeat}", 0.5 * repeat / SEEDS)
            model, strategy, rounds = _method(name, seed + repeat)
            outcome = seeded.run(strategy, seed + repeat, rounds, model=model, lr=RATES[name])
            losses[name].append(outcome.loss)
            kinds = outcome.result.ledger.by("direction", "kind")
            trained = kinds["up", "train"]
            # Fed-SB's first task of a client has an empty reply, and goes on.
            sent[name] = trained.payload // (seeded.CLIENTS * ROUNDS - (name == "fed-sb") * 4)
            if name == "fed-sb":
                init = {
                    f"{kind}, {direction}": kinds[direction, kind].payload // seeded.CLIENTS
                    for direction, kind in (("up", "init"), ("down", "factors"))
                }
            else:
                errors.append(outcome.result.metrics["aggregation_error"])
    epsilon: dict[str, float] = {}
    private: dict[str, list[dict[str, float]]] = {"fedit": [], "fed-sb": []}
    for repeat in range(PRIVATE_SEEDS):
        for name, rows in private.items():
            progress(f"private {name}, seed {seed + repeat}", 0.5 + 0.5 * repeat / PRIVATE_SEEDS)
            without, _ = _private(name, seed + repeat, 0.0)
            noisy, epsilon[name] = _private(name, seed + repeat, NOISE)
            rows.append({"without": without, "with": noisy})

    progress("private first gradient", 0.95)
    own = {
        "without": _private("fed-sb" + OWN, seed, 0.0)[0],
        "with": _private("fed-sb" + OWN, seed, NOISE)[0],
    }

    added = {name: [row["with"] - row["without"] for row in rows] for name, rows in private.items()}
    checks = {
        "loss_at_most_fedits": all(
            ours <= theirs for ours, theirs in zip(losses["fed-sb"], losses["fedit"], strict=True)
        ),
        "at_most_40_percent_of_the_bytes": sent["fed-sb"] <= 0.4 * sent["fedit"],
        "noise_adds_at_most_60_percent": all(
            ours <= 0.6 * theirs
            for ours, theirs in zip(added["fed-sb"], added["fedit"], strict=True)
        ),
    }
    return Measurement(
        figures={
            **checks,
            "loss": {name: [round(x, 3) for x in found] for name, found in losses.items()},
            "bytes_up_per_client_and_round": sent,
            "share_of_fedits_bytes": round(sent["fed-sb"] / sent["fedit"], 3),
            "bytes_once_per_client": init,
            "fedits_aggregation_error_in_the_last_round": [round(error, 3) for error in errors],
            "private_loss": {
                name: [{k: round(v, 3) for k, v in row.items()} for row in rows]
                for name, rows in private.items()
            },
            "private_loss_of_fed-sb_without_public_examples": {
                k: round(v, 3) for k, v in own.items()
            },
            "epsilon": {name: round(spent, 2) for name, spent in epsilon.items()},
        },
        holds=all(checks.values()),
        seeds=tuple(range(seed, seed + SEEDS)),
        note="r = 23 has the share of LoRA's values that r = 24 had in the prototype, whose blocks "
        "have six linear modules and not seven. AdamW's rates 5e-3 and 2e-2 are the best of "
        "five and of four on seed 100; private ones 1e-2 and 3e-2. Private Fed-SB has its factors "
        "from 48 public examples, as in the prototype. Measured before with first gradients of 12 "
        "examples a client and a rate of 1e-2: 0.22, 0.20, 0.26; now all 128 are in them, which "
        "was chosen on seed 100 (0.40 with 12, 0.26 with 128). Seeds 0 to 2 are kind to Fed-SB: "
        "100 and 101 gave 0.25 and 0.32 against FedIT's 0.17 and 0.15, and 20 to 25, measured "
        "once, 0.30 on average (standard deviation 0.08) against 0.14 (0.03), higher on all six. "
        "On seed 100 FedIT was also ahead at other ranks with as many bytes (0.41 at r = 2 against "
        "0.95 at 11, 0.08 at 32 against 0.15 at 47), with a rate that falls to zero (0.06 against "
        "0.19) and with 4 rounds of 50 steps (1.59 against 1.79). Under noise, at each side's best "
        "rate of three for that (2e-2; r = 11 at 3e-2), FedIT had 2.66 and Fed-SB 2.75.",
    )


def _method(name: str, seed: int) -> tuple[Any, Strategy, int]:
    """Model, method and versions; the first of Fed-SB's makes the factors."""
    if name == "fedit":
        return shared.lora(seed), FedIT(upload="weights", compact=True), ROUNDS
    model = adapters.build("lora_sb", tinyops.pretrained(), r=RANK, target_modules="all-linear")
    return model, FedSB(compact=True), ROUNDS + 1


def _public(seed: int) -> tuple[Any, Strategy, int]:
    """Fed-SB with factors of 12 public examples of each operation, which cost no privacy."""
    model, _, _ = _method("fed-sb", seed)
    objective = tinyops.objective()
    objective.check(model)
    public = [
        item
        for i in range(seeded.CLIENTS)
        for item in tinyops.items(4 + i, PUBLIC, "public", seed, i)
    ]
    counts = objective.denominators(public)
    losses = [
        lambda batch=batch: objective.loss(model, batch, counts).loss
        for batch in objective.plan(public)
    ]
    lora_sb.initialise(model, lora_sb.estimate_gradients(model, losses), FIRST_STEP)
    return model, FedSB(init="public"), PRIVATE_ROUNDS


def _private(name: str, seed: int, noise: float) -> tuple[float, float]:
    """Held-out loss and the largest epsilon of a client."""
    if name == "fed-sb":
        model, strategy, rounds = _public(seed)
    else:
        model, strategy, _ = _method(name.removesuffix(OWN), seed)
        rounds = PRIVATE_ROUNDS + name.endswith(OWN)
    places = [
        Site(f"client-{i}", tinyops.items(4 + i, PRIVATE_EXAMPLES, "train", seed, i))
        for i in range(seeded.CLIENTS)
    ]
    training = LocalTraining(
        tinyops.objective(),
        tinyops.training_options(
            lr=PRIVATE_RATES[name.removesuffix(OWN)], batch=BATCH, optimizer="adamw"
        ),
        Privacy(DELTA, CLIP, noise=noise, seed=seed),
    )
    federation = strategy.simulate(model, training, places, rounds=rounds, seed=seed)
    result = federation.run()
    loss = shared.mean(shared.scores(model, federation.server.tensors))  # type: ignore[attr-defined]
    spent = [value for key, value in result.metrics.items() if key.startswith("epsilon/")]
    return loss, max(spent, default=float("inf"))
