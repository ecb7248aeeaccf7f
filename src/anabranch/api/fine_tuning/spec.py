"""What a fine-tuning job is, as the store keeps it, and how a request becomes one."""

from __future__ import annotations

import math
import secrets
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from anabranch.api.fine_tuning.schemas import MAX_RANK, Extras, FineTuningRequest, Hyperparameters
from anabranch.errors import InvalidRequest, UnknownName, did_you_mean
from anabranch.training.options import Checkpoints, TrainOptions

if TYPE_CHECKING:
    from anabranch.adapters import MethodInfo

KIND = "fine_tuning"
"""Of jobs beside what is served; ``finetune`` are recipes, processes of their own."""

BASE_LR = 2e-4
"""The learning rate that ``learning_rate_multiplier`` multiplies: Dettmers et al., QLoRA (2023),
appendix B.2, for adapters on all linear layers."""

DEFAULT_EPOCHS = 3
DEFAULT_BATCH = 8
DEFAULT_RANK = 16
DEFAULT_MAX_LENGTH = 2048

RANKS = ("r", "init_r")
"""What adapter methods call their rank."""


class Spec(BaseModel):
    """Everything that a job needs beside its tokens, which lie in its folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    """As the client named it: a base, or ``base:adapter`` to go on from an adapter."""
    base: str
    base_fingerprint: str
    adapter: str
    start_from: str | None = None
    """The folder of that adapter."""
    training_file: str
    validation_file: str | None
    rows: int
    validation_rows: int
    method: str
    method_options: dict[str, Any]
    options: TrainOptions
    hyperparameters: dict[str, int | float]
    weight: float = 1.0
    publish_every: int | None = None
    metadata: dict[str, str] = Field(default_factory=dict)

    @property
    def served_name(self) -> str:
        """The name under which the result answers."""
        return f"{self.base}:{self.adapter}"


def hyperparameters_of(request: FineTuningRequest) -> Hyperparameters:
    """Those of the request, from either of their two places. Both at once are refused."""
    supervised = request.method.supervised if request.method else None
    inside = supervised.hyperparameters if supervised else None
    if inside is not None and request.hyperparameters is not None:
        raise InvalidRequest(
            "hyperparameters", "are also given in method.supervised; give them in one place"
        )
    return inside or request.hyperparameters or Hyperparameters.model_validate({})


def extras_of(request: FineTuningRequest) -> Extras:
    """Our own options, all absent if none is given."""
    return request.anabranch or Extras.model_validate({})


def max_length_of(extras: Extras, most: int) -> int:
    """Tokens of a row at most; :class:`InvalidRequest` beyond what the model can train on."""
    if extras.max_length is not None and extras.max_length > most:
        raise InvalidRequest(
            "anabranch.max_length",
            f"is {extras.max_length}; this server trains on rows of at most {most} tokens",
        )
    return extras.max_length or min(most, DEFAULT_MAX_LENGTH)


def options_of(
    request: FineTuningRequest, rows: int, validation_rows: int, max_length: int
) -> tuple[TrainOptions, dict[str, int | float]]:
    """How to train on so many rows, and the three hyperparameters as they are shown."""
    asked, extras = hyperparameters_of(request), extras_of(request)
    epochs = _or_default(asked.n_epochs, DEFAULT_EPOCHS)
    batch = int(_or_default(asked.batch_size, min(DEFAULT_BATCH, rows)))
    if extras.lr is not None and _or_default(asked.learning_rate_multiplier, 0):
        raise InvalidRequest("anabranch.lr", "does not go with learning_rate_multiplier")
    if extras.steps is not None and _or_default(asked.n_epochs, 0):
        raise InvalidRequest("anabranch.steps", "does not go with n_epochs")
    lr = extras.lr or BASE_LR * _or_default(asked.learning_rate_multiplier, 1.0)
    steps_per_epoch = math.ceil(rows / batch)
    total = extras.steps or math.ceil(epochs * steps_per_epoch)
    evaluate = extras.evaluate_every or min(steps_per_epoch, total)
    if extras.evaluate_every is not None and not validation_rows:
        raise InvalidRequest("anabranch.evaluate_every", "needs a validation_file")
    if extras.steps is not None:
        epochs = math.ceil(extras.steps / steps_per_epoch)
    optional = {
        name: value
        for name in ("schedule", "warmup", "weight_decay")
        if (value := getattr(extras, name)) is not None
    }
    try:
        options = TrainOptions(
            steps=extras.steps,
            epochs=None if extras.steps else epochs,
            batch=batch,
            micro_batch_tokens=max(4096, max_length),
            lr=lr,
            max_length=max_length,
            overlong=extras.overlong or "error",
            evaluate_every=evaluate if validation_rows else None,
            checkpoint=Checkpoints(every=extras.checkpoint_every or 1),
            seed=secrets.randbelow(2**31) if request.seed is None else request.seed,
            **optional,
        )
    except ValidationError as error:
        raise InvalidRequest("anabranch", error.errors()[0]["msg"]) from None
    shown = {
        "n_epochs": int(epochs),
        "batch_size": batch,
        "learning_rate_multiplier": lr / BASE_LR,
    }
    return options, shown


def adapter_of(extras: Extras) -> tuple[str, dict[str, Any]]:
    """The adapter's method and its options. Raises for a method or an option that is unknown."""
    # Knows torch and PEFT, which a server has long imported when a request arrives.
    from anabranch.adapters import method

    try:
        info = method(extras.method or "lora")
    except UnknownName as error:
        raise InvalidRequest("anabranch.method", str(error)) from None
    options: dict[str, Any] = dict(extras.options or {})
    known = info.options()
    _set_rank(info, extras.rank, options)
    if info.name == "lora":
        options.setdefault("lora_alpha", 2 * options["r"])
    for option in options:
        if option not in known:
            raise InvalidRequest(
                f"anabranch.options.{option}",
                f"{info.name!r} has no such option{did_you_mean(option, known)}; "
                f"it has {', '.join(sorted(known))}",
            )
    return info.name, options


def _set_rank(info: MethodInfo, rank: int | None, options: dict[str, Any]) -> None:
    """Put the rank under the method's own name for it, unless it is there."""
    name = info.size.option if info.size else None
    if name not in RANKS:
        if rank is not None:
            names = ", ".join(sorted(info.options()))
            raise InvalidRequest("anabranch.rank", f"{info.name!r} has no rank; it has {names}")
        return
    if rank is not None and name in options:
        raise InvalidRequest("anabranch.rank", f"is also given as options.{name}")
    value = options.setdefault(name, rank or DEFAULT_RANK)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_RANK:
        raise InvalidRequest(
            f"anabranch.options.{name}", f"must be a whole number from 1 to {MAX_RANK}"
        )


def _or_default(value: Literal["auto"] | float | None, default: float) -> float:
    return default if value is None or value == "auto" else value
