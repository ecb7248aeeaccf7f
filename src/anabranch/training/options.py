"""How a run trains: the ``train:`` section of a recipe, and what a job or a client passes."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from anabranch.errors import ConfigurationError, did_you_mean

Model = TypeVar("Model", bound=BaseModel)

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A part of a file: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class EarlyStopping(Section):
    """Stop when a validation metric no longer improves, and go back to the best weights.

    ``patience`` is evaluations in a row without an improvement of more than ``min_delta``.
    """

    metric: str = "loss"
    patience: Positive = 3
    min_delta: float = Field(0.0, ge=0.0)
    higher_is_better: bool = False
    restore_best: bool = True


class Checkpoints(Section):
    """A checkpoint every so many optimiser steps; the newest ``keep`` stay. None: at the end."""

    every: Positive | None = None
    keep: Positive = 2


class TrainOptions(Section):
    """Everything about a run that is neither model, nor data, nor objective.

    Length: give ``steps`` (optimiser steps) or ``epochs``. ``batch`` is items per optimiser step,
    whatever they weigh; ``micro_batch_tokens`` bounds the tokens, padding included, of one forward
    pass and so the memory. One does not affect the other: a step's gradient is that of one big
    batch.

    ``warmup`` below 1 is a fraction of all steps, from 1 on a number of steps. ``min_lr`` is the
    fraction of ``lr`` at which ``linear`` and ``cosine`` end. ``weight_decay`` spares vectors
    (biases and norms). ``clip`` bounds the global gradient norm.

    ``precision`` auto is bfloat16 where the device multiplies it natively, float16 with loss
    scaling on older GPUs, else float32.

    ``max_length`` bounds the tokens of an example (an objective that has no sequences ignores it).
    ``overlong`` and ``untrained`` say what becomes of longer rows, and of rows in which nothing is
    trained on: an ``error``, or a policy whose every use is counted in the result.
    """

    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0.0)] | None = None
    batch: Positive = 8
    micro_batch_tokens: Positive = 4096
    shuffle: bool = True

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(1e-4, gt=0.0)
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0.0)
    momentum: Fraction = 0.0
    weight_decay: float = Field(0.0, ge=0.0)
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    warmup: float = Field(0.03, ge=0.0)
    min_lr: float = Field(0.0, ge=0.0, le=1.0)
    clip: Annotated[float, Field(gt=0.0)] | None = 1.0
    ema: Fraction | None = None

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    gradient_checkpointing: bool = False
    packing: Literal["none", "bfd"] = "bfd"
    max_length: Positive | None = None
    overlong: Literal["error", "drop", "truncate", "split"] = "error"
    untrained: Literal["error", "drop"] = "error"

    evaluate_every: Positive | None = None
    early_stopping: EarlyStopping | None = None
    checkpoint: Checkpoints = Checkpoints()
    seed: int = Field(0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _consistent(self) -> TrainOptions:
        if (self.steps is None) == (self.epochs is None):
            given = "neither" if self.steps is None else "both"
            raise ValueError(f"give steps or epochs, one of the two; {given} was given")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(
                f"warmup is a fraction below 1 or a whole number of steps, not {self.warmup}"
            )
        if self.steps is not None and self.warmup_steps(self.steps) > self.steps:
            raise ValueError(
                f"warmup of {self.warmup:g} steps is longer than the run ({self.steps})"
            )
        if self.overlong != "error" and self.max_length is None:
            raise ValueError(f"overlong: {self.overlong} needs max_length to say what is too long")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f"momentum belongs to sgd; {self.optimizer} has betas")
        return self

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimiser steps of the whole run."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, math.ceil(self.epochs * steps_per_epoch))

    def warmup_steps(self, total: int) -> int:
        """Steps during which the learning rate rises. A fraction leaves at least one step, as a
        run of nothing but warm-up would learn nothing."""
        if self.warmup >= 1:
            return int(self.warmup)
        return min(math.ceil(self.warmup * total), total - 1)


def parse_options(section: type[Model], values: dict[str, Any], where: str = "") -> Model:
    """Build an options model from plain values.

    Raises :class:`ConfigurationError` with one line per mistake: the key's path (under ``where``),
    what is wrong, and the nearest known key for an unknown one.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        lines = [_line(section, details, where) for details in error.errors()]
        raise ConfigurationError("\n".join(lines)) from None


def _line(section: type[BaseModel], details: Any, where: str) -> str:
    path = [str(part) for part in details["loc"]]
    key = ".".join([*([where] if where else []), *path]) or section.__name__
    if details["type"] == "extra_forbidden":
        known = _fields(section, path[:-1])
        return (
            f"{key}: there is no such option{did_you_mean(path[-1], known)}; known: "
            + ", ".join(known)
        )
    message = details["msg"].removeprefix("Value error, ")
    value = details["input"]
    shown = f"; {value!r} was given" if isinstance(value, str | int | float | bool) else ""
    return f"{key}: {message}{shown}"


def _fields(section: type[BaseModel], path: list[str]) -> list[str]:
    """Field names of the model that lies at ``path`` below ``section``."""
    for part in path:
        if part.isdecimal():  # an entry of a list, whose model was found at the step before
            continue
        annotation = section.model_fields[part].annotation
        candidates = getattr(annotation, "__args__", (annotation,))
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return sorted(section.model_fields)
