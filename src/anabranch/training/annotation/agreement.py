"""From the verdicts of several coders to one label set a row, and how far they agree."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from anabranch.errors import MissingExtra
from anabranch.training.errors import DataError


@dataclass(frozen=True)
class Verdict:
    """A coder's judgement of a proposed label: right or wrong for the row's text."""

    coder: str
    row: str
    label: str
    accepted: bool
    value: str | None = None


@dataclass(frozen=True)
class Decision:
    """The labels of a row (label -> value, None without values).

    ``tied`` are labels on which as many coders said right as wrong; they are among the labels, for
    somebody to look at. No labels: everything that was proposed is wrong.
    """

    labels: Mapping[str, str | None]
    tied: tuple[str, ...] = ()


def aggregate(verdicts: Iterable[Verdict]) -> dict[str, Decision]:
    """Majority of the coders for each row and label; a tie keeps the label and flags it.

    With values, the value that most of the accepting verdicts have; the first one seen of several.
    """
    votes: dict[str, dict[str, list[Verdict]]] = defaultdict(lambda: defaultdict(list))
    for verdict in verdicts:
        votes[verdict.row][verdict.label].append(verdict)
    decisions = {}
    for row, labels in votes.items():
        kept: dict[str, str | None] = {}
        tied = []
        for label, given in labels.items():
            margin = sum(1 if verdict.accepted else -1 for verdict in given)
            if margin < 0:
                continue
            values = Counter(verdict.value for verdict in given if verdict.accepted)
            kept[label] = values.most_common(1)[0][0]
            if margin == 0:
                tied.append(label)
        decisions[row] = Decision(kept, tuple(tied))
    return decisions


@dataclass(frozen=True)
class Agreement:
    """How far coders agree. Kappas are 1 for always, 0 for what chance would give.

    ``cohen`` is of each pair on the judgements that both made; ``fleiss`` of all coders on
    judgements made by the same, largest number of them; NaN where there is too little.
    ``prevalence_adjusted`` is, by label, twice the observed agreement minus 1, which rare labels do
    not depress (Byrt et al., 1993). ``shared`` counts judgements made by two or more.
    """

    cohen: Mapping[tuple[str, str], float]
    fleiss: float
    prevalence_adjusted: Mapping[str, float]
    observed: float
    shared: int


def agreement(verdicts: Iterable[Verdict]) -> Agreement:
    """Agreement on (row, label) judgements."""
    judged: dict[tuple[str, str], dict[str, bool]] = defaultdict(dict)
    for verdict in verdicts:
        judged[verdict.row, verdict.label][verdict.coder] = verdict.accepted
    shared = {key: given for key, given in judged.items() if len(given) > 1}
    coders = sorted({coder for given in judged.values() for coder in given})
    cohen = {}
    for one, other in itertools.combinations(coders, 2):
        both = [(g[one], g[other]) for g in shared.values() if one in g and other in g]
        if both:
            cohen[one, other] = cohen_kappa([a for a, _ in both], [b for _, b in both])
    most = Counter(len(given) for given in shared.values())
    size = max(most, key=lambda n: (most[n], n), default=0)
    counts = [
        [sum(given.values()), size - sum(given.values())]
        for given in shared.values()
        if len(given) == size
    ]
    by_label: dict[str, list[bool]] = defaultdict(list)
    for (_, label), given in shared.items():
        pairs = itertools.combinations(given.values(), 2)
        by_label[label] += [a == b for a, b in pairs]
    every = [same for pairs_of in by_label.values() for same in pairs_of]
    return Agreement(
        cohen,
        fleiss_kappa(counts) if counts else float("nan"),
        {label: 2 * float(np.mean(same)) - 1 for label, same in sorted(by_label.items())},
        float(np.mean(every)) if every else float("nan"),
        len(shared),
    )


def cohen_kappa(first: Sequence[object], second: Sequence[object]) -> float:
    """Cohen's kappa of two coders on the same items (Cohen, 1960).

    1 if both always say the same single thing, where the usual ratio is 0 / 0.
    """
    try:
        from sklearn.metrics import cohen_kappa_score
    except ImportError:
        raise MissingExtra("scikit-learn", "train") from None
    if len(first) != len(second) or not first:
        raise DataError(
            f"kappa compares two coders on the same items; they have {len(first)} and {len(second)}"
        )
    if len({*map(str, first), *map(str, second)}) == 1:
        return 1.0
    return float(cohen_kappa_score([str(x) for x in first], [str(x) for x in second]))


def fleiss_kappa(counts: Sequence[Sequence[int]]) -> float:
    """Fleiss' kappa (1971) from [items, categories] counts of coders, as many for every item.

    1 if everybody always says the same single thing, where the usual ratio is 0 / 0.
    """
    table = np.asarray(counts, dtype=np.float64)
    coders = table.sum(axis=1) if table.ndim == 2 else np.zeros(0)
    if not len(coders) or coders.min() != coders.max() or coders[0] < 2:
        raise DataError(
            "Fleiss' kappa needs items that were each judged by the same number of coders, "
            "at least two"
        )
    n = coders[0]
    observed = ((table**2).sum(axis=1) - n) / (n * (n - 1))
    chance = float(((table.sum(axis=0) / table.sum()) ** 2).sum())
    if chance == 1:
        return 1.0
    return float((observed.mean() - chance) / (1 - chance))
