"""Several models propose labels for every row; people judge the proposals later."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from anabranch.errors import ConfigurationError
from anabranch.models.progress import Progress, silent
from anabranch.training.annotation.scoring import Asker
from anabranch.training.annotation.table import Document, require_unique
from anabranch.training.tasks.classification import ClassificationTask


@dataclass(frozen=True)
class Proposal:
    """One model's label for one row. ``value`` is of kind ``valued`` only.

    ``probability`` is there when the model scored labels.
    """

    row: str
    label: str
    model: str
    value: str | None = None
    probability: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Labelled:
    """What one labeller says about one text: label -> (value, probability)."""

    labels: Mapping[str, tuple[str | None, float | None]]
    readable: bool = True


class Labeller(ABC):
    """Labels texts; ``name`` says who it was."""

    name: str

    @abstractmethod
    def label(self, texts: Sequence[str]) -> list[Labelled]:
        """One answer a text."""


class ModelLabeller(Labeller):
    """A model and a prompt. Scores labels where one applies, reads written answers elsewhere."""

    def __init__(self, name: str, asker: Asker, task: ClassificationTask) -> None:
        self.name = name
        self._asker = asker
        self._task = task

    def label(self, texts: Sequence[str]) -> list[Labelled]:
        """The most probable label, or what the answer says."""
        if self._task.kind == "single":
            scores = self._asker.scores(texts)
            best = scores.log_probabilities.max(axis=1)
            return [
                Labelled({label: (None, float(p))})
                for label, p in zip(scores.best, np.exp(best), strict=True)
            ]
        return [self._read(answer) for answer in self._asker.answers(texts)]

    def _read(self, answer: str) -> Labelled:
        value = self._task.parse(answer)
        if value is None:
            return Labelled({}, readable=False)
        levels = value if isinstance(value, Mapping) else dict.fromkeys(value)
        return Labelled({label: (level, None) for label, level in levels.items()})


class Crowd:
    """Labellers of different minds: other models, other prompts."""

    def __init__(self, members: Sequence[Labeller]) -> None:
        names = [member.name for member in members]
        if not names or len(set(names)) < len(names):
            raise ConfigurationError(
                f"a crowd needs labellers with names of their own, not {', '.join(names) or 'none'}"
            )
        self._members = members
        self.unread: dict[str, int] = {}
        """Answers of the last table that could not be read, by labeller."""

    def propose(
        self, table: Sequence[Document], progress: Progress = silent, chunk: int = 256
    ) -> list[Proposal]:
        """Every member's labels for every row, ordered by row."""
        require_unique(table)
        self.unread = dict.fromkeys((member.name for member in self._members), 0)
        found: list[list[Proposal]] = [[] for _ in table]
        done, work = 0, len(self._members) * len(table)
        for member in self._members:
            for start in range(0, len(table), chunk):
                progress(f"{member.name}: {start} of {len(table)} rows", done / work)
                part = table[start : start + chunk]
                answers = member.label([document.text for document in part])
                for offset, (document, answer) in enumerate(zip(part, answers, strict=True)):
                    self.unread[member.name] += not answer.readable
                    for label, (value, probability) in answer.labels.items():
                        found[start + offset].append(
                            Proposal(document.id, label, member.name, value, probability)
                        )
                done += len(part)
        return [proposal for row in found for proposal in row]
