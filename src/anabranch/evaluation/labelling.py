"""What labelling costs: simulated labellers and coders on the real review queue."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anabranch.training.annotation.agreement import aggregate
from anabranch.training.annotation.crowd import Crowd, Labelled, Labeller
from anabranch.training.annotation.queue import ReviewQueue
from anabranch.training.annotation.table import Document


class Erring(Labeller):
    """Knows every text's label and says another one in a share of the cases."""

    def __init__(
        self, truth: dict[str, str], labels: Sequence[str], error: float, seed: int
    ) -> None:
        self.name = f"wrong in {error:.0%}"
        self._truth = truth
        self._labels = labels
        self._error = error
        self._random = random.Random(seed)

    def label(self, texts: Sequence[str]) -> list[Labelled]:
        """One label a text."""
        return [Labelled({self._one(self._truth[text]): (None, None)}) for text in texts]

    def _one(self, truth: str) -> str:
        if self._random.random() >= self._error:
            return truth
        return self._random.choice([label for label in self._labels if label != truth])


@dataclass(frozen=True)
class Effort:
    """What one way of labelling costs and yields.

    ``clicks`` are what a coder does beside reading: for full assignment one choice a row; for
    rejection one a wrong label and one to send a page, and one choice for each row that nothing
    right was proposed for. ``judged`` counts the labels that were looked at. ``quality`` is the
    share of rows with the true label.
    """

    clicks: int
    judged: int
    quality: float


def full_assignment(
    truth: dict[str, str], labels: Sequence[str], error: float, seed: int
) -> Effort:
    """A coder chooses a label for every row and is wrong in a share of them."""
    coder = Erring(truth, labels, error, seed)
    said = coder.label(list(truth))
    right = sum(t in labelled.labels for t, labelled in zip(truth.values(), said, strict=True))
    return Effort(len(truth), len(truth) * len(labels), right / len(truth))


def rejection(
    truth: dict[str, str],
    labels: Sequence[str],
    labeller_errors: Sequence[float],
    error: float,
    seed: int,
    page: int = 20,
    complete: bool = True,
) -> Effort:
    """Labellers propose, a coder rejects from pages, judging wrongly in a share of the cases.

    ``complete``: rows with everything rejected are assigned by the coder, else they stay without.
    """
    crowd = Crowd([Erring(truth, labels, e, seed * 100 + i) for i, e in enumerate(labeller_errors)])
    table = [Document(str(i), text) for i, text in enumerate(truth)]
    chance = random.Random(seed)
    clicks = judged = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "queue.db"
        with ReviewQueue.create(path, table, crowd.propose(table), ["coder"]) as queue:
            while shown := queue.page("coder", page):
                wrong = [
                    review
                    for review in shown
                    if (truth[review.text] != review.label) != (chance.random() < error)
                ]
                queue.reject("coder", *wrong)
                queue.accept("coder", *(review for review in shown if review not in wrong))
                clicks += len(wrong) + 1
                judged += len(shown)
            decisions = aggregate(queue.export())
    coder = Erring(truth, labels, error, seed + 1)
    right = 0
    for document in table:
        found = set(decisions[document.id].labels)
        if not found and complete:
            found = set(coder.label([document.text])[0].labels)
            clicks += 1
            judged += len(labels)
        right += found == {truth[document.text]}
    return Effort(clicks, judged, right / len(truth) if truth else math.nan)
