"""Texts and their labels: one, several, or several with a value each.

Task, answer forms and the rules for malformed answers follow Rethinking Scale (Carammia et al.,
2024) and its repository. What it does not know: how probable a label is
(:mod:`anabranch.training.annotation.scoring`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from anabranch.errors import ConfigurationError, MissingExtra, did_you_mean
from anabranch.training.conversation import text_of
from anabranch.training.errors import DataError
from anabranch.training.task import Message, Rendered, Row, Task

Kind = Literal["single", "multi", "valued"]
AnswerForm = Literal["label", "number", "list", "dictionary"]

NONE = "none"
"""The answer for a text to which no label applies."""
LEVELS = ("low", "medium", "high")

FORMS: Mapping[Kind, tuple[AnswerForm, ...]] = {
    "single": ("label", "number"),
    "multi": ("list",),
    "valued": ("dictionary",),
}
"""Kind -> how its answers may be written, the default first."""

_HOW = {
    "label": "Answer with one label of this list: {labels}.",
    "number": "Answer with the number of one category, as in: Answer = [1].\n{labels}",
    "list": 'Answer with a JSON list of all labels that apply, as in ["{first}"].\n{labels}',
    "dictionary": (
        "Answer with a JSON dictionary of all labels that apply and how much ({values}), "
        'as in {{"{first}": "{high}"}}.\n{labels}'
    ),
}
_PROMPT = "Classify the text. {how}\n\nText: {text}"

_NUMBER = re.compile(r"answer\s*=?\s*\W*(\d+)", re.IGNORECASE | re.ASCII)
_FIRST_NUMBER = re.compile(r"\d+", re.ASCII)
_PAIR = re.compile(r"""["']?([^"':=,{}\[\]\n]+)["']?\s*[:=]\s*["']?([^"':=,{}\[\]\n]+)["']?""")


@dataclass(frozen=True)
class Reading:
    """What an answer says. ``value`` is None if it cannot be read as one.

    A label for ``single``, a frozenset of labels for ``multi``, a dictionary label -> value for
    ``valued``. ``unknown`` are names in the answer that are no labels or values; they are left out.
    """

    value: Any
    unknown: tuple[str, ...] = field(default=())


class ClassificationTask(Task):
    """Texts with labels from a list.

    Rows have ``text`` and ``label`` (kind ``single``) or ``labels``: a list (``multi``; also a
    string with commas) or a dictionary label -> value (``valued``), which may be empty.

    ``prompt`` may use ``{text}``, ``{labels}`` (the list, numbered where answers are numbers) and
    ``{how}`` (the instruction that fits ``answer_form``); it must have ``{text}``. ``answer_form``
    is ``label`` or ``number`` for single, ``list`` for multi, ``dictionary`` for valued.
    ``aliases`` are other spellings: alias -> label, or alias -> value.

    When to use it: any labelling of texts; with ``anabranch label``, or in a recipe as
    ``task: {name: classification, labels: [...]}``. Known problems: texts are not cut here; long
    lists of labels make long prompts, so write a ``prompt`` without ``{how}`` for a model that will
    be trained on it.
    """

    name: ClassVar[str] = "classification"
    schema = (("text", "label"), ("text", "labels"))

    def __init__(
        self,
        labels: Sequence[str],
        kind: Kind = "single",
        prompt: str = _PROMPT,
        answer_form: AnswerForm | None = None,
        values: Sequence[str] = LEVELS,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        if kind not in get_args(Kind):
            raise ConfigurationError(
                f"kind must be one of {', '.join(get_args(Kind))}, not {kind!r}"
            )
        form = answer_form or FORMS[kind][0]
        if form not in FORMS[kind]:
            raise ConfigurationError(
                f"answer_form of kind {kind!r} must be one of {', '.join(FORMS[kind])}, "
                f"not {form!r}"
            )
        self.labels = tuple(str(label) for label in labels)
        self.kind: Kind = kind
        self.answer_form: AnswerForm = form
        self.values = tuple(values)
        self._known = _names("label", [*self.labels, NONE] if kind != "single" else self.labels)
        self._levels = _names("value", self.values)
        for alias, target in (aliases or {}).items():
            known = self._known if target in self.labels else self._levels
            if target not in (*self.labels, *self.values):
                raise ConfigurationError(
                    f"alias {alias!r} stands for {target!r}, which is no label or value"
                    f"{did_you_mean(target, (*self.labels, *self.values))}"
                )
            known[plain(alias)] = target
        self._prompt = self._filled(prompt)

    def question(self, text: str) -> tuple[Message, ...]:
        """What the model is asked about a text."""
        return ({"role": "user", "content": self._prompt.replace("{text}", text.strip())},)

    def render(self, row: Row) -> tuple[Rendered, ...]:
        """The question and the answer in its form."""
        answer = {"role": "assistant", "content": self.answer(self.reference(row))}
        return (Rendered(messages=(*self.question(text_of(row, "text")), answer)),)

    def answer(self, value: Any) -> str:
        """The text of an answer that says ``value``, in the order of the label list."""
        if self.answer_form == "label":
            return str(value)
        if self.answer_form == "number":
            return f"Answer = [{self.labels.index(value) + 1}]."
        chosen = [label for label in self.labels if label in value]
        found = chosen if self.kind == "multi" else {label: value[label] for label in chosen}
        return json.dumps(found, ensure_ascii=False)

    def reference(self, row: Row) -> Any:
        """The row's label, frozenset of labels, or dictionary; :class:`DataError` if unknown."""
        shape = self.shape_of(row)
        given = row[shape[1]]
        if self.kind == "single":
            return self._label(given)
        if self.kind == "multi":
            listed = given.split(",") if isinstance(given, str) else given
            if not isinstance(listed, list | tuple | set | frozenset):
                raise DataError(f"column {shape[1]!r} must list labels, not {given!r:.80}")
            names = [n for n in listed if plain(str(n)) not in ("", NONE)]
            return frozenset(self._label(name) for name in names)
        if not isinstance(given, Mapping):
            raise DataError(f"column {shape[1]!r} must map labels to values, not {given!r:.80}")
        found = {}
        for name, value in given.items():
            if plain(str(value)) not in self._levels:
                raise DataError(
                    f"label {name!r} has the value {value!r}; known: {', '.join(self.values)}"
                )
            found[self._label(name)] = self._levels[plain(str(value))]
        return found

    def read(self, text: str) -> Reading:
        """What a generated answer says; never raises, whatever the text is."""
        readers: Mapping[AnswerForm, Callable[[str], Reading]] = {
            "label": self._read_label,
            "number": self._read_number,
            "list": self._read_list,
            "dictionary": self._read_dictionary,
        }
        return readers[self.answer_form](text)

    def parse(self, text: str) -> Any:
        """The value of :meth:`read`."""
        return self.read(text).value

    def score(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        """Accuracy (of exact sets for several labels), ``unread`` answers, and macro F1 (single).

        More figures, intervals and tests: :mod:`anabranch.evaluation.classification`.
        """
        found = super().score(predictions, references)
        if predictions:
            found["read"] = sum(p is not None for p in predictions) / len(predictions)
        if predictions and self.kind == "single":
            try:
                from sklearn.metrics import f1_score
            except ImportError:
                raise MissingExtra("scikit-learn", "train") from None
            answers = [NONE if p is None else p for p in predictions]
            found["macro_f1"] = float(
                f1_score(references, answers, labels=self.labels, average="macro", zero_division=0)
            )
        return found

    def _filled(self, prompt: str) -> str:
        if "{text}" not in prompt:
            raise ConfigurationError(f"prompt lacks {{text}}, where the text goes: {prompt!r:.120}")
        numbered = "\n".join(f"{i}. {label}" for i, label in enumerate(self.labels, 1))
        listing = numbered if self.answer_form == "number" else ", ".join(self.labels)
        how = _HOW[self.answer_form].format(
            labels=listing,
            first=self.labels[0],
            values=", ".join(self.values),
            high=self.values[-1],
        )
        return prompt.replace("{how}", how).replace("{labels}", listing)

    def _label(self, given: Any) -> str:
        if given in self.labels:
            return str(given)
        found = self._known.get(plain(str(given)))
        if found is None or found not in self.labels:
            raise DataError(
                f"label {given!r} is not in the list{did_you_mean(str(given), self.labels)}; "
                f"labels: {', '.join(self.labels)}"
            )
        return found

    def _read_label(self, text: str) -> Reading:
        lines = [line for line in text.splitlines() if plain(line)]
        first = plain(lines[0]) if lines else ""
        if first in self._known:
            return Reading(self._known[first])
        words = f" {plain(text)} "
        # The label that is named first; of two that begin there, the longer one.
        places = [(words.find(f" {name} "), -len(name), name) for name in self._known]
        named = min((place for place in places if place[0] >= 0), default=None)
        if named is None:
            return Reading(None, (first,) if first else ())
        return Reading(self._known[named[2]])

    def _read_number(self, text: str) -> Reading:
        match = _NUMBER.search(text)
        digits = match[1] if match else (_FIRST_NUMBER.findall(text) or [""])[0]
        # Python refuses to convert thousands of digits.
        number = int(digits) if 0 < len(digits) <= 6 else 0
        if 1 <= number <= len(self.labels):
            return Reading(self.labels[number - 1])
        return Reading(None, (digits[:20],) if digits else ())

    def _read_list(self, text: str) -> Reading:
        inside = re.search(r"\[([^\[\]]*)\]?", text)
        listed = inside[1] if inside else text
        names = [name for name in map(plain, re.split(r"[,;\n]", listed)) if name]
        known = [self._known[name] for name in names if name in self._known]
        unknown = tuple(name for name in names if name not in self._known)
        if not known and (unknown or not inside):
            return Reading(None, unknown)
        return Reading(frozenset(label for label in known if label != NONE), unknown)

    def _read_dictionary(self, text: str) -> Reading:
        inside = re.search(r"\{([^{}]*)\}?", text)
        found: dict[str, list[int]] = {}
        unknown = []
        for name, value in _PAIR.findall(inside[1] if inside else text):
            label, level = self._known.get(plain(name)), self._levels.get(plain(value))
            if label is None or label == NONE or level is None:
                unknown.append(plain(name if label is None else value))
                continue
            found.setdefault(label, []).append(self.values.index(level))
        if not found and (unknown or not inside):
            return Reading(None, tuple(unknown))
        top = len(self.values) - 1
        # Given twice: the highest value wins if it is among them, else the lowest.
        levels = {k: top if top in seen else min(seen) for k, seen in found.items()}
        chosen = {k: self.values[levels[k]] for k in self.labels if k in levels}
        return Reading(chosen, tuple(unknown))


def plain(text: str) -> str:
    """A name as it is compared: lower case, words and digits only, single spaces."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _names(what: str, given: Iterable[str]) -> dict[str, str]:
    """Plain spelling -> name; :class:`ConfigurationError` if two cannot be told apart."""
    names: dict[str, str] = {}
    for name in given:
        if not plain(name):
            raise ConfigurationError(f"a {what} needs letters or digits; {name!r} has none")
        if plain(name) in names:
            raise ConfigurationError(f"{what}s {names[plain(name)]!r} and {name!r} read the same")
        names[plain(name)] = name
    if not names:
        raise ConfigurationError(f"a classification needs {what}s; none were given")
    return names
