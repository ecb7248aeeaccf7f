"""What a benchmark is, whom it examines, and what comes of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

import numpy as np

from anabranch.errors import ConfigurationError
from anabranch.models.progress import Progress, silent
from anabranch.training.data.sources import SourceRow, read
from anabranch.training.errors import DataError
from anabranch.training.packing import Packing
from anabranch.training.recipe import Data, Generate
from anabranch.training.scores import generate_answers
from anabranch.training.setup import Setup
from anabranch.training.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Question = TypeVar("Question")
Asked = Literal["plain", "template"]
"""As running text, or as a conversation by the recipe's template."""


@dataclass(frozen=True)
class Subject:
    """Who is examined: a language model, and how it is talked to.

    ``context`` is the most tokens that it takes. ``packing`` and ``micro_batch_tokens`` are the
    trainer's, so that an adapter that cannot be packed is not.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    template: Template
    context: int
    packing: Packing = "bfd"
    micro_batch_tokens: int = 4096

    @classmethod
    def of(cls, setup: Setup) -> Subject:
        """The model of a recipe, with the weights that it has when it is examined."""
        options = setup.recipe.train
        return cls(
            setup.model,
            setup.base.tokenizer,
            setup.template,
            setup.base.card.context_length,
            options.packing,
            options.micro_batch_tokens,
        )

    def require_room(self, tokens: int, where: str) -> None:
        """:class:`DataError` unless so many tokens fit; nothing is cut off silently."""
        if tokens > self.context:
            raise DataError(
                f"{where}: the question takes {tokens} tokens, the model at most {self.context}; "
                f"ask with fewer shots or max_tokens, or leave such rows out"
            )


def answers(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    batch: int,
    label: str,
    progress: Progress = silent,
) -> list[str]:
    """What a subject writes greedily after each prompt of token ids, ``batch`` at a time."""
    return generate_answers(
        subject.model,
        subject.tokenizer,
        prompts,
        subject.template.end_tokens,
        Generate(rows=len(prompts), max_tokens=max_tokens, batch=batch),
        lambda message, fraction: progress(f"{label}: {message}", fraction),
    )


@dataclass(frozen=True)
class Result:
    """A benchmark's outcome.

    ``score`` is the share of ``rows`` answered rightly, ``chance`` what guessing gets on average.
    ``others`` are further figures of the same answers.
    """

    score: float
    rows: int
    chance: float = 0.0
    others: Mapping[str, float] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """Standard error of the score over rows, sqrt(p (1 - p) / n)."""
        return math.sqrt(self.score * (1 - self.score) / self.rows)

    def figures(self, label: str) -> dict[str, float]:
        """``task/<label>`` and, below it, all the rest."""
        rest = {"error": self.error, "chance": self.chance, "rows": self.rows, **self.others}
        return {f"task/{label}": self.score} | {f"task/{label}/{n}": v for n, v in rest.items()}


class Benchmark(ABC, Generic[Question]):
    """Questions to a model.

    ``limit`` takes that many questions, chosen by ``seed``: all models of a table are asked the
    same. ``label`` is what the figures are called, by default the name.
    """

    name: ClassVar[str]

    def __init__(self, limit: int | None = None, seed: int = 0, label: str | None = None) -> None:
        if limit is not None and limit < 1:
            raise ConfigurationError(f"limit is at least 1, not {limit}")
        if label is not None and (not label or "/" in label):
            raise ConfigurationError(f"label is a name without a slash, not {label!r}")
        self.limit, self.seed = limit, seed
        self.label = label or self.name

    @abstractmethod
    def read(self) -> Sequence[Question]:
        """All questions. Raises :class:`DataError` naming the row, or how to get the data."""

    @abstractmethod
    def ask(
        self, subject: Subject, questions: Sequence[Question], progress: Progress = silent
    ) -> Result:
        """What a model makes of questions, of which there is at least one."""

    @cached_property
    def questions(self) -> list[Question]:
        """Those that are asked, read once; :class:`DataError` without any."""
        found = self.read()
        if not found:
            raise DataError(f"{self.label} has no questions")
        chosen = np.random.default_rng(self.seed).permutation(len(found))[: self.limit]
        return [found[index] for index in sorted(chosen.tolist())]

    def examine(self, subject: Subject, progress: Progress = silent) -> Result:
        """Ask the model all questions."""
        return self.ask(subject, self.questions, progress)


def rows_of(source: str, path: Path | None = None) -> list[SourceRow]:
    """Rows of a file or a built-in set, read as a recipe reads them.

    Raises :class:`DataError` naming file and line.
    """
    return read(Data(name="rows", source=source, path=path), 0).rows
