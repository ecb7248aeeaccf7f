"""What a job wants to know of a model besides its losses: its ``evaluations``.

Each is a benchmark (:mod:`anabranch.evaluation.benchmarks`), or ``recipe``: the evaluations that
the recipe lists, on the recipe's own rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anabranch.errors import ConfigurationError
from anabranch.evaluation.benchmarks import Benchmark, Subject
from anabranch.models.progress import Progress, silent
from anabranch.training.scores import Scores
from anabranch.training.setup import HeldOut, Setup

RECIPE = "recipe"


class Examination:
    """Asks the model of a set-up, with whatever weights it has at that time.

    Made before anything is trained: data that are missing are missed now, with
    :class:`DataError`.
    """

    def __init__(
        self, benchmarks: Mapping[str, Benchmark[Any]], recipe: bool, setup: Setup
    ) -> None:
        if recipe and not setup.recipe.evaluate:
            raise ConfigurationError(
                "evaluations: recipe means the recipe's evaluations, and there are none here; a "
                "coordinator over a network has benchmarks only"
            )
        self._benchmarks, self._recipe, self._setup = benchmarks, recipe, setup
        self._subject = Subject.of(setup)
        for benchmark in benchmarks.values():
            benchmark.questions  # noqa: B018 - read once, and kept

    def __bool__(self) -> bool:
        return self._recipe or bool(self._benchmarks)

    def __call__(self, progress: Progress = silent) -> dict[str, float]:
        """``task/<label>`` and figures below it; ``nll/<name>`` of the recipe's evaluations."""
        figures: dict[str, float] = {}
        if self._recipe:
            for name, scores in self._setup.evaluate(False, progress).items():
                figures |= recipe_figures(name, self._setup.held_out[name], scores)
        for label, benchmark in self._benchmarks.items():
            figures |= benchmark.examine(self._subject, progress).figures(label)
        return figures


def recipe_figures(name: str, held_out: HeldOut, scores: Scores) -> dict[str, float]:
    """Answer NLL per token, and the task's figures of generated answers, for each source."""
    tokens = sum(row[0] for row in scores.tokens)
    figures = {f"nll/{name}": sum(row[0] for row in scores.nll) / tokens}
    by_source: dict[str, list[int]] = {}
    for place, index in enumerate(scores.asked):
        by_source.setdefault(held_out.rows[index].source, []).append(place)
    for source, places in by_source.items():
        rows = [held_out.rows[scores.asked[place]] for place in places]
        task = rows[0].task
        found = task.score(
            [task.parse(scores.answers[place]) for place in places],
            [task.reference(row.row) for row in rows],
        )
        label = name if len(by_source) == 1 else f"{name}.{source}"
        for number, (figure, value) in enumerate(found.items()):
            figures[f"task/{label}/{figure}" if number else f"task/{label}"] = value
        if found:
            figures[f"task/{label}/rows"] = len(places)
    return figures
