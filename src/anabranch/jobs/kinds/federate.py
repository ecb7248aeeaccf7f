"""A federation by a job file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anabranch.files import write_text
from anabranch.jobs.kinds.base import JobKind, Terms, anabranch, as_file
from anabranch.jobs.layout import OUTPUT


class FederateSpec(Terms):
    """``job`` is the YAML of ``anabranch federate``."""

    job: str
    overrides: list[str] = []


class Federate(JobKind[FederateSpec]):
    """``anabranch federate``: simulated or local clients learn together."""

    name = "federate"
    spec = FederateSpec
    heading = "Federations"
    example = """\
# The text of a job file, docs/federation.md
job: |
  federate: silos
  recipe: arithmetic
  clients: {count: 4, split: {name: iid}}
  strategy: {name: fedavg}
  schedule: {rounds: 5}
"""

    def from_words(self, words: Sequence[str]) -> dict[str, Any]:
        """A job file, then overrides; relative paths in it are from where it lies."""
        from anabranch.federated.job import load_job
        from anabranch.training.recipe_file import dump_yaml

        return {"job": dump_yaml(load_job(words[0], words[1:]).resolved())}

    def check(self, values: Any) -> FederateSpec:
        """The job's keys, names and options are checked, too."""
        spec = super().check(values)
        self._job(spec)
        return spec

    def title(self, spec: FederateSpec) -> str:
        """The federation's name."""
        return str(self._job(spec).federate)

    def command(self, spec: FederateSpec, folder: Path) -> list[str]:
        """On a copy of the file beside the result."""
        write_text(folder / "job.yaml", spec.job)
        return anabranch("federate", "job.yaml", *spec.overrides, "--output", OUTPUT, "--json")

    def _job(self, spec: FederateSpec) -> Any:
        from anabranch.federated.job import load_job

        with as_file(spec.job, "job.yaml") as path:
            return load_job(path, spec.overrides)
