"""Proposals, the review queue, aggregation and agreement."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sklearn.metrics import cohen_kappa_score

from anabranch.errors import ConfigurationError
from anabranch.training.annotation import (
    Crowd,
    Document,
    Labelled,
    Labeller,
    ModelLabeller,
    Proposal,
    QueueLocked,
    ReviewQueue,
    Verdict,
    aggregate,
    agreement,
    cohen_kappa,
    conflicting,
    fleiss_kappa,
    read_documents,
)
from anabranch.training.annotation.queue import assign
from anabranch.training.errors import DataError
from anabranch.training.tasks.classification import ClassificationTask

TABLE = [Document(f"d{i}", f"text {i}") for i in range(6)]


class Says(Labeller):
    """Labels by a fixed rule."""

    def __init__(self, name: str, labels: Sequence[str]) -> None:
        self.name = name
        self._labels = labels

    def label(self, texts: Sequence[str]) -> list[Labelled]:
        return [Labelled(dict.fromkeys(self._labels, (None, 0.5))) for _ in texts]


def proposals(*votes: str, table: Sequence[Document] = TABLE) -> list[Proposal]:
    """For every row, one model a vote."""
    return [
        Proposal(document.id, label, f"m{i}") for document in table for i, label in enumerate(votes)
    ]


def queue(
    path: Path, given: Sequence[Proposal], coders: Sequence[str] = ("ann",), **options: Any
) -> ReviewQueue:
    return ReviewQueue.create(path / "q.db", TABLE, given, coders, **options)


def test_a_crowd_proposes_by_row_and_counts_what_it_cannot_read() -> None:
    class Mumbles(Labeller):
        name = "mumbles"

        def label(self, texts: Sequence[str]) -> list[Labelled]:
            return [Labelled({}, readable=False) for _ in texts]

    crowd = Crowd([Says("a", ["x", "y"]), Says("b", ["x"]), Mumbles()])
    found = crowd.propose(TABLE[:2], chunk=1)
    assert [(p.row, p.label, p.model) for p in found] == [
        ("d0", "x", "a"), ("d0", "y", "a"), ("d0", "x", "b"),
        ("d1", "x", "a"), ("d1", "y", "a"), ("d1", "x", "b"),
    ]  # fmt: skip
    assert crowd.unread == {"a": 0, "b": 0, "mumbles": 2}
    assert crowd.propose([]) == []
    with pytest.raises(ConfigurationError, match="names of their own"):
        Crowd([Says("a", []), Says("a", [])])
    with pytest.raises(DataError, match="'d0' comes twice"):
        crowd.propose([TABLE[0], TABLE[0]])


def test_a_model_proposes_what_it_writes_for_several_labels() -> None:
    class Writes:
        def answers(self, texts: Sequence[str]) -> list[str]:
            return ['{"joy": "high"}', "what?"]

    task = ClassificationTask(["joy", "fear"], "valued")
    asker: Any = Writes()
    first, second = ModelLabeller("m", asker, task).label(["a", "b"])
    assert first == Labelled({"joy": ("high", None)})
    assert not second.readable


def test_a_single_queue_shows_the_most_voted_label_and_the_next_only_after_a_rejection(
    tmp_path: Path,
) -> None:
    with queue(tmp_path, proposals("x", "y", "y")) as reviews:
        seen = []
        first = reviews.next("ann")
        assert first is not None and (first.label, first.votes) == ("y", 2)
        reviews.reject("ann", first)
        second = reviews.next("ann")
        assert second is not None and (second.row, second.label) == (first.row, "x")
        reviews.accept("ann", second)
        while review := reviews.next("ann"):
            seen.append((review.row, review.label))
            reviews.accept("ann", review)
        assert len(seen) == len(set(seen)) == 5
        assert {label for _, label in seen} == {"y"}
        assert reviews.remaining("ann") == 0
        decisions = aggregate(reviews.export())
        assert decisions[first.row].labels == {"x": None}
        assert sum("y" in d.labels for d in decisions.values()) == 5


def test_every_label_of_a_multi_queue_is_judged_on_its_own(tmp_path: Path) -> None:
    with queue(tmp_path, proposals("x", "y"), single=False) as reviews:
        for _ in range(12):
            review = reviews.next("ann")
            assert review is not None
            (reviews.accept if review.label == "x" else reviews.reject)("ann", review)
        assert reviews.next("ann") is None
        assert all(set(d.labels) == {"x"} for d in aggregate(reviews.export()).values())


def test_a_page_is_accepted_but_for_what_is_rejected(tmp_path: Path) -> None:
    with queue(tmp_path, proposals("x", "y", "y")) as reviews:
        page = reviews.page("ann", 4)
        assert len({review.row for review in page}) == 4
        reviews.reject("ann", page[0])
        reviews.accept("ann", *page[1:])
        assert reviews.remaining("ann") == 3
        assert reviews.page("ann", 1)[0].row == page[0].row


def test_undo_takes_back_one_verdict_at_a_time(tmp_path: Path) -> None:
    with queue(tmp_path, proposals("x")) as reviews:
        assert reviews.undo("ann") is None
        first = reviews.next("ann")
        assert first is not None
        reviews.accept("ann", first)
        second = reviews.next("ann")
        assert second is not None
        reviews.reject("ann", second)
        assert reviews.undo("ann") == Verdict("ann", second.row, "x", False)
        assert reviews.next("ann") == second
        assert reviews.undo("ann") == Verdict("ann", first.row, "x", True)
        assert reviews.next("ann") == first
        assert reviews.export() == []
        reviews.reject("ann", first)  # judged again, differently
        assert [v.accepted for v in reviews.export()] == [False]


class Reviewing(RuleBasedStateMachine):
    """Whatever coders do, no judged pair is shown again and the log adds up."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "q.db"
        given = proposals("x", "y", "y", "z")
        self.queue = ReviewQueue.create(self.path, TABLE, given, ["a", "b"], overlap=0.5)
        self.log: dict[str, list[tuple[str, str, bool]]] = {"a": [], "b": []}

    @rule(coder=st.sampled_from("ab"), accept=st.booleans())
    def judge(self, coder: str, accept: bool) -> None:
        review = self.queue.next(coder)
        if review is None:
            return
        pair = (review.row, review.label)
        assert pair not in [(row, label) for row, label, _ in self.log[coder]]
        accepted_rows = [row for row, _, yes in self.log[coder] if yes]
        assert review.row not in accepted_rows
        (self.queue.accept if accept else self.queue.reject)(coder, review)
        self.log[coder].append((*pair, accept))

    @precondition(lambda self: any(self.log.values()))
    @rule(coder=st.sampled_from("ab"))
    def undo(self, coder: str) -> None:
        taken = self.queue.undo(coder)
        assert (taken is None) == (not self.log[coder])
        if taken is not None:
            assert self.log[coder].pop() == (taken.row, taken.label, taken.accepted)

    @rule()
    def reopen(self) -> None:
        self.queue.close()
        self.queue = ReviewQueue.open(self.path)

    @invariant()
    def the_export_is_the_log(self) -> None:
        exported = self.queue.export()
        for coder, log in self.log.items():
            mine = [(v.row, v.label, v.accepted) for v in exported if v.coder == coder]
            assert mine == log

    def teardown(self) -> None:
        self.queue.close()
        self.folder.cleanup()


TestReviewing = Reviewing.TestCase
TestReviewing.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)


def test_exported_verdicts_load_into_a_fresh_queue(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with (
        queue(tmp_path, proposals("x", "y")) as one,
        queue(tmp_path / "other", proposals("x", "y")) as other,
    ):
        for accept in (one.accept, one.reject, one.accept):
            review = one.next("ann")
            assert review is not None
            accept("ann", review)
        lines = [json.dumps(asdict(v)) for v in one.export()]
        other.load(Verdict(**json.loads(line)) for line in lines)
        assert other.export() == one.export()
        assert other.next("ann") == one.next("ann")
        with pytest.raises(DataError, match="has judged"):
            other.load(one.export()[:1])
        good = Verdict("ann", "d5", "x", True)
        open_before = other.export()
        with pytest.raises(DataError, match="'nothing' of row 'd0'"):
            other.load([good, Verdict("ann", "d0", "nothing", True)])
        assert other.export() == open_before  # all or none


def test_two_processes_cannot_work_on_one_queue(tmp_path: Path) -> None:
    with (
        queue(tmp_path, proposals("x")) as reviews,
        pytest.raises(QueueLocked, match="another process"),
    ):
        ReviewQueue.open(reviews.path)
    ReviewQueue.open(tmp_path / "q.db").close()


def test_a_killed_coder_loses_nothing_that_was_judged(tmp_path: Path) -> None:
    queue(tmp_path, proposals("x")).close()
    code = (
        "import os, sys; from pathlib import Path\n"
        "from anabranch.training.annotation import ReviewQueue\n"
        "q = ReviewQueue.open(Path(sys.argv[1]))\n"
        "for _ in range(3): q.accept('ann', q.next('ann'))\n"
        "os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "q.db")], timeout=120)
    assert killed.returncode == -9
    with ReviewQueue.open(tmp_path / "q.db") as reviews:
        assert len(reviews.export()) == 3
        assert reviews.remaining("ann") == 3


@given(
    rows=st.integers(0, 40),
    coders=st.integers(1, 5),
    each=st.integers(1, 3),
    overlap=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_assignment_covers_every_row_and_is_even(
    rows: int, coders: int, each: int, overlap: float, seed: int
) -> None:
    each = min(each, coders)
    names = [f"c{i}" for i in range(coders)]
    found = assign([str(i) for i in range(rows)], names, each, overlap, random.Random(seed))
    times = [sum(str(i) in own for own in found.values()) for i in range(rows)]
    extra = math.ceil(overlap * rows) if coders > each else 0
    assert sorted(times) == [each] * (rows - extra) + [each + 1] * extra
    loads = [len(own) for own in found.values()]
    assert max(loads) - min(loads) <= 1
    assert all(len(set(own)) == len(own) for own in found.values())


def test_what_a_queue_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="coders need names"):
        queue(tmp_path, [], coders=["a", "a"])
    with pytest.raises(ConfigurationError, match="coders_per_row must be 1 to 1"):
        queue(tmp_path, [], coders_per_row=2)
    with pytest.raises(ConfigurationError, match="overlap"):
        queue(tmp_path, [], overlap=1.5)
    with pytest.raises(DataError, match="row 'nowhere'"):
        queue(tmp_path, [Proposal("nowhere", "x", "m")])
    assert not (tmp_path / "q.db").exists()
    with queue(tmp_path, proposals("x")) as reviews:
        with pytest.raises(DataError, match=r"no coder named 'an' \(did you mean 'ann'"):
            reviews.next("an")
        assert reviews.unproposed() == []
    with pytest.raises(ConfigurationError, match="exists"):
        queue(tmp_path, [])
    with pytest.raises(DataError, match="there is no queue"):
        ReviewQueue.open(tmp_path / "none.db")
    (tmp_path / "text.db").write_text("not a database, but long enough to look like one" * 9)
    with pytest.raises(DataError, match="is no review queue"):
        ReviewQueue.open(tmp_path / "text.db")


def test_rows_without_proposals_are_listed(tmp_path: Path) -> None:
    with queue(tmp_path, proposals("x", table=TABLE[:4])) as reviews:
        assert reviews.unproposed() == ["d4", "d5"]
        assert reviews.remaining("ann") == 4


def test_a_large_queue_answers_at_once(tmp_path: Path) -> None:
    table = [Document(str(i), "text") for i in range(20_000)]
    given = proposals("x", "y", table=table)
    with ReviewQueue.create(tmp_path / "q.db", table, given, ["ann"]) as reviews:
        began = time.perf_counter()
        review = reviews.next("ann")
        assert review is not None
        reviews.accept("ann", review)
        assert time.perf_counter() - began < 1


def verdicts(*rows: tuple[str, str, str, bool]) -> list[Verdict]:
    return [Verdict(*row) for row in rows]


def test_the_majority_decides_and_a_tie_is_kept_and_flagged() -> None:
    given = verdicts(
        ("a", "1", "x", True), ("b", "1", "x", True), ("c", "1", "x", False),
        ("a", "1", "y", False), ("b", "1", "y", True),
        ("a", "2", "x", False),
    )  # fmt: skip
    decisions = aggregate(given)
    assert decisions["1"].labels == {"x": None, "y": None}
    assert decisions["1"].tied == ("y",)
    assert decisions["2"].labels == {}
    assert aggregate([]) == {}


def test_kappa_on_textbook_tables() -> None:
    # 20 both yes, 15 both no, 5 and 10 apart: 0.4 (the usual worked example of Cohen's kappa).
    first = ["y"] * 20 + ["y"] * 5 + ["n"] * 10 + ["n"] * 15
    second = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa(first, second) == pytest.approx(cohen_kappa_score(first, second))
    # Fleiss (1971) as worked on Wikipedia: 10 items, 14 coders, 5 categories.
    counts = [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]  # fmt: skip
    assert fleiss_kappa(counts) == pytest.approx(0.210, abs=5e-4)
    assert fleiss_kappa([[3, 0], [3, 0]]) == cohen_kappa(["a"], ["a"]) == 1
    assert fleiss_kappa([[2, 0], [0, 2]]) == 1
    with pytest.raises(DataError, match="same number of coders"):
        fleiss_kappa([[2, 0], [3, 0]])
    with pytest.raises(DataError, match="same items"):
        cohen_kappa([], [])


def test_agreement_of_several_coders() -> None:
    given = verdicts(
        ("a", "1", "x", True), ("b", "1", "x", True),
        ("a", "2", "x", True), ("b", "2", "x", False),
        ("a", "3", "y", False), ("b", "3", "y", False),
        ("a", "4", "y", True),
    )  # fmt: skip
    found = agreement(given)
    assert found.shared == 3
    assert found.observed == pytest.approx(2 / 3)
    assert found.prevalence_adjusted == pytest.approx({"x": 0.0, "y": 1.0})
    assert found.cohen[("a", "b")] == pytest.approx(
        cohen_kappa_score([True, True, False], [True, False, False])
    )
    assert found.fleiss == pytest.approx(fleiss_kappa([[2, 0], [1, 1], [0, 2]]))
    alone = agreement(verdicts(("a", "1", "x", True)))
    assert alone.shared == 0 and math.isnan(alone.fleiss) and alone.cohen == {}


def test_documents_come_from_files_with_their_ids(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "one", "id": 7}\n{"text": "two"}\n')
    first, second = read_documents(path)
    assert (first.id, first.text, second.id) == ("7", "one", "2")
    (tmp_path / "t.csv").write_text("body,id\nhello,1\n")
    assert read_documents(tmp_path / "t.csv", text="body")[0].text == "hello"
    path.write_text('{"text": "one", "id": 7}\n{"text": "two", "id": 7}\n')
    with pytest.raises(DataError, match="'7' comes twice"):
        read_documents(path)
    path.write_text('{"text": " "}\n')
    with pytest.raises(DataError, match=r"t\.jsonl:1.*column 'text' has no text"):
        read_documents(path)


def test_texts_with_different_labels_are_found() -> None:
    rows = [("a  b", "x"), ("a b", "y"), ("c", "x"), ("c", "x")]
    assert conflicting(rows) == [("a b", ["x", "y"])]
