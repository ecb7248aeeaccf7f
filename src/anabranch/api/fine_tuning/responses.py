"""What the file and fine-tuning routes answer, for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

State = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]


class FileItem(BaseModel):
    """An uploaded file, or a result."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: None
    filename: str
    purpose: str
    status: Literal["processed"]
    status_details: None
    sha256: str


class FileList(BaseModel):
    """A page of files."""

    object: Literal["list"]
    data: list[FileItem]
    has_more: bool


class DeletedFile(BaseModel):
    """A file that is no more."""

    id: str
    object: Literal["file"]
    deleted: bool


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class JobHyperparameters(BaseModel):
    """The values that are used: nothing is ``auto`` any more."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float


class JobSupervised(BaseModel):
    """The method's options."""

    hyperparameters: JobHyperparameters


class JobMethod(BaseModel):
    """How the job trains."""

    type: Literal["supervised"]
    supervised: JobSupervised


class JobExtras(BaseModel):
    """What OpenAI has no field for."""

    state: State
    adapter: str
    method: str
    options: dict[str, Any]
    lr: float
    max_length: int | None
    rows: int
    priority: int
    weight: float
    publish_every: int | None
    started_at: int | None
    step: int | None
    total_steps: int | None
    tokens: int | None
    seconds: float | None
    loss: float | None
    validation_loss: float | None
    version: int | None


class JobItem(BaseModel):
    """A fine-tuning job."""

    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    error: JobError | None
    fine_tuned_model: str | None
    finished_at: int | None
    estimated_finish: int | None
    hyperparameters: JobHyperparameters
    method: JobMethod
    model: str
    organization_id: str
    result_files: list[str]
    seed: int
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    integrations: list[Any]
    metadata: dict[str, str]
    anabranch: JobExtras


class JobList(BaseModel):
    """A page of jobs, newest first."""

    object: Literal["list"]
    data: list[JobItem]
    has_more: bool


class JobEventItem(BaseModel):
    """Something that happened to a job."""

    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class JobEventList(BaseModel):
    """A page of events, newest first."""

    object: Literal["list"]
    data: list[JobEventItem]
    has_more: bool


class CheckpointMetrics(BaseModel):
    """The newest figures when the version was published."""

    step: int
    train_loss: float | None
    valid_loss: float | None


class CheckpointExtras(BaseModel):
    """The number by which the engine counts versions."""

    version: int | None


class CheckpointItem(BaseModel):
    """A version of the adapter that was published."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: CheckpointMetrics
    anabranch: CheckpointExtras


class CheckpointList(BaseModel):
    """A page of checkpoints, newest first."""

    object: Literal["list"]
    data: list[CheckpointItem]
    has_more: bool
    first_id: str | None
    last_id: str | None
