"""Half fine-tuning (HFT): every round trains another half of the network, the rest stays as it is.

What it does: at the start of each round half of the matrices of every transformer block are frozen.
What the model knew is kept better than by full fine-tuning, at about equal quality on the new task
(Hui et al., 2024, cited by Parthasarathy et al., 2024, section 6). When to use it: full fine-tuning
of a model that must not forget. Known problem: the moments of frozen weights are dropped, so that
short rounds lose momentum.

Example::

    model.requires_grad_(True)
    Trainer(model, objective, options, items, hooks=[HalfFineTuning(seed=0)]).fit()
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from anabranch.training.errors import TrainingError
from anabranch.training.hooks import Hook

if TYPE_CHECKING:
    from anabranch.training.trainer import Trainer

BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.(.+)$")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
UP, GATE_DOWN = ("up_proj",), ("gate_proj", "down_proj")


class HalfFineTuning(Hook):
    """Chooses the trained half anew at the start of each round.

    A round is an epoch, or ``every`` optimiser steps. The choice depends on ``seed`` and the
    round's number only, so that a resumed run makes the same one. ``first_round`` is where counting
    starts, for a federated client whose rounds are runs.
    """

    def __init__(self, seed: int = 0, every: int | None = None, first_round: int = 0) -> None:
        self._seed = seed
        self._every = every
        self._first = first_round
        self._applied: int | None = None

    def before_step(self, trainer: Trainer) -> None:
        """Freeze and free at the first step of a round."""
        number = trainer.steps_done // self._every if self._every else trainer.epoch
        number += self._first
        if number == self._applied:
            return
        chosen = choose_half(trainer.trainable, self._seed, number)
        for name, parameter in trainer.trainable.items():
            parameter.requires_grad_(name in chosen)
            if name not in chosen:
                parameter.grad = None
                trainer.optimizer.state.pop(parameter, None)
        self._applied = number

    def after_run(self, trainer: Trainer) -> None:
        """Free everything that was trainable before."""
        for parameter in trainer.trainable.values():
            parameter.requires_grad_(True)
        self._applied = None


def choose_half(names: Iterable[str], seed: int, number: int) -> set[str]:
    """Names of the parameters that round ``number`` trains.

    In every block: two of the four attention projections; ``up`` or ``gate`` and ``down``, in turns
    from block to block; one of two norms. Biases go with their matrix. Everything outside the
    blocks (embeddings, final norm, head) is frozen. Raises :class:`TrainingError` if the names are
    not those of a transformer with these projections.
    """
    blocks: dict[int, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        found = BLOCK.search(name)
        if found:
            module = found[2].rpartition(".")[0]  # without ".weight" or ".bias"
            blocks[int(found[1])][module.rpartition(".")[2]].append(name)
    if not blocks or not all({*ATTENTION, *UP, *GATE_DOWN} <= set(b) for b in blocks.values()):
        raise TrainingError(
            "half fine-tuning needs all weights of a transformer whose blocks have "
            f"{', '.join((*ATTENTION, *GATE_DOWN, *UP))} to be trainable; call "
            "model.requires_grad_(True), or use an adapter on this architecture"
        )
    generator = random.Random(f"{seed}/{number}")
    up_first = generator.randrange(2)
    chosen: set[str] = set()
    for place, index in enumerate(sorted(blocks)):
        block = blocks[index]
        modules = [
            *generator.sample(ATTENTION, 2),
            *(UP if (place + up_first) % 2 == 0 else GATE_DOWN),
            *_half(sorted(set(block) - {*ATTENTION, *UP, *GATE_DOWN}), generator),
        ]
        chosen.update(name for module in modules for name in block[module])
    return chosen


def _half(norms: Sequence[str], generator: random.Random) -> list[str]:
    return generator.sample(norms, len(norms) // 2)
