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

Worked = tuple[str, int]
"""Equations, step by step, and what they come to."""


def _steps(*equations: str) -> Worked:
    """``("3 + 4", ...)`` -> ``("3 + 4 = 7. ...", result of the last)``; one sign in each."""
    texts = []
    for equation in equations:
        left, sign, right = equation.split()
        x, y = int(left), int(right)
        result = {"+": x + y, "-": x - y, "*": x * y, "/": x // y}[sign]
        texts.append(f"{equation} = {result}.")
    return " ".join(texts), result


STORIES: tuple[tuple[str, Callable[[int, int, int], Worked]], ...] = (
    ("{a} has {x} {t}. {b} gives {a} {y} more. How many {t} does {a} have now?",
     lambda x, y, z: _steps(f"{x} + {y}")),
    ("There were {x} {t} on the table and {a} took {z} of them. How many are left?",
     lambda x, y, z: _steps(f"{x} - {z}")),
    ("{a} packs {x} boxes with {z} {t} in each. How many {t} is that?",
     lambda x, y, z: _steps(f"{x} * {z}")),
    ("{a} buys {x} {t} in the morning, and in the evening {y} more than in the morning. How many "
     "{t} did {a} buy that day?",
     lambda x, y, z: _steps(f"{x} + {y}", f"{x} + {x + y}")),
    ("{a} and {b} each collect {x} {t}, then lose {z} in all. How many do they still have?",
     lambda x, y, z: _steps(f"2 * {x}", f"{2 * x} - {z}")),
    ("{a} counted {x} {t} on Monday and {y} on Tuesday. How many {t} in two days?",
     lambda x, y, z: _steps(f"{x} + {y}")),
    ("{a} owned {xz} {t} and sold {z} of them to {b}. How many does {a} keep?",
     lambda x, y, z: _steps(f"{x + z} - {z}")),
    ("{a} shares {m} {t} equally among {z} friends. How many does each friend get?",
     lambda x, y, z: _steps(f"{x * z} / {z}")),
    ("Each of {z} bags holds {x} {t}, and {a} adds {y} loose ones. How many {t} are there?",
     lambda x, y, z: _steps(f"{z} * {x}", f"{z * x} + {y}")),
    ("{a} has {x} {t}, and {b} has {y} more than {a}. How many {t} does {b} have?",
     lambda x, y, z: _steps(f"{x} + {y}")),
    ("{a} has {x} {t}. {b} has {z} times as many. How many {t} does {b} have?",
     lambda x, y, z: _steps(f"{z} * {x}")),
    ("{a} earns {x} {t} a day for {z} days and then finds {y} more. How many {t} has {a}?",
     lambda x, y, z: _steps(f"{x} * {z}", f"{x * z} + {y}")),
    ("{a} needs {xy} {t} and has {x}. How many are missing?",
     lambda x, y, z: _steps(f"{x + y} - {x}")),
    ("A box has {x} red and {y} blue {t}, and {a} takes out {z}. How many are in it now?",
     lambda x, y, z: _steps(f"{x} + {y}", f"{x + y} - {z}")),
    ("{a} puts {m} {t} into bags of {z}. How many bags does {a} fill?",
     lambda x, y, z: _steps(f"{x * z} / {z}")),
    ("{b} is {x} years old, and {a} is {z} years older. How old are they together?",
     lambda x, y, z: _steps(f"{x} + {z}", f"{x} + {x + z}")),
    ("A shop sells {x} {t} on Friday and twice as many on Saturday. How many in both days?",
     lambda x, y, z: _steps(f"2 * {x}", f"{x} + {2 * x}")),
    ("{a} had {xzz} {t}, lost {z} on Monday and {z} again on Tuesday. How many are left?",
     lambda x, y, z: _steps(f"{x + 2 * z} - {z}", f"{x + z} - {z}")),
    ("A train has {z} cars with {x} seats each, and {z} seats are broken. How many can be used?",
     lambda x, y, z: _steps(f"{z} * {x}", f"{z * x} - {z}")),
    ("Each of {x} children gets {z} {t}, and {y} are left over. How many were there at first?",
     lambda x, y, z: _steps(f"{x} * {z}", f"{x * z} + {y}")),
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
        question, work = STORIES[template]
        x, y = (int(n) for n in rng.integers(2, largest + 1, 2))
        z = int(rng.integers(2, min(9, x) + 1))
        first, second = rng.choice(NAMES, 2, replace=False)
        values = {"a": first, "b": second, "t": rng.choice(THINGS), "x": x, "y": y, "z": z}
        values |= {"xy": x + y, "xz": x + z, "xzz": x + 2 * z, "m": x * z}
        rationale, result = work(x, y, z)
        yield {
            "instruction": question.format(**values),
            "output": f"{rationale} The answer is {result}.",
            "answer": str(result),
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
