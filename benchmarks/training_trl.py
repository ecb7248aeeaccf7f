"""TRL's ``SFTTrainer`` on given rows, in an environment of its own (see ``benchmarks.training``).

    python benchmarks/training_trl.py QUESTION.json

The question has ``model`` (a folder), ``rows`` (``tokens`` and ``labels`` of each), ``packing``,
``rows_of_a_forward``, ``steps``, ``lr`` and ``max_length``. The last line printed is the answer.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig


class Clock(transformers.TrainerCallback):  # type: ignore[misc]
    """Processor seconds of every step, and its loss."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.process_time() - self._began)

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


class CountedTokens:
    """TRL's own collator; notes how many tokens, without padding, each batch has."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.tokens: list[int] = []

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        self.tokens.append(sum(len(row["input_ids"]) for row in rows))
        return self.inner(rows)


def main() -> None:
    question = json.loads(Path(sys.argv[1]).read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(
        question["model"], dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(question["model"])
    rows = [{"input_ids": row["tokens"], "labels": row["labels"]} for row in question["rows"]]
    clock = Clock()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.SFTConfig(
            output_dir=folder,
            packing=question["packing"],
            max_length=question["max_length"],
            per_device_train_batch_size=question["rows_of_a_forward"],
            max_steps=question["steps"],
            learning_rate=question["lr"],
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = trl.SFTTrainer(
            model,
            arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            callbacks=[clock],
        )
        counted = trainer.data_collator = CountedTokens(trainer.data_collator)
        trainer.train()
    answer = {
        "seconds": clock.seconds,
        "tokens": counted.tokens[: len(clock.seconds)],
        "losses": clock.losses,
        "versions": {"trl": trl.__version__, "transformers": transformers.__version__},
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
