"""What clients can do with fine-tuning jobs. Every method may block: call them in a thread."""

from __future__ import annotations

import logging
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from anabranch.api.fine_tuning import spec as specs
from anabranch.api.fine_tuning.reports import ADAPTER
from anabranch.api.fine_tuning.rows import check_file
from anabranch.api.fine_tuning.runner import TRAINING, VALIDATION, Runner
from anabranch.api.fine_tuning.schemas import Extras, FineTuningRequest
from anabranch.api.fine_tuning.spec import KIND, Spec
from anabranch.api.fine_tuning.trainable import Trainable, is_trainable
from anabranch.errors import AnabranchError, InvalidRequest, ModelNotFound, did_you_mean
from anabranch.jobs import FINISHED, Job, JobStore, NewEvent, StoredFile, UnknownFile, Workspace
from anabranch.jobs.errors import NameTaken
from anabranch.models.protocol import Model

logger = logging.getLogger("anabranch.fine_tuning")

SETTLE_SECONDS = 5.0
"""How long a request waits for the engine to do what was asked before it answers."""

PURPOSE = "fine-tune"
"""Of files to train on."""


class FineTuningService:
    """Creates, shows and steers the fine-tuning jobs of one workspace.

    ``owner`` is the digest of the caller's API key: with one, a caller sees its own jobs only.
    """

    def __init__(self, workspace: Workspace, models: Sequence[Model], max_jobs: int) -> None:
        self.workspace = workspace
        self.store: JobStore = workspace.jobs
        self._served = {model.name: model for model in models}
        self._models: dict[str, Trainable] = {
            model.name: model for model in models if is_trainable(model)
        }
        self.runner = Runner(workspace, self._models, max_jobs)

    @property
    def trainable(self) -> list[str]:
        """Names of the models that can be fine-tuned."""
        return list(self._models)

    async def start(self) -> None:
        """Serve what earlier jobs have made, and go on with those that are unfinished."""
        for job, folder in self.store.made(KIND, ADAPTER, list(self._models)):
            try:
                await self._models[job.target].add_adapter(job.name, Path(folder))
            except (AnabranchError, OSError) as error:
                logger.warning("%s:%s is not served: %s", job.target, job.name, error)
        self.runner.start()

    def create(self, request: FineTuningRequest, owner: str | None) -> Job:
        """Check everything that can be checked, keep the rows as tokens, and queue the job."""
        extras = specs.extras_of(request)
        model, origin = self._base_of(request.model, owner)
        if origin is None:
            method, method_options = specs.adapter_of(extras)
        else:
            _refuse_shape(extras)
            method, method_options = origin.spec.method, origin.spec.method_options
        max_length = specs.max_length_of(extras, model.max_finetune_tokens)
        training_file = self._file(request.training_file, "training_file", owner)
        validation_file = None
        if request.validation_file is not None:
            validation_file = self._file(request.validation_file, "validation_file", owner)
        job_id = f"ftjob-{uuid.uuid4().hex[:24]}"
        adapter = request.suffix or job_id.removeprefix("ftjob-")
        self._refuse_taken(model, adapter)
        folder = self.workspace.job_folder(job_id)
        try:
            rows, notes = self._keep_rows(
                training_file, "training_file", model, extras, max_length, folder / TRAINING
            )
            validation_rows = 0
            if validation_file is not None:
                validation_rows, more = self._keep_rows(
                    validation_file, "validation_file", model, extras, max_length,
                    folder / VALIDATION,
                )  # fmt: skip
                notes += more
            options, shown = specs.options_of(request, rows, validation_rows, max_length)
            spec = Spec(
                model=request.model,
                base=model.name,
                base_fingerprint=model.card.fingerprint,
                adapter=adapter,
                start_from=None if origin is None else str(origin.folder),
                training_file=request.training_file,
                validation_file=request.validation_file,
                rows=rows,
                validation_rows=validation_rows,
                method=method,
                method_options=method_options,
                options=options,
                hyperparameters=shown,
                weight=extras.weight or 1.0,
                publish_every=extras.publish_every,
                metadata=request.metadata or {},
            )
            job = self.store.create(
                KIND,
                spec.model_dump(mode="json"),
                id=job_id,
                target=model.name,
                name=adapter,
                exclusive=True,
                owner=owner,
                priority=extras.priority or 0,
                notes=[
                    NewEvent("message", f"Created fine-tuning job: {job_id}"),
                    *notes,
                    NewEvent("message", "Files validated, moving job to queued state"),
                ],
            )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self.runner.poke()
        return job

    def cancel(self, job_id: str, owner: str | None) -> Job:
        """Give a job up; what it has published goes on answering until it is deleted."""
        self._require(job_id, owner)
        self.store.ask(job_id, "cancel", owner)
        return self._settled(job_id, owner, lambda job: job.state in FINISHED)

    def pause(self, job_id: str, owner: str | None) -> Job:
        """Let a job wait; what it has computed is kept."""
        self._require(job_id, owner)
        self.store.ask(job_id, "pause", owner)
        return self._settled(job_id, owner, lambda job: job.state != "running")

    def resume(self, job_id: str, owner: str | None) -> Job:
        """Queue a paused job again."""
        self._require(job_id, owner)
        job = self.store.ask(job_id, "run", owner)
        self.runner.poke()
        return job

    def get(self, job_id: str, owner: str | None) -> Job:
        """One job; :class:`UnknownJob` for one of another kind or owner."""
        return self._require(job_id, owner)

    def forget_model(self, base: str, adapter: str) -> None:
        """A client has deleted ``base:adapter``: do not serve it again at the next start."""
        self.store.forget(KIND, base, adapter, ADAPTER)

    def _require(self, job_id: str, owner: str | None) -> Job:
        return self.store.get(job_id, owner, kind=KIND)

    def _settled(self, job_id: str, owner: str | None, done: Callable[[Job], bool]) -> Job:
        """The job once it is as it was asked to be, or as it is when the wait gets long."""
        self.runner.poke()
        deadline = time.monotonic() + SETTLE_SECONDS
        job = self.store.get(job_id, owner)
        while not done(job) and time.monotonic() < deadline:
            time.sleep(0.02)
            job = self.store.get(job_id, owner)
        return job

    def _base_of(self, name: str, owner: str | None) -> tuple[Trainable, _Origin | None]:
        """The base to train on, and the adapter to go on from if ``name`` is ``base:adapter``."""
        if name in self._models:
            return self._models[name], None
        base, _, adapter = name.rpartition(":")
        if base in self._models:
            for job, folder in reversed(self.store.made(KIND, ADAPTER, [base])):
                seen = owner is None or job.owner == owner
                if seen and job.name == adapter and job.state == "succeeded":
                    spec = Spec.model_validate(job.spec)
                    return self._models[base], _Origin(spec, Path(folder))
        if name in self._served:
            able = ", ".join(self._models) or "none"
            raise InvalidRequest(
                "model", f"{name!r} cannot be fine-tuned here; models that can: {able}"
            )
        hint = did_you_mean(name, self._models)
        raise ModelNotFound(
            f"model: {name[:100]!r} is neither a base that is served here{hint} nor the result of "
            f"a succeeded job; bases: {', '.join(self._models) or 'none that can be fine-tuned'}"
        )

    def _file(self, file_id: str, field: str, owner: str | None) -> StoredFile:
        try:
            file = self.workspace.files.get(file_id, owner)
        except UnknownFile as error:
            raise InvalidRequest(field, str(error)) from None
        if file.purpose != PURPOSE:
            raise InvalidRequest(
                field, f"{file_id} has the purpose {file.purpose!r}; it must be {PURPOSE!r}"
            )
        return file

    def _refuse_taken(self, model: Trainable, adapter: str) -> None:
        if f"{model.name}:{adapter}" in {variant.name for variant in model.variants()}:
            raise NameTaken(
                f"suffix: {model.name}:{adapter} is served already; choose another suffix, or "
                f"delete that model first"
            )

    def _keep_rows(
        self,
        file: StoredFile,
        field: str,
        model: Trainable,
        extras: Extras,
        max_length: int,
        target: Path,
    ) -> tuple[int, list[NewEvent]]:
        """Render a file's rows into ``target``; how many there are, and what was left out."""
        # These know torch.
        from anabranch.api.fine_tuning import dataset
        from anabranch.training.filtering import RowPolicy
        from anabranch.training.template import Template

        notes = [NewEvent("message", f"Validating {field.replace('_', ' ')}: {file.id}")]
        template = Template(extras.template or "chat", model.tokenizer, model.end_tokens)
        policy = RowPolicy(max_length, extras.overlong or "error")
        path = self.workspace.files.path(file)
        try:
            rendered = dataset.render(path, file.filename, template, policy, field)
        except FileNotFoundError:  # deleted meanwhile
            raise InvalidRequest(field, f"there is no file {file.id!r}") from None
        dataset.save(target, rendered.items)
        notes += [
            NewEvent("message", f"{file.filename}: {count} rows: {reason}", "warn")
            for reason, count in rendered.dropped.items()
        ]
        return len(rendered.items), notes


@dataclass(frozen=True)
class _Origin:
    """The adapter that a job goes on from."""

    spec: Spec
    folder: Path


def _refuse_shape(extras: Extras) -> None:
    for name in ("method", "rank", "options"):
        if getattr(extras, name) is not None:
            raise InvalidRequest(
                f"anabranch.{name}", "is that of the adapter to go on from; leave it out"
            )


def check_upload(purpose: str) -> Callable[[Path], None] | None:
    """What an uploaded file of a purpose must be; None: anything."""
    return check_file if purpose == PURPOSE else None
