"""Labelling a corpus: resumable, stopped when answers cannot be read; export of reviewed rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anabranch.training.annotation import Document, LabelScores, Proposal, ReviewQueue
from anabranch.training.annotation.apply import apply, stability_index
from anabranch.training.annotation.export import labelled_rows
from anabranch.training.errors import DataError, TrainingError
from anabranch.training.tasks.classification import ClassificationTask

LABELS = ("bad", "good")
SINGLE = ClassificationTask(LABELS)
MULTI = ClassificationTask(LABELS, "multi")
CORPUS = [Document(str(i), "good text" if i % 3 else "bad text") for i in range(200)]


class Scores:
    """Stands for a model: the label is in the text. Fails after some texts, if asked to."""

    def __init__(self, fails_after: int = 10**9) -> None:
        self.seen = 0
        self._fails_after = fails_after

    def scores(self, texts: Sequence[str]) -> LabelScores:
        self.seen += len(texts)
        if self.seen > self._fails_after:
            raise KeyboardInterrupt
        p = np.array([[0.9, 0.1] if "bad" in text else [0.2, 0.8] for text in texts])
        return LabelScores(LABELS, np.log(p), (0,) if self.seen == len(texts) else ())

    def answers(self, texts: Sequence[str]) -> list[str]:
        return ['["good"]' if "good" in text else "hm" for text in texts]


def run(path: Path, asker: Any, task: ClassificationTask = SINGLE, **options: Any) -> Any:
    return apply(asker, task, CORPUS, path / "out.jsonl", **options)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "out.jsonl").read_text().splitlines()]


def test_every_row_gets_a_label_and_a_probability(tmp_path: Path) -> None:
    done = run(tmp_path, Scores(), audit=0.02)
    rows = lines(tmp_path)
    assert [row["id"] for row in rows] == [document.id for document in CORPUS]
    assert rows[0] == {"id": "0", "label": "bad", "probability": 0.9, "cut": True}
    assert done.labels == {"good": 133, "bad": 67}
    assert (done.rows, done.unread, done.cut) == (200, 0, ["0"])
    assert len(done.audit) == 4 and done.audit == run(tmp_path, Scores(), audit=0.02).audit


def test_an_interrupted_corpus_goes_on_where_it_stopped(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Scores(fails_after=130))
    assert len(lines(tmp_path)) == 128
    with (tmp_path / "out.jsonl").open("a") as file:
        file.write('{"id": "12')  # cut off by a kill
    asker = Scores()
    assert run(tmp_path, asker).rows == 200
    assert asker.seen == 72
    assert [row["id"] for row in lines(tmp_path)] == [document.id for document in CORPUS]


def test_labels_of_something_else_are_not_added_to(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text('{"id": "other"}\n')
    with pytest.raises(DataError, match="labels of other rows"):
        run(tmp_path, Scores())
    (tmp_path / "out.jsonl").write_text("[]\n")
    with pytest.raises(DataError, match=r"out.jsonl:1 is no row of labels"):
        run(tmp_path, Scores())


def test_too_many_unreadable_answers_stop_with_examples(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"22 of 64 answers could not be read.*'hm'"):
        run(tmp_path, Scores(), MULTI)
    assert lines(tmp_path) == []


def test_stability_index_is_zero_for_equal_shares_and_grows() -> None:
    assert stability_index({"a": 100, "b": 50}, {"a": 10_000, "b": 5_000}) < 1e-4
    assert stability_index({"a": 90, "b": 10}, {"a": 50, "b": 50}) > 0.2
    assert stability_index({}, {}) == 0


def test_reviewed_rows_become_training_rows(tmp_path: Path) -> None:
    table = [Document(str(i), f"text {i}") for i in range(4)]
    given = [Proposal(d.id, label, label) for d in table[:3] for label in LABELS]
    with ReviewQueue.create(tmp_path / "q.db", table, given, ["ann"], task={"x": 1}) as queue:
        assert queue.task == {"x": 1}
        judged: dict[str, list[str]] = {}
        for accept in (True, False, False):
            review = queue.next("ann")
            assert review is not None
            judged.setdefault(review.row, []).append(review.label)
            (queue.accept if accept else queue.reject)("ann", review)
        (good, label), (bad, _) = ((row, labels[0]) for row, labels in judged.items())
        found = labelled_rows(queue, "single", LABELS)
        assert found.rows == [{"id": good, "text": f"text {good}", "label": label}]
        assert found.unlabelled == sorted([bad, "3"])  # nothing was proposed for the last one
        assert len(found.waiting) == 1
        with_none = labelled_rows(queue, "single", (*LABELS, "none"))
        assert {"id": bad, "text": f"text {bad}", "label": "none"} in with_none.rows
