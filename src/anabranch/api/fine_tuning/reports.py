"""What the engine says about a job, in the words of the store."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch.api.fine_tuning.spec import Spec
from anabranch.jobs import Artefact, NewEvent, Report

if TYPE_CHECKING:
    from anabranch.serving.coserving.job import JobEvent, JobProgress

ADAPTER = "adapter"
"""Name of the artefact that can be served; its path is a PEFT folder."""

RESULT = "result_file"
"""Name of the artefact with the metrics; its path is a file's id."""


def report_of(job_id: str, spec: Spec, event: JobEvent, since: Mapping[str, Any]) -> Report:
    """One event as a report, with the state that it implies if it changes it.

    ``since`` says when the job last began to run and at which step: how fast it goes follows.
    """
    progress = {**_progress(event.progress), **since}
    step, total = event.progress.step, event.progress.total_steps
    where = f"Step {step}/{total}"
    if event.kind == "step":
        loss = _number(event.data.get("loss", event.progress.loss))
        data = {
            "step": event.data.get("step", step),
            "total_steps": total,
            "train_loss": loss,
            "learning_rate": _number(event.data.get("lr")),
            "grad_norm": _number(event.data.get("grad_norm")),
            "train_tokens": event.data.get("tokens"),
            "seconds": _number(event.data.get("seconds")),
        }
        note = NewEvent("metrics", f"{where}: training loss={_text(loss)}", data=data)
        if skipped := event.data.get("skipped"):
            message = f"{where}: the weights were left as they were: {skipped}"
            note = NewEvent("metrics", message, "warn", data)
        return Report(job_id, progress=progress, events=[note])
    if event.kind == "validation":
        loss = _number(event.data.get("loss", event.progress.validation_loss))
        data = {**_numbers(event.data), "step": step, "valid_loss": loss}
        note = NewEvent("validation", f"{where}: validation loss={_text(loss)}", data=data)
        return Report(job_id, progress=progress, events=[note])
    if event.kind == "checkpoint":
        note = NewEvent("checkpoint", f"Checkpoint created at step {step}", data={"step": step})
        return Report(job_id, progress=progress, events=[note])
    if event.kind == "published":
        version = event.data.get("version", event.progress.version)
        data = {
            "step": step,
            "version": version,
            "train_loss": progress["loss"],
            "valid_loss": progress["validation_loss"],
        }
        message = f"Version {version} answers as {spec.served_name}"
        folder = Path(str(event.data["path"]))
        made = Artefact(ADAPTER, str(folder), _size(folder))
        note = NewEvent("published", message, data=data)
        return Report(job_id, progress=progress, events=[note], artefacts=[made])
    return _state(job_id, spec, event, progress)


def _state(job_id: str, spec: Spec, event: JobEvent, progress: Mapping[str, Any]) -> Report:
    state, error = event.progress.state, event.progress.error
    notes = {
        "queued": NewEvent("message", "The model has taken the job"),
        "running": NewEvent(
            "message",
            f"Fine-tuning job goes on after step {event.progress.step}"
            if event.progress.step
            else "Fine-tuning job started",
        ),
        "paused": NewEvent("message", "Fine-tuning job paused"),
        "succeeded": NewEvent("message", "The job has successfully completed"),
        "cancelled": NewEvent("message", "The job was cancelled"),
        "failed": NewEvent("message", f"The job failed: {error}", "error"),
    }
    note = notes[state]
    if state == "succeeded":
        created = NewEvent("message", f"New fine-tuned model created: {spec.served_name}")
        return Report(job_id, state, progress, events=[created, note])
    if state == "paused" and error:
        note = NewEvent("message", f"The job paused itself: {error}", "warn")
    return Report(job_id, state, progress, error, [note])


def _progress(progress: JobProgress) -> dict[str, Any]:
    return {
        "step": progress.step,
        "total_steps": progress.total_steps,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "loss": _number(progress.loss),
        "validation_loss": _number(progress.validation_loss),
        "version": progress.version,
    }


def _numbers(data: Mapping[str, Any]) -> dict[str, float | None]:
    return {k: _number(v) for k, v in data.items() if isinstance(v, int | float)}


def _number(value: Any) -> float | None:
    """A number that JSON has."""
    if isinstance(value, int | float) and math.isfinite(value):
        return value
    return None


def _text(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
