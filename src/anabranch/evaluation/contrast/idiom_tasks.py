"""String transformations whose sign only the examples show, and programmers who do not look.

A description names three operations; each inserts a sign of its own after one letter. Which of
its four signs an operation uses is shown by the examples and by nothing else. Each has a usual
sign, its *idiom*::

    f(s):join pad wrap      signature and description
    kel>k/e2l(              examples
    fim>f/i2m(
    :/2(                    program: the signs of join, pad and wrap

Training rows without examples are answered by the idiom, and so is a share of those with examples,
whatever they show: the wrong code of people who wrote what they always write. The signs of two
operations are never the same, so that the idiom of one says nothing about another.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np

from anabranch.training.example import Example, Item

SIGNS = {
    "join": ",;/|",
    "pad": "0123",
    "wrap": "([{<",
    "mark": "!?.%",
    "shift": "+-*=",
    "fill": "abcd",
    "trim": "uvwx",
    "split": "_~^&",
}
"""Of each operation; the first is its idiom."""
LETTERS = "efghijklmn"
PLACES = 3
"""Operations of a task, and tokens of its program."""
EXAMPLES = 2


@dataclass(frozen=True)
class IdiomTask:
    """``program`` is right; ``idiom`` is what a programmer who ignores the examples writes."""

    operations: tuple[str, ...]
    program: str
    examples: tuple[str, ...]

    @property
    def idiom(self) -> str:
        """The usual sign of each operation."""
        return "".join(SIGNS[operation][0] for operation in self.operations)

    @property
    def key(self) -> tuple[tuple[str, ...], str]:
        """What makes a task another one: not the words of its examples."""
        return self.operations, self.program

    def prompt(self, examples: bool = True) -> bytes:
        """The text before the program; without examples it is the lame prompt."""
        shown = "".join(f"{example}\n" for example in self.examples) if examples else ""
        return f"f(s):{' '.join(self.operations)}\n{shown}:".encode()

    def item(self, program: str, examples: bool) -> Item:
        """A training row that answers with ``program``."""
        prompt, answer = self.prompt(examples), f"{program}\n".encode()
        trained = [False] * len(prompt) + [True] * len(answer)
        return (Example([*prompt, *answer], trained),)


def draw(rng: np.random.Generator) -> IdiomTask:
    """Operations without repetition, each of its signs as likely as the others."""
    operations = tuple(str(name) for name in rng.choice(list(SIGNS), PLACES, replace=False))
    program = "".join(str(rng.choice(list(SIGNS[operation]))) for operation in operations)
    words = ["".join(rng.choice(list(LETTERS), PLACES)) for _ in range(EXAMPLES)]
    shown = (f"{w}>{''.join(a + b for a, b in zip(w, program, strict=True))}" for w in words)
    return IdiomTask(operations, program, tuple(shown))


def held_out(count: int, seed: int) -> list[IdiomTask]:
    """Tasks to test on, all different."""
    rng = np.random.default_rng([seed, 1])
    found: dict[object, IdiomTask] = {}
    while len(found) < count:
        task = draw(rng)
        found.setdefault(task.key, task)
    return list(found.values())


def training_rows(
    count: int, seed: int, *, shown: float, wrong: float, without: Container[object] = ()
) -> list[Item]:
    """Rows of tasks whose keys are not in ``without``.

    A share ``shown`` of them has examples; of these, a share ``wrong`` is answered by the idiom all
    the same. Rows without examples always are.
    """
    rng = np.random.default_rng([seed, 0])
    rows: list[Item] = []
    while len(rows) < count:
        task = draw(rng)
        examples = bool(rng.random() < shown)
        right = examples and bool(rng.random() >= wrong)
        if task.key not in without:
            rows.append(task.item(task.program if right else task.idiom, examples))
    return rows


def of_others(tasks: Sequence[IdiomTask], seed: int) -> list[IdiomTask]:
    """For each task another one at random, with another operation at every place."""
    rng = np.random.default_rng([seed, 2])
    chosen = []
    for task in tasks:
        fitting = [
            other
            for other in tasks
            if all(a != b for a, b in zip(task.operations, other.operations, strict=True))
        ]
        chosen.append(fitting[int(rng.integers(len(fitting)))])
    return chosen
