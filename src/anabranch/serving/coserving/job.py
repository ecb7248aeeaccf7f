"""A fine-tuning job inside the serving engine: what it is asked, and what it reports.

The engine trains in the time that the latency target leaves (Oliaro et al., FlexLLM). A job
survives the process: its checkpoints lie in ``output``, and submitting it again goes on after the
last one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from anabranch.errors import ConfigurationError
from anabranch.training.example import Item
from anabranch.training.options import TrainOptions

JobState = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]

Activations = Literal["layer_input", "pruned"]
"""What waits for the backward pass: the inputs of the layers, or also the outputs of their linear
layers, which are then not computed again (see :mod:`.pruning` for what that means in bytes)."""

FINISHED: frozenset[JobState] = frozenset({"succeeded", "failed", "cancelled"})


@dataclass(frozen=True)
class FinetuneJob:
    """Trains an adapter on ``items`` and publishes it under ``adapter``.

    ``items`` are single examples (:class:`~anabranch.training.example.Example`); the loss is the
    mean negative log-likelihood of a step's trained tokens, as :class:`~.losses.Causal` computes
    it. ``options.batch`` sequences make an optimiser step; they pass the model one after the other.

    ``method`` and ``method_options`` are those of :func:`anabranch.adapters.build`; ``start_from``
    is the folder of an adapter to continue instead. ``weight`` is the job's share of the
    fine-tuning work among jobs. A version is published after every ``publish_every`` updates, and
    always at the end; None publishes at the end only. ``output`` gets ``checkpoints/``,
    ``metrics.jsonl`` and, for each published version, ``adapter/`` (a PEFT folder, replaced whole).
    """

    id: str
    adapter: str
    items: Sequence[Item]
    options: TrainOptions
    output: Path
    validation: Sequence[Item] = ()
    method: str = "lora"
    method_options: Mapping[str, Any] = field(default_factory=dict)
    start_from: Path | None = None
    weight: float = 1.0
    activations: Activations = "layer_input"
    publish_every: int | None = None

    def __post_init__(self) -> None:
        if self.activations not in get_args(Activations):
            raise ConfigurationError(
                f"activations must be one of {', '.join(get_args(Activations))}, "
                f"not {self.activations!r}"
            )
        if not self.weight > 0:
            raise ConfigurationError(f"a job's weight must be above 0, not {self.weight}")
        if self.publish_every is not None and self.publish_every < 1:
            raise ConfigurationError(f"publish_every must be at least 1, not {self.publish_every}")


@dataclass(frozen=True)
class JobProgress:
    """Where a job stands. ``tokens`` counts trained-through tokens, ``seconds`` the computing."""

    state: JobState = "queued"
    step: int = 0
    total_steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float | None = None
    validation_loss: float | None = None
    version: int | None = None
    """Newest published version of the adapter."""
    error: str | None = None


@dataclass(frozen=True)
class JobEvent:
    """Something that happened to a job.

    ========== ==================================================================
    state      the job's state changed (``data`` empty; ``progress.error`` if failed)
    step       an optimiser step is done; ``data`` is the step's report
    validation validation was measured; ``data`` has the metrics
    checkpoint a checkpoint is on the disk; ``data``: ``step``, ``path``
    published  a version answers requests; ``data``: ``version``, ``path``
    ========== ==================================================================
    """

    kind: Literal["state", "step", "validation", "checkpoint", "published"]
    progress: JobProgress
    data: Mapping[str, Any] = field(default_factory=dict)


Listener = Callable[[JobEvent], None]
"""Called on the engine's thread: it must return at once and must not raise."""


class JobHandle:
    """What the submitter holds. All methods may be called from any thread.

    Requests to pause, resume and cancel take effect at the engine's next step; cancelling frees
    what the job holds and keeps its checkpoints.
    """

    def __init__(self, job: FinetuneJob, listener: Listener | None = None) -> None:
        self.job = job
        self._listener = listener
        self._progress = JobProgress()
        self._wanted: Literal["run", "pause", "cancel"] = "run"
        self._finished = threading.Event()
        self.wake: Callable[[], None] = lambda: None
        """Set by the engine: called when something else is wanted."""

    @property
    def progress(self) -> JobProgress:
        """A snapshot."""
        return self._progress

    @property
    def wanted(self) -> Literal["run", "pause", "cancel"]:
        """What the submitter asked for last."""
        return self._wanted

    def pause(self) -> None:
        """Stop taking work after the current unit; what is computed of a step is kept."""
        if self._wanted == "run":
            self._want("pause")

    def resume(self) -> None:
        """Go on after :meth:`pause`."""
        if self._wanted == "pause":
            self._want("run")

    def cancel(self) -> None:
        """Give the job up. Harmless if it is finished."""
        self._want("cancel")

    def wait(self, timeout: float | None = None) -> JobProgress:
        """Block until the job is finished (or ``timeout`` seconds are over)."""
        self._finished.wait(timeout)
        return self._progress

    def _want(self, wanted: Literal["run", "pause", "cancel"]) -> None:
        self._wanted = wanted
        self.wake()

    def report(self, event: JobEvent) -> None:
        """For the engine: keep the progress and tell the listener."""
        self._progress = event.progress
        if self._listener is not None:
            self._listener(event)
        if event.progress.state in FINISHED:
            self._finished.set()
