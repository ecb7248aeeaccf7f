"""Processor seconds per optimiser step, ours and Hugging Face's ``Trainer``, in one process.

    python -m benchmarks.training [--steps 6] [--batch 8] [--max-length 512] [--json]

Both sides start from the same weights and the same LoRA adapter, see the same rows in the same
order and use the same learning rates; their steps alternate, so that whatever else the machine does
meets both. Their losses and gradient norms are compared at every step: a faster step that computes
something else would show.

The peer gets its best case. It pads dynamically, averages over the tokens of the whole step as we
do, uses the fused optimiser, and its rows are sorted by length within a step; it is run with every
micro-batch size that divides the batch and the fastest counts. Rows come from the alpaca
demonstration set in ``$ANABRANCH_DATA/instruct-demo``, or else from a generator with its spread of
lengths.
"""

from __future__ import annotations

import argparse
import copy
import json
import lzma
import os
import random
import statistics
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--peer-micro-batches", type=int, nargs="*", help="rows of one forward")
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
    sizes = arguments.peer_micro_batches or [options.batch, max(1, options.batch // 4)]
    rows = []
    for size in sizes:
        ours, theirs = race(loaded, options, steps, size)
        rows.append({"peer_micro_batch": size, **compare(ours, theirs)})
        if not arguments.json:
            show(rows[-1])
    tokens = sum(len(example) for step in steps for (example,) in step)
    summary = {
        "ratio": min(row["ratio"] for row in rows),
        "largest_loss_difference": max(row["largest_loss_difference"] for row in rows),
        "rows": source,
        "tokens_per_step": round(tokens / len(steps)),
        "trained_share": round(sum(e.targets for step in steps for (e,) in step) / tokens, 3),
    }
    if arguments.json:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        print(
            json.dumps(
                {**summary, "runs": rows, "versions": versions, "machine": machine()}, indent=2
            )
        )
    else:
        print(
            f"{summary['ratio']}x the peer's best, {summary['tokens_per_step']} tokens a step "
            f"({source})"
        )


def race(
    loaded: LoadedModel, options: TrainOptions, steps: Sequence[Sequence[Item]], micro_batch: int
) -> tuple[Side, Side]:
    """Train two copies; ours takes its step whenever the peer has ended one."""
    ours, theirs = Side(), Side()
    mine, other = adapted(loaded), adapted(loaded)
    items = [item for step in steps for item in step]
    trainer = Trainer(mine, LanguageObjective.from_options(Causal(), options), options, items)

    def our_step(index: int) -> None:
        began = time.process_time()
        report: StepReport = trainer.step(steps[index])
        ours.seconds.append(time.process_time() - began)
        ours.losses.append(report.loss)
        ours.norms.append(report.grad_norm)

    run_peer(other, options, items, micro_batch, theirs, our_step)
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
        marks = zip(tokens, example.trained, strict=True)
        rows["input_ids"].append(tokens + [0] * rest)
        rows["attention_mask"].append([1] * len(tokens) + [0] * rest)
        rows["labels"].append([t if mark else -100 for t, mark in marks] + [-100] * rest)
    return {name: torch.tensor(values) for name, values in rows.items()}


def adapted(loaded: LoadedModel) -> Any:
    """A copy of the model with an adapter that is the same every time."""
    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(copy.deepcopy(loaded.network), config).train()


def load_steps(
    loaded: LoadedModel, options: TrainOptions, max_length: int
) -> tuple[list[list[Item]], str]:
    """The rows of each step, the shortest first, and where they are from."""
    count = (options.steps or 0) * options.batch
    folder = os.environ.get("ANABRANCH_DATA")
    path = Path(folder or "") / "instruct-demo" / "alpaca_en_demo.jsonl.xz"
    if folder and path.exists():
        items, source = alpaca(loaded.tokenizer, path, max_length), "alpaca demonstration rows"
    else:
        items, source = generated(loaded.card.vocabulary, count, max_length), "generated rows"
    random.Random(0).shuffle(items)
    steps = [items[i : i + options.batch] for i in range(0, count, options.batch)]
    return [sorted(step, key=lambda item: len(item[0])) for step in steps], source


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


def compare(ours: Side, theirs: Side) -> dict[str, Any]:
    """Median step times, their ratio, and how far the curves are apart."""
    seconds = {
        name: statistics.median(side.seconds[WARM_UP:] or side.seconds)
        for name, side in (("anabranch", ours), ("transformers", theirs))
    }
    ratios = [b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True)]
    return {
        "seconds_per_step": {name: round(value, 3) for name, value in seconds.items()},
        "ratio": round(statistics.median(ratios[WARM_UP:] or ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "losses": {"anabranch": ours.losses, "transformers": theirs.losses},
        "largest_loss_difference": largest_difference(ours.losses, theirs.losses),
        "largest_norm_difference": largest_difference(ours.norms, theirs.norms),
    }


def largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def show(row: dict[str, Any]) -> None:
    seconds = row["seconds_per_step"]
    print(
        f"peer with {row['peer_micro_batch']:2} rows a forward: {seconds['transformers']:6.2f} s a "
        f"step, ours {seconds['anabranch']:6.2f} s, {row['ratio']}x; losses differ by at most "
        f"{row['largest_loss_difference']:.1e}"
    )


if __name__ == "__main__":
    main()
