"""From a reviewed queue to rows that a classification task trains on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anabranch.training.annotation.agreement import Decision, aggregate
from anabranch.training.annotation.queue import ReviewQueue
from anabranch.training.tasks.classification import NONE, Kind


@dataclass(frozen=True)
class Labels:
    """``rows`` have ``id``, ``text`` and ``label`` or ``labels``. The others were left out.

    ``waiting`` rows are not judged by all their coders yet, ``unlabelled`` ones have no right
    proposal (and the task no label ``none``), ``tied`` ones are among the rows, for a look.
    """

    rows: list[dict[str, Any]]
    waiting: list[str]
    unlabelled: list[str]
    tied: list[str]


def labelled_rows(queue: ReviewQueue, kind: Kind, labels: tuple[str, ...]) -> Labels:
    """What was proposed and not rejected, by the majority of the coders.

    Of a single label that is tied with another one, the first accepted stays. Rows for which
    nothing was proposed count as everything rejected.
    """
    decisions = aggregate(queue.export())
    finished = queue.finished()
    found = Labels([], [], [], [])
    for row, text in queue.documents().items():
        if row not in finished:
            found.waiting.append(row)
            continue
        decision = decisions.get(row, Decision({}))
        if decision.tied:
            found.tied.append(row)
        value = _value(decision.labels, kind, labels)
        if value is None:
            found.unlabelled.append(row)
            continue
        found.rows.append({"id": row, "text": text, **value})
    return found


def _value(
    chosen: Mapping[str, str | None], kind: Kind, labels: tuple[str, ...]
) -> dict[str, Any] | None:
    if kind == "valued":
        return {"labels": dict(chosen)}
    if kind == "multi":
        return {"labels": sorted(chosen)}
    if chosen:
        return {"label": next(iter(chosen))}
    return {"label": NONE} if NONE in labels else None
