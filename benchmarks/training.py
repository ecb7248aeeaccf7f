"""Processor seconds per optimiser step: ours, Hugging Face's ``Trainer``, TRL's ``SFTTrainer``.

    python -m benchmarks.training [--steps 5] [--batch 8] [--max-length 512] [--trl] [--json]

Ours and ``Trainer`` run in one process. Both start from the same weights and the same LoRA adapter,
see the same rows in the same order and use the same learning rates; their steps alternate, so that
whatever else the machine does meets both. Their losses and gradient norms are compared at every
step: a faster step that computes something else would show.

``Trainer`` pads dynamically, averages over the tokens of the whole step as we do and uses the fused
optimiser. It is run twice: *plain*, the rows as they come, a whole step in one forward pass; and
*best*, the rows of a step sorted by length and two in a pass, which pads as little as
``group_by_length`` does and leaves the steps' rows as they are, so that curves can be compared.

TRL pins its own environment, so it runs in another process, without and with packing (which changes
what is in a step); it is compared by tokens per processor second. ``--trl`` builds the environment,
once, below the cache. Rows come from the alpaca demonstration set in
``$ANABRANCH_DATA/instruct-demo``, or else from a generator with its spread of lengths.
"""

from __future__ import annotations

import argparse
import copy
import json
import lzma
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset

from anabranch import models
from anabranch.claims.base import machine
from anabranch.models.loading import LoadedModel
from anabranch.models.quiet import quiet
from anabranch.training.example import Example, Item
from anabranch.training.language import LanguageObjective
from anabranch.training.losses.causal import Causal
from anabranch.training.options import TrainOptions
from anabranch.training.result import StepReport
from anabranch.training.trainer import Trainer
from benchmarks.peers.environments import TORCH, Recipe

TRL = Recipe("trl", (*TORCH, "transformers==5.23.0", "peft==0.21.2", "trl==1.16.0"))

LENGTHS = (3.2, 1.1)
"""Mean and deviation of the logarithm of a generated answer's tokens."""
WARM_UP = 1
"""Steps at the start that are compared but not timed."""


@dataclass
class Side:
    """What one trainer reported of its steps."""

    seconds: list[float] = field(default_factory=list)
    """Processor time: on a machine shared with others it says more than a clock on the wall."""
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Peer:
    """How the peer cuts a step: whether its rows are sorted, and how many share a forward pass."""

    name: str
    rows_of_a_forward: int
    sort: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5, help="at least two")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--trl", action="store_true", help="also TRL, in its own environment")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    loaded = models.load(models.DEFAULT, dtype="float32", device="cpu")
    options = TrainOptions(
        steps=arguments.steps,
        batch=arguments.batch,
        lr=arguments.lr,
        schedule="linear",
        warmup=1,
        shuffle=False,
        precision="fp32",
    )
    steps, source = load_steps(loaded, options, arguments.max_length)
    tokens = [sum(len(example) for (example,) in step) for step in steps]
    say = (lambda *_: None) if arguments.json else print
    say(f"{round(statistics.mean(tokens))} tokens a step ({source})")
    rows = []
    for peer in (
        Peer("plain", options.batch, sort=False),
        Peer("best", max(1, options.batch // 4), sort=True),
    ):
        ours, theirs = race(loaded, options, steps, peer)
        rows.append({"peer": f"transformers, {peer.name}", **compare(ours, theirs, tokens)})
        say(line(rows[-1]))
    if arguments.trl:
        speed = statistics.median(row["tokens_per_second"]["anabranch"] for row in rows)
        for packing in (False, True):
            rows.append(trl_row(loaded, options, steps, arguments.max_length, packing, speed))
            say(line(rows[-1]))
    if arguments.json:
        summary = {"rows": source, "tokens_per_step": tokens, "runs": rows}
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        print(json.dumps({**summary, "versions": versions, "machine": machine()}, indent=2))


def race(
    loaded: LoadedModel, options: TrainOptions, steps: Sequence[Sequence[Item]], peer: Peer
) -> tuple[Side, Side]:
    """Train two copies; ours takes its step whenever the peer has ended one."""
    ours, theirs = Side(), Side()
    mine, other = adapted(loaded), adapted(loaded)
    if peer.sort:
        steps = [sorted(step, key=lambda item: len(item[0])) for step in steps]
    items = [item for step in steps for item in step]
    trainer = Trainer(mine, LanguageObjective.from_options(Causal(), options), options, items)

    def our_step(index: int) -> None:
        began = time.process_time()
        report: StepReport = trainer.step(steps[index])
        ours.seconds.append(time.process_time() - began)
        ours.losses.append(report.loss)
        ours.norms.append(report.grad_norm)

    run_peer(other, options, items, peer.rows_of_a_forward, theirs, our_step)
    return ours, theirs


def run_peer(
    model: Any,
    options: TrainOptions,
    items: Sequence[Item],
    micro_batch: int,
    side: Side,
    between: Callable[[int], None],
) -> None:
    """Hugging Face's ``Trainer``; ``between(i)`` runs after its i-th step, off its clock."""
    began = 0.0

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            nonlocal began
            began = time.process_time()

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            nonlocal began
            side.seconds.append(time.process_time() - began)
            between(state.global_step - 1)
            began = time.process_time()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                side.losses.append(float(logs["loss"]))
                side.norms.append(float(logs["grad_norm"]))

    with tempfile.TemporaryDirectory() as folder, quiet():
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=options.steps or 0,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=options.batch // micro_batch,
            learning_rate=options.lr,
            lr_scheduler_type=options.schedule,
            warmup_steps=options.warmup_steps(options.steps or 0),
            max_grad_norm=options.clip or 0.0,
            weight_decay=options.weight_decay,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            optim="adamw_torch_fused",
            label_names=["labels"],
        )
        trainer = transformers.Trainer(
            model,
            arguments,
            data_collator=pad,
            train_dataset=Rows(items),
            callbacks=[Clock()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


class Rows(Dataset[Example]):
    """Items of one example each."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Example:
        return self._items[index][0]


def pad(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Right padding to the longest; labels of what is not trained are -100."""
    longest = max(map(len, examples))
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for example in examples:
        tokens, rest = list(example.tokens), longest - len(example)
        rows["input_ids"].append(tokens + [0] * rest)
        rows["attention_mask"].append([1] * len(tokens) + [0] * rest)
        rows["labels"].append(labels(example) + [-100] * rest)
    return {name: torch.tensor(values) for name, values in rows.items()}


def labels(example: Example) -> list[int]:
    """The tokens that are trained on, and -100 for the others."""
    return [t if mark else -100 for t, mark in zip(example.tokens, example.trained, strict=True)]


def adapted(loaded: LoadedModel) -> Any:
    """A copy of the model with an adapter that is the same every time."""
    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(copy.deepcopy(loaded.network), config).train()


def load_steps(
    loaded: LoadedModel, options: TrainOptions, max_length: int
) -> tuple[list[list[Item]], str]:
    """The rows of each step, and where they are from."""
    count = (options.steps or 0) * options.batch
    folder = os.environ.get("ANABRANCH_DATA")
    path = Path(folder or "") / "instruct-demo" / "alpaca_en_demo.jsonl.xz"
    if folder and path.exists():
        items, source = alpaca(loaded.tokenizer, path, max_length), "alpaca demonstration rows"
    else:
        items, source = generated(loaded.card.vocabulary, count, max_length), "generated rows"
    random.Random(0).shuffle(items)
    return [items[i : i + options.batch] for i in range(0, count, options.batch)], source


def alpaca(tokenizer: Any, path: Path, max_length: int) -> list[Item]:
    """Instruction and answer in the model's chat template; the answer is trained."""
    items: list[Item] = []
    with lzma.open(path, "rt") as file:
        for line in file:
            row = json.loads(line)
            question = "\n".join(filter(None, (row["instruction"], row["input"])))
            messages = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
            answer = tokenizer(row["output"] + tokenizer.eos_token)["input_ids"]
            if len(prompt) + len(answer) <= max_length:
                marks = [False] * len(prompt) + [True] * len(answer)
                items.append((Example(prompt + answer, marks),))
    return items


def generated(vocabulary: int, count: int, max_length: int) -> list[Item]:
    """Random tokens; answers with the spread of lengths of instruction data."""
    generator = random.Random(0)
    items: list[Item] = []
    for _ in range(count):
        prompt = generator.randint(30, 60)
        answer = min(max_length - prompt, 1 + int(generator.lognormvariate(*LENGTHS)))
        tokens = [generator.randrange(vocabulary) for _ in range(prompt + answer)]
        items.append((Example(tokens, [False] * prompt + [True] * answer),))
    return items


def trl_row(
    loaded: LoadedModel,
    options: TrainOptions,
    steps: Sequence[Sequence[Item]],
    max_length: int,
    packing: bool,
    our_speed: float,
) -> dict[str, Any]:
    """TRL's tokens per processor second on the same rows, beside ours."""
    question: dict[str, Any] = {
        "packing": packing,
        # A packed row is as long as allowed, so that two hold about as much as a step of ours.
        "rows_of_a_forward": 2 if packing else options.batch,
        "steps": options.steps,
        "lr": options.lr,
        "max_length": max_length,
        "rows": [
            {"tokens": list(example.tokens), "labels": labels(example)}
            for step in steps
            for (example,) in step
        ],
    }
    with tempfile.TemporaryDirectory() as folder, quiet():
        question["model"] = str(Path(folder) / "model")
        loaded.network.save_pretrained(question["model"])
        loaded.tokenizer.save_pretrained(question["model"])
        path = Path(folder) / "question.json"
        path.write_text(json.dumps(question))
        command = [TRL.build(), Path(__file__).with_name("training_trl.py"), path]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    answer = json.loads(printed.splitlines()[-1])
    speeds = [t / s for t, s in zip(answer["tokens"], answer["seconds"], strict=True)][WARM_UP:]
    speed = statistics.median(speeds)
    return {
        "peer": f"TRL, {'packed rows' if packing else 'plain'}",
        "tokens_per_second": {"anabranch": round(our_speed), "peer": round(speed)},
        "ratio": round(our_speed / speed, 2),
        **answer,
    }


def compare(ours: Side, theirs: Side, tokens: Sequence[int]) -> dict[str, Any]:
    """Medians over the steps, and how far the curves are apart."""
    ratios = [b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True)]
    return {
        "tokens_per_second": {
            name: round(
                statistics.median(
                    [t / s for t, s in zip(tokens, side.seconds, strict=True)][WARM_UP:]
                )
            )
            for name, side in (("anabranch", ours), ("peer", theirs))
        },
        "ratio": round(statistics.median(ratios[WARM_UP:]), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "losses": {"anabranch": ours.losses, "peer": theirs.losses},
        "largest_loss_difference": largest_difference(ours.losses, theirs.losses),
        "largest_norm_difference": largest_difference(ours.norms, theirs.norms),
    }


def largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def line(row: dict[str, Any]) -> str:
    speed = row["tokens_per_second"]
    text = (
        f"{row['peer']:22} {speed['peer']:6,} tokens a processor second, ours "
        f"{speed['anabranch']:6,}: {row['ratio']}x"
    )
    if (difference := row.get("largest_loss_difference")) is not None:
        text += f"; losses differ by at most {difference:.1e}"
    return text


if __name__ == "__main__":
    main()
