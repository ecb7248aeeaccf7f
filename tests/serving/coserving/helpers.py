"""Jobs on tiny models."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from anabranch.serving.coserving import FinetuneJob
from anabranch.training.example import Example, Item
from anabranch.training.options import TrainOptions


def rows(lengths: list[int], seed: int = 0, vocabulary: int = 96) -> list[Item]:
    """One example of each length; the first half of its tokens is not trained on."""
    rng = random.Random(seed)
    return [
        (
            Example(
                [rng.randrange(vocabulary) for _ in range(n)],
                [position >= max(1, n // 2) for position in range(n)],
                source=f"row {index}",
            ),
        )
        for index, n in enumerate(lengths)
    ]


def job(output: Path, items: list[Item], **changes: Any) -> FinetuneJob:
    """A LoRA job on all linear layers, with weights that change quickly."""
    values: dict[str, Any] = {"steps": 3, "batch": 2, "lr": 1e-2, "schedule": "constant"}
    values |= changes.pop("options", {})
    changes.setdefault("method_options", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"})
    return FinetuneJob(
        id=changes.pop("id", "job"),
        adapter=changes.pop("adapter", "mine"),
        items=items,
        options=TrainOptions(**values),
        output=output,
        **changes,
    )
