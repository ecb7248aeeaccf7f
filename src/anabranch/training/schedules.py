"""Learning rate as a function of the step. Pure: nothing to checkpoint."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["linear", "cosine", "constant"]


def lr_factor(step: int, total: int, warmup: int, schedule: Schedule, floor: float = 0.0) -> float:
    """Factor on the peak learning rate for the optimiser step ``step`` (the first is 0).

    Rises linearly from zero over ``warmup`` steps, then falls to ``floor`` at ``total`` along the
    schedule and stays there. The values are those of transformers' schedulers, plus the floor.
    """
    if step < warmup:
        return step / warmup
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    falling = 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return floor + (1.0 - floor) * falling
