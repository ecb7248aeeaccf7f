"""The best options of a federation, by successive halving."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from anabranch.errors import ConfigurationError
from anabranch.files import write_text
from anabranch.jobs.kinds.base import JobKind, Terms, anabranch, as_file
from anabranch.jobs.layout import OUTPUT


class SearchSpec(Terms):
    """``job`` is the YAML of ``anabranch federate``, ``vary`` what is tried: KEY=VALUE,VALUE.

    Of all combinations ``trials`` are drawn, by default all; one in ``factor`` goes on from rung to
    rung, and the lowest ``metric`` wins.
    """

    job: str
    vary: Annotated[list[str], Field(min_length=1)]
    trials: Annotated[int | None, Field(ge=1)] = None
    factor: Annotated[int, Field(ge=2)] = 3
    metric: str = "valid/loss"


class Search(JobKind[SearchSpec]):
    """``anabranch federation search``: options of a federation are tried, the best for longer."""

    name = "search"
    spec = SearchSpec
    heading = "Searches"
    example = """\
# The text of a job file, docs/federation.md
job: |
  federate: silos
  recipe: arithmetic
  clients: {count: 4, split: {name: iid}}
  schedule: {rounds: 9}
  local: {steps: 5}
vary:
  - recipe.train.lr=1e-4,1e-3
"""

    def from_words(self, words: Sequence[str]) -> dict[str, Any]:
        """A job file, then what is varied; relative paths in it are from where it lies."""
        from anabranch.federated.job import load_job
        from anabranch.training.recipe_file import dump_yaml

        if not words:
            raise ConfigurationError("write a job file, then what is varied: seed=0,1,2")
        return {"job": dump_yaml(load_job(words[0]).resolved()), "vary": list(words[1:])}

    def check(self, values: Any) -> SearchSpec:
        """Every combination is checked, too."""
        from anabranch.federated.search import prepare

        spec = super().check(values)
        with as_file(spec.job, "job.yaml") as path:
            prepare(path, spec.vary, (), spec.trials)
        return spec

    def title(self, spec: SearchSpec) -> str:
        """The federation's name, and the keys that are varied."""
        from anabranch.federated.job import load_job

        with as_file(spec.job, "job.yaml") as path:
            name = load_job(path).federate
        return f"{name}: {', '.join(text.partition('=')[0] for text in spec.vary)}"

    def command(self, spec: SearchSpec, folder: Path) -> list[str]:
        """On a copy of the file beside the result."""
        write_text(folder / "job.yaml", spec.job)
        options = ["--factor", str(spec.factor), "--metric", spec.metric]
        options += [] if spec.trials is None else ["--trials", str(spec.trials)]
        options += [word for text in spec.vary for word in ("--vary", text)]
        command = ("federation", "search", "job.yaml", *options)
        return anabranch(*command, "--output", OUTPUT, "--json")
