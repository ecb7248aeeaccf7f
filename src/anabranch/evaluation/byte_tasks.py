"""Tasks made by rule over bytes, with exact answers: copy, reverse, add modulo 10."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from anabranch.training.example import Example, Item

LETTERS = "abcdefghijklmnopqrstuvwxyz"
END = "\n"


def copy(rng: np.random.Generator) -> tuple[str, ...]:
    """``c:head>`` -> ``head``; 4 or 5 of ten letters."""
    word = _word(rng)
    return f"c:{word}>", word


def reverse(rng: np.random.Generator) -> tuple[str, ...]:
    """``r:head>`` -> ``daeh``; 4 or 5 of ten letters."""
    word = _word(rng)
    return f"r:{word}>", word[::-1]


def add(rng: np.random.Generator) -> tuple[str, ...]:
    """``a:x=`` -> ``a``: eight letters plus three, modulo 26, each answered right after it."""
    pieces = ["a:"]
    for place in rng.integers(0, len(LETTERS), 8):
        pieces[-1] += f"{LETTERS[place]}="
        pieces += [LETTERS[(place + 3) % len(LETTERS)], " "]
    return tuple(pieces[:-1])


TASKS: dict[str, Callable[[np.random.Generator], tuple[str, ...]]] = {
    "copy": copy,
    "reverse": reverse,
    "add": add,
}
"""Each gives text in pieces: question, answer, question, answer ..."""


def rows(task: str, count: int, seed: int) -> list[Item]:
    """Examples of a task; the answers and the end are trained on."""
    rng = np.random.default_rng([seed, *task.encode()])
    return [(_example(task, TASKS[task](rng)),) for _ in range(count)]


def _example(task: str, pieces: Sequence[str]) -> Example:
    tokens: list[int] = []
    trained: list[bool] = []
    for index, piece in enumerate((*pieces[:-1], pieces[-1] + END)):
        tokens += piece.encode()
        trained += [index % 2 == 1] * len(piece)
    return Example(tokens, trained, task)


def _word(rng: np.random.Generator) -> str:
    return "".join(rng.choice(list(LETTERS[:10]), rng.integers(4, 6)))
