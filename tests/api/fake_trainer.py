"""A model that "trains" in a thread: its loss falls with every step, and it writes what an engine
writes. Only its time is not spent. The engine's model takes its place without a change.
"""

from __future__ import annotations

import copy
import json
import math
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from anabranch.errors import AnabranchError, ModelNotFound
from anabranch.models.protocol import Model, ModelStatistics
from anabranch.serving.coserving.job import (
    FinetuneJob,
    JobEvent,
    JobHandle,
    JobProgress,
    Listener,
)
from anabranch.training.metrics_log import MetricsLog
from tests import tiny

from .conftest import CARD, EchoModel

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class CannotTrain(AnabranchError):
    status = 400


class TrainingModel(EchoModel):
    """``step_seconds`` is what a step takes; ``fail_at`` is a step that fails."""

    def __init__(
        self,
        name: str = "base",
        *,
        step_seconds: float = 0.0,
        fail_at: int | None = None,
        pause_at: int | None = None,
        refuse: str = "",
        context: int = 512,
    ) -> None:
        super().__init__(name)
        self.card = replace(CARD, name=name)
        self.tokenizer = copy.deepcopy(tiny.byte_tokenizer())
        self.tokenizer.chat_template = TEMPLATE
        self.end_tokens: list[int] = []
        self.max_finetune_tokens = context
        self.step_seconds = step_seconds
        self.fail_at = fail_at
        self.pause_at = pause_at
        self.refuse = refuse
        self.jobs: list[FinetuneJob] = []
        self.handles: list[JobHandle] = []
        self.served: dict[str, EchoModel] = {}
        self.most_at_once = 0
        self.trained = 0
        self.go = threading.Event()
        """While it is not set, no job makes a step."""
        self.go.set()
        self._training = 0
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []

    def submit_finetune(self, job: FinetuneJob, listener: Listener | None = None) -> JobHandle:
        if self.refuse:
            raise CannotTrain(self.refuse)
        handle = JobHandle(job, listener)
        self.jobs.append(job)
        self.handles.append(handle)
        thread = threading.Thread(target=self._train, args=(handle,), daemon=True)
        self._threads.append(thread)
        thread.start()
        return handle

    def variants(self) -> list[Model]:
        return list(self.served.values())

    def variant(self, adapter: str) -> Model:
        if adapter not in self.served:
            raise ModelNotFound(f"model: no adapter {adapter!r}")
        return self.served[adapter]

    async def add_adapter(self, name: str, folder: Path) -> Model:
        return self._serve(name, folder)

    async def remove_adapter(self, name: str) -> None:
        del self.served[name]

    def statistics(self) -> ModelStatistics:
        jobs = self._training
        return replace(
            super().statistics(),
            finetune_jobs=jobs,
            finetune_tokens=self.trained,
            slo_steps=200,
            slo_met=190,
        )

    async def close(self) -> None:
        await super().close()
        self._closing.set()
        for thread in self._threads:
            thread.join()

    def _serve(self, name: str, folder: Path) -> EchoModel:
        if not (folder / "adapter_config.json").exists():
            raise CannotTrain(f"{folder} is no adapter")
        self.served[name] = EchoModel(f"{self.name}:{name}")
        self.served[name].adapter_folder = folder
        return self.served[name]

    def _train(self, handle: JobHandle) -> None:
        job, options = handle.job, handle.job.options
        per_epoch = math.ceil(len(job.items) / options.batch)
        total = options.total_steps(per_epoch)
        step = _last_checkpoint(job.output)
        log = MetricsLog(job.output / "metrics.jsonl")
        log.restart_after(step)
        progress = JobProgress("running", step, total)
        self._training += 1
        self.most_at_once = max(self.most_at_once, self._training)
        report = handle.report
        report(JobEvent("state", progress))
        try:
            while step < total:
                time.sleep(self.step_seconds)
                while not (self.go.is_set() or self._closing.is_set() or handle.wanted != "run"):
                    time.sleep(0.002)
                if handle.wanted == "cancel" or self._closing.is_set():
                    report(JobEvent("state", replace(progress, state="cancelled")))
                    return
                own = step == self.pause_at
                if handle.wanted == "pause" or own:
                    self.pause_at = None if own else self.pause_at
                    error = "the loss is not finite" if own else None
                    if own:
                        handle.pause()
                    self._training -= 1
                    report(JobEvent("state", replace(progress, state="paused", error=error)))
                    while handle.wanted == "pause" and not self._closing.is_set():
                        time.sleep(0.002)
                    self._training += 1
                    if handle.wanted == "run" and not self._closing.is_set():
                        report(JobEvent("state", replace(progress, state="running")))
                    continue
                step += 1
                if step == self.fail_at:
                    failed = replace(progress, state="failed", error="the trainer broke")
                    report(JobEvent("state", failed))
                    return
                first = (step - 1) % per_epoch * options.batch
                tokens = sum(len(e) for (e,) in job.items[first : first + options.batch])
                loss = 3.0 / step
                progress = replace(
                    progress, step=step, loss=loss, tokens=progress.tokens + tokens,
                    seconds=progress.seconds + self.step_seconds,
                )  # fmt: skip
                self.trained += tokens
                data = {"step": step, "loss": loss, "lr": options.lr, "tokens": tokens}
                log.append(data)
                report(JobEvent("step", progress, data))
                if options.evaluate_every and step % options.evaluate_every == 0:
                    progress = replace(progress, validation_loss=loss + 0.5)
                    log.append({"step": step, "validation": {"loss": loss + 0.5}})
                    report(JobEvent("validation", progress, {"loss": loss + 0.5}))
                if step % (options.checkpoint.every or total) == 0:
                    path = job.output / "checkpoints" / str(step)
                    path.mkdir(parents=True, exist_ok=True)
                    report(JobEvent("checkpoint", progress, {"step": step, "path": str(path)}))
                if step == total or (job.publish_every and step % job.publish_every == 0):
                    progress = self._publish(handle, progress)
            report(JobEvent("state", replace(progress, state="succeeded")))
        finally:
            self._training -= 1

    def _publish(self, handle: JobHandle, progress: JobProgress) -> JobProgress:
        folder = handle.job.output / "adapter"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps({"r": 4}))
        version = (progress.version or 0) + 1
        self._serve(handle.job.adapter, folder)
        progress = replace(progress, version=version)
        data: dict[str, Any] = {"version": version, "path": str(folder)}
        handle.report(JobEvent("published", progress, data))
        return progress


def _last_checkpoint(output: Path) -> int:
    folder = output / "checkpoints"
    return max((int(p.name) for p in folder.iterdir()), default=0) if folder.exists() else 0
