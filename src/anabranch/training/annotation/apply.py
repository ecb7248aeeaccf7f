"""Labelling a whole corpus with a trained model: resumable, with a sample for people to check."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.models.progress import Progress, silent
from anabranch.training.annotation.scoring import Asker
from anabranch.training.annotation.table import Document
from anabranch.training.errors import DataError, TrainingError
from anabranch.training.tasks.classification import ClassificationTask, Reading

UNREAD_LIMIT = 0.2
"""Share of answers that may be unreadable before labelling stops."""
CHUNK = 64


@dataclass(frozen=True)
class Applied:
    """``labels`` counts rows by label; ``cut`` are ids of texts longer than the context."""

    rows: int
    labels: Mapping[str, int]
    unread: int
    cut: Sequence[str]
    audit: Sequence[str]


def apply(
    asker: Asker,
    task: ClassificationTask,
    documents: Sequence[Document],
    output: Path,
    audit: float = 0.01,
    seed: int = 0,
    progress: Progress = silent,
) -> Applied:
    """Label every document into a JSONL file; go on where an earlier call was interrupted.

    A line has ``id``, ``label`` and ``probability`` (single) or ``labels``, None where the answer
    could not be read, and ``cut`` for texts longer than the context. A share ``audit`` of the rows,
    at least one, is drawn for people to check. Raises :class:`TrainingError` when more than a fifth
    of the answers cannot be read, with examples.
    """
    done = _finished(output, {document.id for document in documents})
    left = [document for document in documents if document.id not in done]
    rows = list(done.values())
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a", encoding="utf-8") as file:
        for start in range(0, len(left), CHUNK):
            progress(f"labelled {len(rows)} of {len(documents)} rows", len(rows) / len(documents))
            answered = _label(asker, task, left[start : start + CHUNK])
            rows += [row for row, _ in answered]
            _require_readable(rows, [said for _, said in answered])
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row, _ in answered)
            file.flush()
            os.fsync(file.fileno())
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(row["labels"] or () if "labels" in row else [row["label"]])
    chosen = random.Random(seed).sample(
        [document.id for document in documents],
        min(len(documents), max(1, round(audit * len(documents)))) if audit else 0,
    )
    return Applied(
        len(rows),
        dict(counts.most_common()),
        sum(_unread(row) for row in rows),
        [row["id"] for row in rows if row.get("cut")],
        chosen,
    )


def stability_index(expected: Mapping[str, int], actual: Mapping[str, int]) -> float:
    """Population stability index of label counts: 0 for equal shares, above 0.2 a real shift.

    Sum of (p - q) log(p / q) over labels; half a row is added to each count.
    """
    names = sorted({*expected, *actual})
    if not names:
        return 0.0
    shares = []
    for counts in (expected, actual):
        given = np.array([counts.get(name, 0) + 0.5 for name in names])
        shares.append(given / given.sum())
    p, q = shares
    return float(((p - q) * np.log(p / q)).sum())


def _label(
    asker: Asker, task: ClassificationTask, documents: Sequence[Document]
) -> list[tuple[dict[str, Any], str]]:
    """Rows with what the model said."""
    texts = [document.text for document in documents]
    if task.kind == "single":
        scores = asker.scores(texts)
        probabilities = np.exp(scores.log_probabilities.max(axis=1))
        return [
            (
                {"id": d.id, "label": label, "probability": round(float(p), 6)}
                | ({"cut": True} if index in scores.cut else {}),
                label,
            )
            for index, (d, label, p) in enumerate(
                zip(documents, scores.best, probabilities, strict=True)
            )
        ]
    answers = asker.answers(texts)
    readings = [task.read(answer) for answer in answers]
    return [
        ({"id": d.id, "labels": _plain(reading)}, answer)
        for d, reading, answer in zip(documents, readings, answers, strict=True)
    ]


def _plain(reading: Reading) -> Any:
    return sorted(reading.value) if isinstance(reading.value, frozenset) else reading.value


def _unread(row: Mapping[str, Any]) -> bool:
    return row.get("labels", row.get("label")) is None


def _require_readable(rows: Sequence[Mapping[str, Any]], said: Sequence[str]) -> None:
    unread = sum(map(_unread, rows))
    if unread <= UNREAD_LIMIT * len(rows):
        return
    new = rows[len(rows) - len(said) :]
    examples = [answer for row, answer in zip(new, said, strict=True) if _unread(row)][:3]
    shown = "; ".join(f"{example!r:.80}" for example in examples)
    raise TrainingError(
        f"{unread} of {len(rows)} answers could not be read, for example {shown}; train the model "
        f"on more rows, or change the prompt"
    )


def _finished(output: Path, wanted: set[str]) -> dict[str, dict[str, Any]]:
    """Rows of an interrupted call; a line that was cut off is removed from the file."""
    if not output.exists():
        return {}
    content = output.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    found = {}
    for number, line in enumerate(whole.decode("utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            found[row["id"]] = row
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{output}:{number} is no row of labels ({error}); choose another output"
            ) from error
    if strange := set(found) - wanted:
        raise DataError(
            f"{output} has labels of other rows ({min(strange)!r}); choose another output"
        )
    if len(whole) < len(content):
        os.truncate(output, len(whole))
    return found
