"""Fine-tuning jobs on the Jobs page, by the service that is behind ``/v1/fine_tuning/jobs``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, BinaryIO

from anabranch.api.body import problems, validate
from anabranch.api.fine_tuning.objects import estimated_finish
from anabranch.api.fine_tuning.reports import ADAPTER
from anabranch.api.fine_tuning.schemas import FineTuningRequest
from anabranch.api.fine_tuning.service import PURPOSE, FineTuningService, check_upload
from anabranch.api.fine_tuning.spec import KIND, Spec
from anabranch.console.jobs import (
    Action,
    Field,
    JobReport,
    JobRow,
    Points,
    TakesFiles,
    UploadedFile,
)
from anabranch.console.text import bytes_text
from anabranch.jobs import Job, StoredFile

SHOWN_JOBS = 100
SHOWN_EVENTS = 200
MOST_POINTS = 10_000
_PAGE = 1000


class FineTuning(TakesFiles):
    """Adapters that are trained beside what is served."""

    name = KIND
    title = "Fine-tuning"
    example = """\
# The body of POST /v1/fine_tuning/jobs, see docs/fine_tuning.md
model: smollm2
training_file: file-...
suffix: mine
hyperparameters:
  n_epochs: 3
anabranch:
  method: lora
  rank: 16
"""

    def __init__(self, service: FineTuningService) -> None:
        super().__init__()
        self._service = service

    def fields(self, owner: str | None) -> Sequence[Field]:
        """OpenAI's fields, and the commonest of ours."""
        bases = {name: name for name in self._service.trainable}
        files = {file.id: f"{file.name} ({bytes_text(file.size)})" for file in self.files(owner)}
        methods = {name: name for name in _methods()}
        return [
            Field("model", "Base model", "choice", choices=bases, required=True),
            Field("training_file", "Training file", "file", choices=files, required=True),
            Field("validation_file", "Validation file", "file", "Optional.", files),
            Field("suffix", "Name of the result", "text", "It answers as model:name."),
            Field("hyperparameters.n_epochs", "Epochs", "number", "3 if empty."),
            Field("hyperparameters.batch_size", "Batch size", "number", "Rows a step; 8 if empty."),
            Field(
                "hyperparameters.learning_rate_multiplier",
                "Learning rate multiplier",
                "number",
                "Times 2e-4; 1 if empty.",
            ),
            Field("anabranch.method", "Adapter method", "choice", "LoRA if empty.", methods),
            Field("anabranch.rank", "Rank", "number", "16 if empty, for methods that have one."),
            Field("seed", "Seed", "number", "Drawn at random if empty."),
        ]

    def check(self, request: Mapping[str, Any]) -> None:
        """Names, types and limits of all fields."""
        validate(dict(request), FineTuningRequest)

    def problems(self, request: Mapping[str, Any]) -> Mapping[str, str]:
        """The same, for every field at once."""
        return problems(dict(request), FineTuningRequest)

    def create(self, request: Mapping[str, Any], owner: str | None) -> str:
        """The same as over HTTP."""
        return self._service.create(validate(dict(request), FineTuningRequest), owner).id

    def rows(self, owner: str | None) -> Sequence[JobRow]:
        """The newest :data:`SHOWN_JOBS`."""
        page = self._service.store.find(KIND, owner=owner, limit=SHOWN_JOBS)
        return [_row(job) for job in page.items]

    def report(self, job_id: str, owner: str | None) -> JobReport:
        """One job with its losses and newest events."""
        job = self._service.get(job_id, owner)
        store = self._service.store
        spec = Spec.model_validate(job.spec)
        made = store.artefacts(job.id)[job.id]
        return JobReport(
            row=_row(job),
            facts=_facts(job, spec),
            curves=self._curves(job),
            events=store.events(job.id, limit=SHOWN_EVENTS, descending=True).items,
            error=job.error,
            model=spec.served_name if ADAPTER in made else None,
            artefacts=list(made.values()),
        )

    def ask(self, job_id: str, action: Action, owner: str | None) -> None:
        """Pause, resume or cancel."""
        {
            "pause": self._service.pause,
            "resume": self._service.resume,
            "cancel": self._service.cancel,
        }[action](job_id, owner)

    def files(self, owner: str | None) -> Sequence[UploadedFile]:
        """Uploads to train on."""
        page = self._service.workspace.files.find(owner=owner, purpose=PURPOSE, limit=SHOWN_JOBS)
        return [_file(file) for file in page.items]

    def upload(self, content: BinaryIO, name: str, owner: str | None) -> UploadedFile:
        """Checked line by line before it is kept."""
        files = self._service.workspace.files
        return _file(files.save(content, name, PURPOSE, owner=owner, check=check_upload(PURPOSE)))

    def _curves(self, job: Job) -> Mapping[str, Points]:
        """Losses by step. A job that went on after a crash repeats steps: the later one counts."""
        found: dict[str, dict[float, float]] = {"training": {}, "validation": {}}
        wanted = (("metrics", "train_loss", "training"), ("validation", "valid_loss", "validation"))
        for kind, key, name in wanted:
            after = 0
            while len(found[name]) < MOST_POINTS:
                page = self._service.store.events(job.id, kind=kind, after=after, limit=_PAGE)
                for event in page.items:
                    after = event.sequence
                    if (value := event.data.get(key)) is not None:
                        found[name][float(event.data["step"])] = float(value)
                if not page.has_more:
                    break
        return {name: sorted(points.items()) for name, points in found.items() if points}


@cache
def _methods() -> list[str]:
    from anabranch.adapters import catalogue  # knows torch and PEFT

    return sorted(catalogue())


def _row(job: Job) -> JobRow:
    step, total = job.progress.get("step"), job.progress.get("total_steps")
    return JobRow(
        id=job.id,
        kind=KIND,
        title=f"{job.target}:{job.name}",
        state=job.state,
        created=job.created,
        fraction=step / total if total else None,
        steps=f"{step} of {total} steps" if total else "",
        loss=job.progress.get("loss"),
        finish=estimated_finish(job),
    )


def _facts(job: Job, spec: Spec) -> Mapping[str, str]:
    size = next((f"{k} {v}" for k, v in spec.method_options.items() if k in ("r", "init_r")), "")
    rows = f"{spec.rows:,}"
    if spec.validation_rows:
        rows += f" + {spec.validation_rows:,} to validate"
    facts = {
        "Base": spec.model,
        "Method": f"{spec.method} {size}".strip(),
        "Rows": rows,
        "Epochs": str(spec.hyperparameters.get("n_epochs", "")),
        "Batch": str(spec.options.batch),
        "Learning rate": f"{spec.options.lr:g}",
        "Seed": str(spec.options.seed),
        "Tokens": f"{job.progress.get('tokens') or 0:,}",
    }
    if (loss := job.progress.get("validation_loss")) is not None:
        facts["Validation loss"] = f"{loss:.4f}"
    return facts


def _file(file: StoredFile) -> UploadedFile:
    return UploadedFile(file.id, file.filename, file.size, file.created)
