"""S90, the guide to fine-tuning: half fine-tuning forgets less, DPO learns a preference, and a run
that is killed ends with the same weights.

All three go through the shared trainer. Languages and pairs are generated, so that no data set
decides the verdict.
"""

from __future__ import annotations

import copy
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from anabranch import adapters, models
from anabranch.claims.base import Claim, Measurement
from anabranch.models.progress import Progress, silent, within
from anabranch.training.data.generators import generate
from anabranch.training.evaluation import score_answers
from anabranch.training.example import Example, Item
from anabranch.training.half import HalfFineTuning
from anabranch.training.language import LanguageObjective
from anabranch.training.losses import Loss
from anabranch.training.losses.causal import Causal
from anabranch.training.losses.preference import DPO
from anabranch.training.metrics_log import read_metrics
from anabranch.training.options import TrainOptions, parse_options
from anabranch.training.tasks.preference import Preference
from anabranch.training.template import Template
from anabranch.training.trainer import Trainer

SEEDS = 3
LETTERS = 26
SPACE = LETTERS
ROW = 32
"""Characters of a row of generated language."""
PRETRAIN_STEPS, TUNE_STEPS, BATCH = 200, 200, 8
HALF_EVERY = 10
"""Steps of one round of half fine-tuning."""

PAIRS, HELD_OUT_PAIRS = 300, 20
DPO_STEPS, DPO_BATCH = 40, 2

CRASH_STEPS, KILLS = 60, 3


class FineTuningGuide(Claim):
    """Half fine-tuning against full, DPO against SFT on the chosen answers, and a crash test."""

    id = "S90"
    name = "fine-tuning-guide"
    system = "Ultimate Guide to Fine-Tuning (HFT, DPO, resumable training)"
    paper = "no figures of its own; cites HFT (half the weights, less forgetting) and DPO"
    baseline = "full fine-tuning; SFT on the chosen answers; the run that nobody killed"
    method = "HFT, another half of each block every 10 steps; DPO; resume after kill -9"
    threshold = (
        "HFT closes >= 0.9 of full's gap on B and forgets <= 0.8 of it on A; DPO ranks >= 80 % of "
        "held-out pairs right and its margin exceeds SFT's; weights equal after three kills"
    )

    def measure(self, seed: int, progress: Progress) -> Measurement:
        """Three parts, each on its own."""
        seeds = tuple(range(seed, seed + SEEDS))
        forgetting = [
            forget(s, within(progress, 0.4 * i / SEEDS, 0.4 * (i + 1) / SEEDS))
            for i, s in enumerate(seeds)
        ]
        closed = {m: mean([run[m]["b_gap_closed"] for run in forgetting]) for m in forgetting[0]}
        risen = {m: mean([run[m]["a_rise"] for run in forgetting]) for m in forgetting[0]}
        preference = prefer(seed, within(progress, 0.4, 0.85))
        equal, kills = crash(seed, within(progress, 0.85, 1.0))
        closure, forgotten = closed["hft"] / closed["full"], risen["hft"] / risen["full"]
        parts = {
            "hft": closure >= 0.9 and forgotten <= 0.8,
            "dpo": preference["dpo"]["reward_accuracy"] >= 0.8
            and preference["dpo"]["margin"] > preference["sft"]["margin"],
            "crash": equal,
        }
        return Measurement(
            figures={
                "hft_gap_closed_over_full": round(closure, 3),
                "hft_forgetting_over_full": round(forgotten, 3),
                "nats_per_letter_by_method": {
                    method: {
                        "gap_closed_on_b": round(closed[method], 4),
                        "rise_on_a": round(risen[method], 4),
                    }
                    for method in closed
                },
                "forgetting_ratio_by_seed": [
                    round(run["hft"]["a_rise"] / run["full"]["a_rise"], 3) for run in forgetting
                ],
                "preference": preference,
                "killed_after_steps": kills,
                "weights_equal_after_kills": equal,
                "parts_that_hold": parts,
            },
            holds=all(parts.values()),
            seeds=seeds,
            note=f"Part (a) pretrains for {PRETRAIN_STEPS} steps of batch {BATCH}. HFT learns B "
            "later than full fine-tuning: in trials with seeds 0 to 2 it had closed 0.89 of full's "
            "gap after 60 steps and 0.96 after 120. An untrained model ranks half of the pairs "
            "right by chance.",
        )


# (a) Half fine-tuning


def forget(seed: int, progress: Progress) -> dict[str, dict[str, float]]:
    """Learn language A, then B by each method: gap closed on B and rise on A, nats per letter."""
    language_a, language_b = Language(2 * seed), Language(2 * seed + 1)
    base = small_llama(seed)
    progress(f"seed {seed}: learning language A", 0.0)
    base.requires_grad_(True)
    train(base, language_a.rows(400, seed), Causal(), PRETRAIN_STEPS, BATCH, 3e-3, seed)
    tests = {"a": language_a.rows(48, seed + 1000), "b": language_b.rows(48, seed + 1000)}
    before = {name: nll(base, rows) for name, rows in tests.items()}
    rows = language_b.rows(400, seed)
    figures = {}
    for number, method in enumerate(("full", "hft", "lora")):
        progress(f"seed {seed}: learning language B by {method}", 0.4 + 0.2 * number)
        model: Any = copy.deepcopy(base)
        hooks = [HalfFineTuning(seed, every=HALF_EVERY)] if method == "hft" else []
        lr = 1e-3
        if method == "lora":
            model = adapters.build("lora", model, r=8, lora_alpha=16)
            lr = 5e-3
        train(model, rows, Causal(), TUNE_STEPS, BATCH, lr, seed, hooks=hooks)
        after = {name: nll(model, held_out) for name, held_out in tests.items()}
        figures[method] = {
            "b_gap_closed": before["b"] - after["b"],
            "a_rise": after["a"] - before["a"],
        }
    return figures


class Language:
    """Words of random letters in a random order of their own: a Markov chain over 40 words."""

    def __init__(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        lengths = generator.integers(2, 6, 40)
        self._words = [generator.integers(0, LETTERS, n).tolist() for n in lengths]
        self._next = generator.dirichlet(np.full(40, 0.1), 40)

    def rows(self, count: int, seed: int) -> list[Item]:
        """Rows of ``ROW`` letters, all but the first trained on."""
        generator = np.random.default_rng(seed)
        letters: list[int] = []
        word = 0
        while len(letters) < count * ROW:
            word = int(generator.choice(40, p=self._next[word]))
            letters += [*self._words[word], SPACE]
        trained = [False] + [True] * (ROW - 1)
        return [(Example(letters[i * ROW : (i + 1) * ROW], trained),) for i in range(count)]


def small_llama(seed: int) -> Any:
    """Four layers of width 128 over letters, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=LETTERS + 1,
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


# (b) Preference training


def prefer(seed: int, progress: Progress) -> dict[str, dict[str, float]]:
    """DPO, and SFT on the chosen answers only: margins over the base on held-out pairs."""
    progress("loading the model", 0.0)
    base = models.load(models.DEFAULT, dtype="float32", device="cpu")
    items = preference_items(seed, Template("raw", base.tokenizer))
    held_out, items = items[:HELD_OUT_PAIRS], items[HELD_OUT_PAIRS:]
    reference, _ = score_answers(base.network, held_out)
    figures = {}
    sides: tuple[tuple[str, Loss, list[Item], float], ...] = (
        ("dpo", DPO(beta=0.1), items, 1e-4),
        ("sft", Causal(), [item[:1] for item in items], 1e-4),
    )
    for number, (name, loss, rows, lr) in enumerate(sides):
        progress(f"preference pairs: {name}", 0.1 + 0.5 * number)
        torch.manual_seed(seed)
        model = adapters.build("lora", base.network, r=8, lora_alpha=16)
        train(model, rows, loss, DPO_STEPS, DPO_BATCH, lr, seed)
        scores, _ = score_answers(model, held_out)
        figures[name] = margins(reference, scores)
        base.network.requires_grad_(False)
        model.unload()
    return figures


def preference_items(seed: int, template: Template) -> list[Item]:
    """Pairs that differ in a closing phrase."""
    task = Preference()
    rows = generate("preferences", seed, {"rows": PAIRS + HELD_OUT_PAIRS})
    return [tuple(template.example(text) for text in task.render(row)) for row in rows]


def margins(base: Sequence[Sequence[float]], tuned: Sequence[Sequence[float]]) -> dict[str, float]:
    """Mean of ``(lp_c - ref_c) - (lp_r - ref_r)`` in nats, and how often it is positive."""
    found = [(b[0] - t[0]) - (b[1] - t[1]) for b, t in zip(base, tuned, strict=True)]
    right = sum(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in found)
    return {"reward_accuracy": round(right / len(found), 3), "margin": round(mean(found), 3)}


# (c) Crash test


def crash(seed: int, progress: Progress) -> tuple[bool, list[int]]:
    """Kill a run three times, let it finish, and compare with one that nobody killed."""
    generator = np.random.default_rng(seed)
    with TemporaryDirectory() as name:
        folder = Path(name)
        progress("crash test: the undisturbed run", 0.0)
        tune_small(seed, folder / "whole")
        killed: list[int] = []
        for number in range(KILLS):
            last = killed[-1] if killed else 0
            step = int(generator.integers(last + 1, last + CRASH_STEPS // (KILLS + 1)))
            progress(f"crash test: kill -9 near step {step}", 0.25 * (number + 1))
            killed.append(run_and_kill(seed, folder / "killed", step))
        tune_small(seed, folder / "killed")
        whole, resumed = (torch.load(folder / run / "weights.pt") for run in ("whole", "killed"))
    equal = all(torch.equal(whole[key], resumed[key]) for key in whole)
    return equal and whole.keys() == resumed.keys(), killed


def tune_small(seed: int, folder: Path) -> None:
    """A run with dropout, accumulation and a checkpoint every five steps."""
    torch.set_num_threads(1)
    model = adapters.build("lora", small_llama(seed), r=8, lora_dropout=0.1)
    rows = Language(seed).rows(40, seed)
    train(model, rows, Causal(), CRASH_STEPS, 6, 1e-3, seed, folder, micro_batch_tokens=64)
    torch.save({k: p for k, p in model.state_dict().items() if "lora" in k}, folder / "weights.pt")


def run_and_kill(seed: int, folder: Path, step: int) -> int:
    """Start the run in another process and kill it once it has logged ``step``."""
    process = multiprocessing.get_context("spawn").Process(target=tune_small, args=(seed, folder))
    process.start()
    log = folder / "metrics.jsonl"
    reached = 0
    while process.is_alive() and reached < step:
        time.sleep(0.002)
        reached = max((entry["step"] for entry in read_metrics(log)), default=0)
    process.kill()
    process.join()
    return reached


# Common to all parts


def train(
    model: Any,
    items: list[Item],
    loss: Loss,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    output: Path | None = None,
    hooks: Sequence[Any] = (),
    micro_batch_tokens: int = 2048,
) -> None:
    """One run of the shared trainer."""
    options = parse_options(
        TrainOptions,
        {
            "steps": steps,
            "batch": batch,
            "lr": lr,
            "seed": seed,
            "micro_batch_tokens": micro_batch_tokens,
            "checkpoint": {"every": 5},
        },
    )
    objective = LanguageObjective.from_options(loss, options)
    Trainer(model, objective, options, items, output=output, progress=silent, hooks=hooks).fit()


def nll(model: Any, items: list[Item]) -> float:
    """Negative log-likelihood per letter, in nats."""
    sums, counts = score_answers(model, items)
    return sum(map(sum, sums)) / sum(map(sum, counts))


def mean(values: Sequence[float] | Mapping[Any, float]) -> float:
    """Arithmetic mean."""
    return float(np.mean(list(values)))
