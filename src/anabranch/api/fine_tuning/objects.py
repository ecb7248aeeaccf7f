"""Files, jobs, events and checkpoints as OpenAI's objects."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from anabranch.api.fine_tuning.reports import RESULT
from anabranch.api.fine_tuning.spec import Spec
from anabranch.errors import InvalidRequest
from anabranch.jobs import FINISHED, Artefact, Event, Job, StoredFile

ORGANISATION = "anabranch"


def file_object(file: StoredFile) -> dict[str, Any]:
    """OpenAI's ``file``. What is stored is complete and checked: it is always processed."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size,
        "created_at": int(file.created),
        "expires_at": None,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
        "sha256": file.sha256,
    }


def job_object(job: Job, artefacts: Mapping[str, Artefact]) -> dict[str, Any]:
    """OpenAI's ``fine_tuning.job``. A paused job is shown as queued, for OpenAI has no word for
    it; ``anabranch.state`` has ours.
    """
    spec = Spec.model_validate(job.spec)
    progress = job.progress
    finished = job.state in FINISHED
    result = artefacts.get(RESULT)
    error = None
    if job.state == "failed":
        error = {"code": "training_failed", "message": job.error or "", "param": None}
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created),
        "error": error,
        "fine_tuned_model": spec.served_name if job.state == "succeeded" else None,
        "finished_at": int(job.finished) if job.finished is not None else None,
        "estimated_finish": estimated_finish(job),
        "hyperparameters": spec.hyperparameters,
        "method": {
            "type": "supervised",
            "supervised": {"hyperparameters": spec.hyperparameters},
        },
        "model": spec.model,
        "organization_id": ORGANISATION,
        "result_files": [result.path] if result else [],
        "seed": spec.options.seed,
        "status": "queued" if job.state == "paused" else job.state,
        "trained_tokens": progress.get("tokens", 0) if finished else None,
        "training_file": spec.training_file,
        "validation_file": spec.validation_file,
        "integrations": [],
        "metadata": spec.metadata,
        "anabranch": {
            "state": job.state,
            "adapter": spec.served_name,
            "method": spec.method,
            "options": spec.method_options,
            "lr": spec.options.lr,
            "max_length": spec.options.max_length,
            "rows": spec.rows,
            "priority": job.priority,
            "weight": spec.weight,
            "publish_every": spec.publish_every,
            "started_at": int(job.started) if job.started is not None else None,
            **{
                name: progress.get(name)
                for name in (
                    "step",
                    "total_steps",
                    "tokens",
                    "seconds",
                    "loss",
                    "validation_loss",
                    "version",
                )
            },
        },
    }


def estimated_finish(job: Job) -> int | None:
    """By the pace since the job last began to run; None unless it runs and has made a step.

    Not in the past: a job that is late is about to finish.
    """
    progress = job.progress
    if job.state != "running" or progress.get("since") is None:
        return None
    steps = progress["step"] - progress["since_step"]
    if steps < 1:
        return None
    pace = (progress["at"] - progress["since"]) / steps
    finish = progress["at"] + pace * (progress["total_steps"] - progress["step"])
    return int(max(finish, time.time()))


def event_object(event: Event) -> dict[str, Any]:
    """OpenAI's ``fine_tuning.job.event``."""
    measured = event.kind in ("metrics", "validation")
    return {
        "id": event_id(event, "ftevent"),
        "object": "fine_tuning.job.event",
        "created_at": int(event.time),
        "level": event.level,
        "message": event.message,
        "type": "metrics" if measured else "message",
        "data": dict(event.data),
    }


def checkpoint_object(event: Event, model: str) -> dict[str, Any]:
    """OpenAI's ``fine_tuning.job.checkpoint`` of an event of the kind ``published``."""
    data = event.data
    return {
        "id": event_id(event, "ftckpt"),
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(event.time),
        "fine_tuned_model_checkpoint": model,
        "fine_tuning_job_id": event.job_id,
        "step_number": data["step"],
        "metrics": {
            "step": data["step"],
            "train_loss": data.get("train_loss"),
            "valid_loss": data.get("valid_loss"),
        },
        "anabranch": {"version": data.get("version")},
    }


def event_id(event: Event, prefix: str) -> str:
    """``ftevent-<the job's>-<sequence>``."""
    return f"{prefix}-{event.job_id.removeprefix('ftjob-')}-{event.sequence}"


def sequence_of(cursor: str, job_id: str, prefix: str) -> int:
    """The sequence number in an id; :class:`InvalidRequest` if it is none of this job's."""
    job = re.escape(job_id.removeprefix("ftjob-"))
    match = re.fullmatch(rf"{prefix}-{job}-([1-9][0-9]{{0,8}})", cursor, re.ASCII)
    if match is None:
        raise InvalidRequest("after", f"{cursor[:100]!r} is not one of this job's")
    return int(match[1])
