"""A federation by a job file."""

from __future__ import annotations

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
