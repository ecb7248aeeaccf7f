"""What clients may send to ``/v1/fine_tuning/jobs``: OpenAI's fields, and ours in ``anabranch``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from anabranch.api.fields import Strict, Unsupported

Auto = Literal["auto"]
Identifier = Annotated[str, Field(min_length=1, max_length=64)]
Label = Annotated[str, Field(min_length=1, max_length=64)]
LabelValue = Annotated[str, Field(max_length=512)]
Labels = Annotated[dict[Label, LabelValue], Field(max_length=16)]
AdapterName = Annotated[
    str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
]
LargeInteger = Annotated[int, Field(ge=1, le=2**31 - 1)]

MAX_RANK = 1024
"""More is no adapter any more, and could fill the memory of a server that others use."""


class Hyperparameters(Strict):
    """OpenAI's three; ``auto`` or absent is a default for adapters (see docs/fine_tuning.md)."""

    n_epochs: Annotated[int, Field(ge=1, le=1000)] | Auto | None = None
    batch_size: Annotated[int, Field(ge=1, le=4096)] | Auto | None = Field(
        None, description="Rows of one optimiser step."
    )
    learning_rate_multiplier: Annotated[float, Field(gt=0, le=1000)] | Auto | None = Field(
        None, description="Times the default rate of 2e-4."
    )


class Supervised(Strict):
    """The options of the only method."""

    hyperparameters: Hyperparameters | None = None


class Method(Strict):
    """How to train. Only on given answers; the other two of OpenAI's types are refused by name."""

    type: Literal["supervised"]
    supervised: Supervised | None = None
    dpo: Unsupported = None
    reinforcement: Unsupported = None


class Extras(Strict):
    """What OpenAI has no field for. Everything is optional."""

    method: str | None = Field(
        None, min_length=1, max_length=64, description="The adapter: see anabranch adapters list."
    )
    rank: Annotated[int, Field(ge=1, le=MAX_RANK)] | None = Field(
        None, description="The adapter's size, for methods that have a rank."
    )
    options: dict[str, JsonValue] | None = Field(
        None, max_length=64, description="Further options of the adapter's method."
    )
    lr: Annotated[float, Field(gt=0, le=10)] | None = Field(
        None, description="The learning rate itself, instead of learning_rate_multiplier."
    )
    schedule: Literal["linear", "cosine", "constant"] | None = None
    warmup: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="Share of the steps in which the rate rises."
    )
    weight_decay: Annotated[float, Field(ge=0, le=10)] | None = None
    steps: LargeInteger | None = Field(None, description="Optimiser steps, instead of n_epochs.")
    max_length: Annotated[int, Field(ge=2, le=2**31 - 1)] | None = Field(
        None, description="Tokens of a row, at most."
    )
    overlong: Literal["error", "drop", "truncate", "split"] | None = Field(
        None, description="What becomes of rows that are longer; error if absent."
    )
    template: Literal["chat", "alpaca", "raw"] | None = Field(
        None, description="How a conversation becomes text; chat is the model's own."
    )
    weight: Annotated[float, Field(gt=0, le=1000)] | None = Field(
        None, description="Share of the work among jobs that run; 1 if absent."
    )
    priority: Annotated[int, Field(ge=-100, le=100)] | None = Field(
        None, description="Queued jobs of a higher one start first; 0 if absent."
    )
    publish_every: LargeInteger | None = Field(
        None, description="Serve a new version after so many steps; only the last if absent."
    )
    checkpoint_every: LargeInteger | None = Field(
        None, description="Steps between two checkpoints, where a crash costs at most that much."
    )
    evaluate_every: LargeInteger | None = Field(
        None, description="Steps between two validations; once an epoch if absent."
    )


class FineTuningRequest(Strict):
    """The body of ``POST /v1/fine_tuning/jobs``."""

    model: str = Field(description="A base model by the name under which it is served.")
    training_file: Identifier = Field(description="The id of a file of purpose fine-tune.")
    validation_file: Identifier | None = None
    suffix: AdapterName | None = Field(
        None, description="The result answers as model:suffix; the job's id if absent."
    )
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(
        None, description="Drawn at random if absent."
    )
    method: Method | None = None
    hyperparameters: Hyperparameters | None = Field(
        None, description="OpenAI's older place for method.supervised.hyperparameters."
    )
    metadata: Labels | None = Field(None, description="Up to 16 labels, by which to list jobs.")
    integrations: Annotated[list[JsonValue], Field(max_length=0)] | None = Field(
        None, description="Accepted when empty."
    )
    anabranch: Extras | None = None


class Upload(BaseModel):
    """The fields of ``POST /v1/files``, sent as ``multipart/form-data``."""

    model_config = ConfigDict(extra="forbid")

    file: Annotated[str, Field(json_schema_extra={"format": "binary"})]
    purpose: Literal["assistants", "batch", "fine-tune", "vision", "user_data"]
