"""The recipe: one declarative file that says how a model is fine-tuned, from data to deployment.

A section here is a section of the file. Reading one is :mod:`anabranch.training.recipe_file`;
running one is :mod:`anabranch.training.pipeline`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from anabranch.errors import did_you_mean
from anabranch.training.options import Section, TrainOptions

SPLITS = ("train", "valid", "test")
FORMATS = ("jsonl", "csv", "parquet", "text", "hf-dir")
TEMPLATES = ("chat", "alpaca", "raw")
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"

SplitName = Literal["train", "valid", "test"]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]


class Choice(BaseModel):
    """A plug-in by name with its own options beside it: ``{name: multitask, balancer: coba}``."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        """What goes to the plug-in's constructor."""
        return dict(self.model_extra or {})


class Split(Section):
    """Shares of the rows. ``split: test`` is short for all of them.

    Rows with the same value in column ``group`` stay together; every value of column ``stratify``
    is divided in the same proportions. Without a split, files that are named after one (``hf-dir``)
    keep theirs, and other data are divided 90 : 5 : 5.
    """

    train: Share = 0.0
    valid: Share = 0.0
    test: Share = 0.0
    group: str | None = None
    stratify: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _all_of_one(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value not in SPLITS:
                raise ValueError(f"must be one of {', '.join(SPLITS)}, or shares like train: 0.9")
            return {value: 1.0}
        return value

    @model_validator(mode="after")
    def _whole(self) -> Split:
        if abs(sum(self.shares.values()) - 1.0) > 1e-6:
            shares = " + ".join(f"{name} {share:g}" for name, share in self.shares.items())
            raise ValueError(f"the shares must add up to 1; {shares} do not")
        return self

    @property
    def shares(self) -> dict[str, float]:
        """Share by split."""
        return {"train": self.train, "valid": self.valid, "test": self.test}


class Filters(Section):
    """What is left out of a source, and counted. Rows without text always are.

    ``near_duplicates``: Jaccard similarity of the sets of 5-word shingles above which the later row
    goes; null keeps them. Lengths are in characters of all the row's texts. A row that the task
    cannot read stops the run, unless ``invalid`` is drop.
    """

    invalid: Literal["error", "drop"] = "error"
    duplicates: bool = True
    near_duplicates: Annotated[float, Field(gt=0.0, lt=1.0)] | None = 0.8
    min_chars: Annotated[int, Field(ge=0)] = 0
    max_chars: Count | None = None


class Data(Section):
    """One source of rows.

    ``source`` is jsonl, csv, parquet, text or hf-dir (with ``path``), ``builtin:<set>/<file>``
    (below the folder that ANABRANCH_DATA names), or ``generator:<name>`` (with ``options``).
    ``map`` is wanted column: given column. ``fallback`` is the generator to use where
    ANABRANCH_DATA is not set; the report says so. ``weight`` 2 shows every training row twice an
    epoch, 0.5 every second one. ``limit`` takes that many rows, chosen by the seed.

    ``unit`` says what a row of a text is; units are joined until they have ``unit_chars``.
    """

    name: str = Field(default="", pattern=rf"^({NAME})?$")
    source: str
    path: Path | None = None
    map: dict[str, str] = {}
    task: Choice = Choice(name="chat")
    weight: float = Field(default=1.0, gt=0.0)
    split: Split | None = None
    filters: Filters = Filters()
    limit: Count | None = None
    options: dict[str, Any] = {}
    fallback: str | None = None
    fallback_options: dict[str, Any] = {}
    unit: Literal["file", "paragraph", "line"] = "paragraph"
    unit_chars: Count = 1

    @model_validator(mode="after")
    def _source(self) -> Data:
        if self.source in FORMATS:
            if self.path is None:
                raise ValueError(f"source {self.source} needs path")
        elif not re.fullmatch(r"(builtin|generator):\S+", self.source):
            raise ValueError(
                f"source must be one of {', '.join(FORMATS)}, builtin:<set>/<file> or "
                f"generator:<name>, not {self.source!r}{did_you_mean(self.source, FORMATS)}"
            )
        elif self.path is not None:
            raise ValueError(f"source {self.source} takes no path")
        if self.options and not self.source.startswith("generator:"):
            raise ValueError("options belong to a generator; this source has none")
        if self.fallback is not None:
            if not self.source.startswith("builtin:"):
                raise ValueError("a fallback belongs to a builtin: source")
            if not self.fallback.startswith("generator:"):
                raise ValueError(f"fallback must be generator:<name>, not {self.fallback!r}")
        return self


class Contamination(Section):
    """What becomes of training rows that overlap with an evaluation row.

    A row overlaps if it shares a run of ``ngram`` words, or has the same question after
    lower-casing and without punctuation. ``digits: mask`` also ignores which numbers a question
    has: the arithmetic sets leak into each other that way (LLM-Adapters, section 4).
    """

    action: Literal["drop", "refuse", "ignore"] = "drop"
    ngram: Annotated[int, Field(ge=5)] = 13
    digits: Literal["keep", "mask"] = "keep"


class Adapter(BaseModel):
    """``method: lora`` with the method's own options beside it; ``full`` trains every weight."""

    model_config = ConfigDict(extra="allow", frozen=True)

    method: str = "lora"

    @model_validator(mode="before")
    @classmethod
    def _method_alone(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        """What goes to the adapter method."""
        return dict(self.model_extra or {})


class Generate(Section):
    """Answers by greedy decoding, to be parsed and scored by the task."""

    rows: Count = 32
    max_tokens: Count = 128
    batch: Count = 8


class Evaluation(Section):
    """Answer NLL of at most ``rows`` rows of a split, and the task's figures if ``generate``.

    ``data`` names the sources; null is all that have such rows.
    """

    name: str = Field(default="heldout", pattern=rf"^{NAME}$")
    on: Literal["valid", "test"] = "test"
    data: list[str] | None = None
    rows: Count = 200
    generate: Generate | None = None


class Gate(Section):
    """Deployment is refused if ``metric`` gets worse than the base's by more than ``tolerance``.

    ``metric`` is ``nll`` or a figure of the task, of the evaluation named ``evaluation``.
    """

    evaluation: str = "heldout"
    metric: str = "nll"
    tolerance: float = Field(default=0.0, ge=0.0)


class Deploy(Section):
    """``register_as`` publishes the result under a name; null only leaves it in the output folder.

    ``merge`` folds the adapter into a copy of the base, which can then be served by that name.
    """

    register_as: str | None = Field(default=None, pattern=rf"^{NAME}$")
    merge: bool = False
    gate: Gate | None = Gate()


class Monitor(Section):
    """Thresholds that a deployed model's monitor uses; stored beside it with reference figures.

    ``psi_alert`` is the population stability index of prompt lengths (10 quantile bins) above which
    a window of ``window`` requests raises an alert, at most one every ``cooldown`` seconds.
    """

    psi_alert: float = Field(default=0.2, gt=0.0)
    window: Count = 500
    cooldown: float = Field(default=3600.0, ge=0.0)


class Recipe(Section):
    """A whole run. See docs/recipes.md for every key with an example."""

    recipe: str = Field(pattern=rf"^{NAME}$")
    about: str = ""
    base: str = "default"
    seed: int = Field(default=0, ge=0, lt=2**31)
    data: list[Data] = Field(min_length=1)
    contamination: Contamination = Contamination()
    template: str = "chat"
    adapter: Adapter = Adapter()
    loss: Choice = Choice(name="causal")
    train: TrainOptions
    evaluate: list[Evaluation] = [Evaluation()]
    deploy: Deploy = Deploy()
    monitor: Monitor = Monitor()

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, value: Any) -> Any:
        """Sources without a name get their position's; the trainer gets the recipe's seed."""
        if not isinstance(value, dict):
            return value
        value = dict(value)
        if isinstance(value.get("loss"), dict):
            value["loss"] = {"name": "causal", **value["loss"]}
        if isinstance(value.get("train"), dict):
            value["train"] = {"seed": value.get("seed", 0), **value["train"]}
        if isinstance(value.get("data"), list):
            value["data"] = [
                {**data, "name": data.get("name") or f"data-{index}"}
                if isinstance(data, dict)
                else data
                for index, data in enumerate(value["data"])
            ]
        return value

    @field_validator("template")
    @classmethod
    def _template(cls, value: str) -> str:
        if value not in TEMPLATES and not value.endswith(".jinja"):
            raise ValueError(
                f"must be one of {', '.join(TEMPLATES)} or a file that ends in .jinja"
                f"{did_you_mean(value, TEMPLATES)}"
            )
        return value

    @field_validator("data")
    @classmethod
    def _names(cls, value: list[Data]) -> list[Data]:
        names = [data.name for data in value]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two sources are named {min(twice)!r}; names must differ")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        sources = [data.name for data in self.data]
        evaluations = [evaluation.name for evaluation in self.evaluate]
        if len(set(evaluations)) < len(evaluations):
            raise ValueError("evaluate: two evaluations have the same name")
        for evaluation in self.evaluate:
            for name in evaluation.data or ():
                if name not in sources:
                    raise ValueError(
                        f"evaluate: {evaluation.name} names the data {name!r}"
                        f"{did_you_mean(name, sources)}; there are: {', '.join(sources)}"
                    )
        gate = self.deploy.gate
        deployed = self.deploy.register_as is not None
        if deployed and gate is not None and gate.evaluation not in evaluations:
            raise ValueError(
                f"deploy.gate.evaluation: no evaluation is named {gate.evaluation!r}"
                f"{did_you_mean(gate.evaluation, evaluations)}; there are: "
                f"{', '.join(evaluations) or 'none'}; gate: null deploys without looking"
            )
        return self

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, as plain values that the file could have held."""
        return self.model_dump(mode="json")
