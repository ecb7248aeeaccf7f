"""A run that is killed again and again, and the same run undisturbed.

    python -m tests.training.crashing FOLDER KILLS

Everything is imported once; each attempt is a fork that is killed with SIGKILL after a random time,
wherever it happens to be. Prints the digests of all final state of both runs, as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anabranch.training.checkpoint import CheckpointStore
from anabranch.training.hooks import Hook
from anabranch.training.metrics_log import read_metrics
from anabranch.training.state import split_tensors
from anabranch.training.trainer import Trainer
from tests.training.helpers import Regression, options, points

STEPS = 60

# A fork of a process whose OpenMP threads have worked would wait for threads that it does not have.
torch.set_num_threads(1)


class Slow(Hook):
    """Makes a step as long as writing its checkpoint, so that kills fall in both."""

    def after_gradients(self, trainer: Trainer) -> None:
        time.sleep(0.004)


def make(folder: Path) -> Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(1, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.GELU(), nn.Linear(6, 1)
    )
    made = options(
        steps=STEPS,
        batch=5,
        lr=0.01,
        schedule="cosine",
        ema=0.9,
        evaluate_every=4,
        checkpoint={"every": 1},
        early_stopping={"metric": "mse", "patience": 1000},
    )
    objective = Regression(micro_batch=3, noise=0.1)
    return Trainer(
        model, objective, made, points(12), validation=points(4), output=folder, hooks=[Slow()]
    )


def digest(trainer: Trainer) -> str:
    """Of the whole state but the time that it took."""
    state: dict[str, Any] = trainer.state_dict()
    del state["counters"]["seconds"]
    tree, tensors = split_tensors(state)
    made = hashlib.sha256(json.dumps(tree, sort_keys=True).encode())
    for name in sorted(tensors):
        made.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return made.hexdigest()


def attempt(folder: Path, after: float | None = None) -> bool:
    """Train in a fork; kill it so many seconds after it began. True if it finished."""
    began, tell = os.pipe()
    child = os.fork()
    if child == 0:
        trainer = make(folder)
        os.write(tell, b"!")
        trainer.fit()
        (folder / "digest").write_text(digest(trainer))
        os._exit(0)
    os.read(began, 1)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit(f"the run failed with {os.WEXITSTATUS(status)}")
    return os.WIFEXITED(status)


def main() -> None:
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    # What torch imports and sets up on first use is done once, before the forks.
    make(folder / "warm-up").step(points(2))
    generator = random.Random(0)
    for name in ("whole", "killed"):
        (folder / name).mkdir()
    began = time.perf_counter()
    attempt(folder / "whole")
    seconds = time.perf_counter() - began
    store = CheckpointStore(folder / "killed" / "checkpoints")
    left_at = []
    finished = False
    while len(left_at) < kills and not finished:
        # Each attempt gets about one part of the run, so that the kills spread over all of it.
        finished = attempt(folder / "killed", generator.uniform(0, 2 * seconds / kills))
        left_at.append(max(store.steps(), default=0))
    attempt(folder / "killed")
    steps = [e["step"] for e in read_metrics(folder / "killed" / "metrics.jsonl") if "loss" in e]
    digests = {name: (folder / name / "digest").read_text() for name in ("whole", "killed")}
    sys.stdout.write(json.dumps({**digests, "left_at": left_at, "steps": steps}))


if __name__ == "__main__":
    main()
