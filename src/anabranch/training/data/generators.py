"""Rows made by rule, so that a recipe runs on a machine without any data set.

Their texts are synthetic and say nothing about language; what they teach can be judged exactly.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from anabranch.errors import ConfigurationError, UnknownName, did_you_mean

Rows = Iterator[dict[str, Any]]


def _words(text: str) -> list[str]:
    return text.split()


WORDS = _words(
    "apple bridge candle desert engine forest garden harbour island jacket kettle ladder market "
    "needle orange pepper quarry ribbon saddle tunnel umbrella valley window yellow zebra anchor "
    "basket copper dragon feather guitar hammer insect jungle kitten lantern mirror napkin ocean "
    "pillow rocket silver timber velvet wagon"
)
NAMES = _words("Ada Ben Chloe Dan Eva Finn Grace Hugo Iris Jack Kira Leo Maya Noah Olga Paul")
THINGS = _words("apples books coins eggs keys marbles pencils shells stamps stones tickets toys")

STORIES: tuple[tuple[str, Callable[[int, int, int], int], str], ...] = (
    ("{a} has {x} {t}. {b} gives {a} {y} more. How many {t} does {a} have now?",
     lambda x, y, z: x + y, "{a} had {x} and got {y}: {x} + {y} = {r}."),
    ("There were {x} {t} on the table and {a} took {z} of them. How many are left?",
     lambda x, y, z: x - z, "Of {x} {t}, {z} are gone: {x} - {z} = {r}."),
    ("{a} packs {x} boxes with {z} {t} in each. How many {t} is that?",
     lambda x, y, z: x * z, "{x} boxes of {z}: {x} * {z} = {r}."),
    ("{a} buys {x} {t} in the morning, and in the evening {y} more than in the morning. How many "
     "{t} did {a} buy that day?",
     lambda x, y, z: x + x + y, "In the evening {x} + {y} = {s}. Together {x} + {s} = {r}."),
    ("{a} and {b} each collect {x} {t}, then lose {z} in all. How many do they still have?",
     lambda x, y, z: 2 * x - z, "They collect 2 * {x} = {d} and lose {z}: {d} - {z} = {r}."),
)  # fmt: skip


def generate(name: str, seed: int, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a generator; the same for the same seed and options.

    Raises :class:`UnknownName` or :class:`ConfigurationError` listing what there is.
    """
    check_generator(name, options)
    return list(GENERATORS[name](np.random.default_rng(seed), **options))


def check_generator(name: str, options: Mapping[str, Any]) -> None:
    """Raise unless there is such a generator and it takes these options, all whole numbers."""
    if name not in GENERATORS:
        raise UnknownName("generator", name, GENERATORS)
    known = [p for p in inspect.signature(GENERATORS[name]).parameters if p != "rng"]
    for key, value in options.items():
        if key not in known:
            raise ConfigurationError(
                f"generator:{name} has no option {key!r}{did_you_mean(key, known)}; "
                f"known: {', '.join(known)}"
            )
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigurationError(
                f"generator:{name}: {key} must be a whole number from 1, not {value!r}"
            )


def arithmetic(rng: np.random.Generator, rows: int = 800, largest: int = 50) -> Rows:
    """Word problems of one or two steps: question, rationale ("output"), answer, template number.

    Divide them with ``split: {group: template}`` to hold out whole wordings.
    """
    for _ in range(rows):
        template = int(rng.integers(len(STORIES)))
        question, result, rationale = STORIES[template]
        x, y = (int(n) for n in rng.integers(2, largest + 1, 2))
        z = int(rng.integers(2, min(9, x) + 1))
        first, second = rng.choice(NAMES, 2, replace=False)
        values = {"a": first, "b": second, "t": rng.choice(THINGS), "x": x, "y": y, "z": z}
        values |= {"r": (r := result(x, y, z)), "s": x + y, "d": 2 * x}
        yield {
            "instruction": question.format(**values),
            "output": f"{rationale.format(**values)} The answer is {r}.",
            "answer": str(r),
            "template": template,
        }


def instructions(rng: np.random.Generator, rows: int = 400) -> Rows:
    """Small language chores in a house style: instruction, output, and which chore ("skill")."""
    chores: tuple[tuple[str, Callable[[list[str]], tuple[str, str]]], ...] = (
        ("sort", lambda w: (f"Sort these words: {', '.join(w)}.", ", ".join(sorted(w)))),
        ("last", lambda w: (f"Which word comes last: {', '.join(w)}?", w[-1])),
        ("count", lambda w: (f"How many words are here: {' '.join(w)}?", str(len(w)))),
        ("reverse", lambda w: (f"Say these words backwards: {' '.join(w)}.", " ".join(w[::-1]))),
        ("capitals", lambda w: (f"Write in capitals: {' '.join(w)}.", " ".join(w).upper())),
        ("initials", lambda w: (f"Give the initials of: {' '.join(w)}.",
                                "".join(word[0].upper() for word in w))),
    )  # fmt: skip
    for _ in range(rows):
        words = [str(word) for word in rng.choice(WORDS, int(rng.integers(3, 7)), replace=False)]
        skill, make = chores[int(rng.integers(len(chores)))]
        question, answer = make(words)
        yield {"instruction": question, "output": f"Result: {answer}. Done.", "skill": skill}


def preferences(rng: np.random.Generator, rows: int = 300) -> Rows:
    """Pairs that differ only in a closing phrase, which the chosen answer has."""
    for row in instructions(rng, rows):
        yield {
            "prompt": row["instruction"],
            "chosen": f"{row['output']} Thank you for asking!",
            "rejected": row["output"],
        }


def sentences(rng: np.random.Generator, rows: int = 200) -> Rows:
    """Paragraphs of running text ("text") from a small grammar."""
    verbs = _words("watches carries paints finds sells repairs hides counts")
    places = ("by the river", "in the old town", "before sunrise", "at the fair", "on the hill")
    for _ in range(rows):
        lines = [
            f"{rng.choice(NAMES)} {rng.choice(verbs)} the {rng.choice(WORDS)} and the "
            f"{rng.choice(WORDS)} {rng.choice(places)}."
            for _ in range(int(rng.integers(3, 9)))
        ]
        yield {"text": " ".join(lines)}


GENERATORS: dict[str, Callable[..., Rows]] = {
    "arithmetic": arithmetic,
    "instructions": instructions,
    "preferences": preferences,
    "sentences": sentences,
}
