"""A federation as a file: a fine-tuning recipe, and who learns together how.

::

    federate: dolly-silos
    recipe: dolly.yaml                  # or a built-in recipe, or its keys right here
    clients: {count: 8, split: {name: dirichlet, alpha: 0.5, min_size: 20}}
    strategy: {name: fedprox, mu: 0.01}
    schedule: {name: sync, rounds: 20, sample: 4}
    local: {steps: 10}
    codec: [{name: top_k, keep: 0.1}, {name: quantise, bits: 8}]
    error_feedback: true
    evaluations: [recipe, {name: arc-easy, limit: 200}]

The recipe's data, base, adapter and training options are used, and its evaluations if
``evaluations`` says ``recipe``; its steps and deployment are not. All keys are checked before
anything is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator
from torch import nn

from anabranch import registry
from anabranch.errors import ConfigurationError, UnknownName
from anabranch.evaluation.benchmarks import Benchmark
from anabranch.federated import splits
from anabranch.federated.clock import DeviceProfile, log_uniform
from anabranch.federated.codecs import Chain, Codec, ErrorFeedback
from anabranch.federated.examination import RECIPE, Examination
from anabranch.federated.local import LocalTraining
from anabranch.federated.messages import Work
from anabranch.federated.personal import hold_out
from anabranch.federated.runtimes import Runtime, Simulation, Site
from anabranch.federated.runtimes.processes import Processes
from anabranch.federated.scheduling import Buffered, Deadline, Everyone, Schedule, Sync, Uniform
from anabranch.federated.secure import (
    FixedPoint,
    Secure,
    SecureOptions,
    refuse_codec,
    secure_schedule,
)
from anabranch.federated.strategies import FedAvg, Strategy
from anabranch.federated.topologies import Star, Topology, Tree
from anabranch.training.checks import ALL_WEIGHTS
from anabranch.training.objective import Objective
from anabranch.training.options import Section, parse_options
from anabranch.training.plugins import construct
from anabranch.training.privacy import Privacy
from anabranch.training.recipe import NAME, Choice, Count, Recipe
from anabranch.training.recipe_file import load_recipe, parse_yaml, with_override
from anabranch.training.setup import Setup

SPLITS: dict[str, Callable[..., Any]] = {
    "iid": splits.iid,
    "dirichlet": splits.dirichlet,
    "shards": splits.shards,
    "category": splits.by_category,
}


class Clients(Section):
    """How many there are and who gets which training examples.

    ``split`` is iid, dirichlet (``alpha``, ``min_size``, ``balance``), shards (``per_client``), or
    category, which makes one client for each of the recipe's data sources and takes no ``count``.
    The label of an example is the name of its source. ``held_out`` is the share of each client's
    examples that it is evaluated on and does not train on; null is a tenth in a comparison, and
    none elsewhere.
    """

    count: Count | None = None
    split: Choice = Choice(name="iid")
    held_out: Annotated[float | None, Field(ge=0, lt=1)] = None

    @model_validator(mode="after")
    def _consistent(self) -> Clients:
        if self.split.name not in SPLITS:
            raise ValueError(f"split is one of {', '.join(SPLITS)}, not {self.split.name!r}")
        if (self.count is None) != (self.split.name == "category"):
            raise ValueError("count is needed, except for split: category, which finds it")
        return self

    def divide(self, labels: Sequence[str], seed: int) -> dict[str, np.ndarray]:
        """Indices of the examples that each client trains on, by client name."""
        parts = self._parts(labels, seed)
        own = hold_out(parts, self.held_out or 0.0, seed)
        return {name: part[~np.isin(part, own[name])] for name, part in parts.items()}

    def own(self, labels: Sequence[str], seed: int) -> dict[str, np.ndarray]:
        """Indices of those that each client is evaluated on."""
        return hold_out(self._parts(labels, seed), self.held_out or 0.0, seed)

    def _parts(self, labels: Sequence[str], seed: int) -> dict[str, np.ndarray]:
        options = self.split.options
        try:
            if self.split.name == "category":
                found = splits.by_category(labels, **options)
                return {str(name): part for name, part in found.items()}
            first = len(labels) if self.split.name == "iid" else labels
            parts = SPLITS[self.split.name](first, self.count, seed=seed, **options)
        except TypeError as error:
            raise ConfigurationError(f"clients.split: {error}") from None
        width = len(str(len(parts) - 1))
        return {f"client-{index:0{width}d}": part for index, part in enumerate(parts)}


class Timetable(Section):
    """``sync`` (``sample`` clients a round: a number or a share), ``deadline`` (also ``seconds``
    and ``enough``) or ``buffered`` (``size``, ``max_staleness``); ``rounds`` are versions to make.
    Without a name it is the method's own: FedCompass groups, FedAMD asks everyone first, most
    others are ``sync``. With a barrier the clients' learning rate may fall from round to round by
    ``decay``.
    """

    name: Literal["sync", "deadline", "buffered"] | None = None
    rounds: Count = 10
    sample: Annotated[int | float | None, Field(gt=0)] = None
    decay: Literal["constant", "linear", "cosine"] | None = None
    seconds: Annotated[float | None, Field(gt=0)] = None
    enough: Count | None = None
    size: Count | None = None
    max_staleness: Annotated[int | None, Field(ge=0)] = None

    @model_validator(mode="after")
    def _consistent(self) -> Timetable:
        own = {
            None: {"sample", "decay"},
            "sync": {"sample", "decay"},
            "deadline": {"sample", "decay", "seconds", "enough"},
            "buffered": {"size", "max_staleness"},
        }[self.name]
        given = {n for n in self.model_fields_set if getattr(self, n) is not None}
        if foreign := sorted(given - own - {"name", "rounds"}):
            which = self.name or "the method's own schedule"
            raise ValueError(f"{which} has no {', '.join(foreign)}; it has {sorted(own)}")
        if self.name == "deadline" and self.seconds is None:
            raise ValueError("a deadline needs seconds")
        return self

    def build(self, strategy: Strategy, work: Work) -> Schedule:
        """The schedule. Methods that say themselves how much a task is, keep to that."""
        if self.name is None:
            sampler = None if self.sample is None else Uniform(self.sample)
            made = strategy.schedule(self.rounds, sampler)
            if hasattr(made, "work"):
                made.work = work
            if self.decay is not None:
                if not isinstance(made, Sync):
                    raise ConfigurationError(f"schedule.decay: {strategy.name} has no rounds")
                made.decay = self.decay
            return made
        chosen = Everyone() if self.sample is None else Uniform(self.sample)
        decay = self.decay or "constant"
        if self.name == "sync":
            return Sync(self.rounds, chosen, work, decay=decay)
        if self.name == "deadline":
            assert self.seconds is not None
            return Deadline(
                self.rounds, chosen, work, decay=decay, seconds=self.seconds, enough=self.enough
            )
        return Buffered(self.rounds, self.size or 10, self.max_staleness, work)


class Local(Section):
    """What a client does in a task: ``steps`` or ``epochs``.

    ``personal`` are the steps with which each client tunes the result for itself in a comparison,
    by default ``steps``.
    """

    steps: Count | None = None
    epochs: Annotated[float | None, Field(gt=0)] = None
    personal: Count | None = None

    @model_validator(mode="after")
    def _one(self) -> Local:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give steps or epochs, one of the two")
        return self


class Promise(Section):
    """Differential privacy of every single example, against everyone who sees what clients send.

    The coordinator is among them: noise is added by the clients, which keep the account.
    ``epsilon`` is the budget of the whole run, for each client, ``delta`` below one over its
    examples, ``clip`` the largest norm of one example's gradient. ``noise`` is the noise
    multiplier; without it the smallest that keeps the budget for all rounds is used. Not hidden
    are how many examples a client has, and what several examples of one person have in common.
    """

    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)
    clip: float = Field(gt=0)
    noise: Annotated[float | None, Field(gt=0)] = None

    def build(self, rounds: int) -> Privacy:
        """For clients that may be asked in every round."""
        return Privacy(self.delta, self.clip, self.epsilon, self.noise, tasks=rounds)


class SecureSum(Section):
    """The coordinator learns the sum of a round's updates, and no single one. ``secure: true`` is
    short for the defaults. See :class:`SecureOptions` and :class:`FixedPoint`.
    """

    threshold: int | float = 2 / 3
    bits: Literal[32, 64] = 64
    fraction: int | None = None

    def build(self) -> SecureOptions:
        """The options; a fraction of 24 bits, or 16 of 32."""
        fraction = self.fraction or (24 if self.bits == 64 else 16)
        return SecureOptions(self.threshold, FixedPoint(self.bits, fraction))


class Publish(Section):
    """Every version is served at once by the server at ``url`` (``anabranch up``), as ``adapter``.

    ``model`` is the base's name there; not needed if there is one only. ``folder`` is the server's
    folder of adapters, on this machine or shared; by default that of the cache. ``key_file`` holds
    an API key.
    """

    url: str = Field(pattern=r"^https?://[^/\s]+/?$")
    model: str | None = None
    adapter: str | None = Field(default=None, pattern=rf"^{NAME}$")
    folder: Path | None = None
    key_file: Path | None = None


class FederateJob(Section):
    """A whole federation.

    ``devices`` are simulated speeds: ``equal`` ones take no time, ``log_uniform`` ones are spread
    over an order of magnitude. Every ``evaluate_every`` versions the validation rows are scored.
    ``evaluations`` are benchmarks (``anabranch list benchmarks``) with their options, and
    ``recipe`` for the recipe's own; they are asked before the first version and after the last.
    """

    federate: str = Field(pattern=rf"^{NAME}$")
    recipe: Recipe
    clients: Clients
    seed: int = Field(default=0, ge=0, lt=2**31)
    strategy: Choice = Choice(name="fedavg")
    aggregator: Choice | None = None
    schedule: Timetable = Timetable()
    local: Local = Local(steps=10)
    codec: list[Choice] = []
    error_feedback: bool = False
    down: list[Choice] = []
    tree: Annotated[int | None, Field(ge=2)] = None
    """Inputs of each aggregator; null: all clients send to the coordinator."""
    devices: Literal["equal", "log_uniform"] = "equal"
    runtime: Literal["simulation", "processes", "ray", "flower"] = "simulation"
    """Sites one after the other in virtual time, in ``workers`` processes of this machine, in as
    many actors of a Ray cluster, or on SuperNodes of Flower here."""
    workers: Count | None = None
    evaluate_every: Count = 1
    evaluations: list[Choice] = []
    secure: SecureSum | None = None
    publish: Publish | None = None
    privacy: Promise | None = None
    keep_versions: bool = False
    """Store every version's adapter under ``versions/``."""

    @field_validator("recipe")
    @classmethod
    def _no_warm_up_unless_named(cls, recipe: Recipe) -> Recipe:
        """A warm-up begins with a step at rate zero, here in every task."""
        if "warmup" in recipe.train.model_fields_set:
            return recipe
        return recipe.model_copy(update={"train": recipe.train.model_copy(update={"warmup": 0.0})})

    def make_strategy(self) -> Strategy:
        """The method with its aggregator. Raises for unknown names and options."""
        cls = registry.get("strategies", self.strategy.name)
        made: Strategy = cls(**_checked_options(cls, self.strategy))
        if made.adapter and made.adapter != self.recipe.adapter.method:
            raise ConfigurationError(
                f"{made.name} is for the adapter {made.adapter}; the recipe has "
                f"{self.recipe.adapter.method}"
            )
        if made.moves_base:
            raise ConfigurationError(
                f"{made.name} also moves the frozen weights, which a saved adapter does not hold; "
                f"call {type(made).__name__}().simulate(...) from Python and merge the model"
            )
        if self.privacy is not None and not made.private:
            raise ConfigurationError(f"{made.name} cannot keep privacy; fedavg and fed-sb can")
        if made.decentralised:
            raise ConfigurationError(
                f"{made.name} has no server, so a job cannot tell which model to save; call "
                f"{type(made).__name__}().simulate(...) from Python"
            )
        if self.aggregator is not None:
            if not isinstance(made, FedAvg):
                raise ConfigurationError(f"{made.name} does not take an aggregator")
            rule = _plugin("aggregators", self.aggregator, "aggregator")
            made = cls(**_checked_options(cls, self.strategy), rule=rule)
        if self.secure is not None:
            return Secure(made, self.secure.build())
        return made

    def make_benchmarks(self) -> dict[str, Benchmark[Any]]:
        """By label. Raises for unknown names and options, and for two of one label."""
        made: dict[str, Benchmark[Any]] = {}
        for choice in self.evaluations:
            if choice.name == RECIPE:
                if choice.options:
                    raise ConfigurationError("evaluations: recipe has no options; its file has")
                continue
            benchmark = _plugin("benchmarks", choice, "evaluations")
            if benchmark.label in made:
                raise ConfigurationError(
                    f"evaluations: two are called {benchmark.label!r}; give one a label"
                )
            made[benchmark.label] = benchmark
        return made

    def make_examination(self, setup: Setup) -> Examination:
        """The job's evaluations of the model of a set-up."""
        asks_recipe = any(choice.name == RECIPE for choice in self.evaluations)
        return Examination(self.make_benchmarks(), asks_recipe, setup)

    def make_local(self, objective: Objective[Any, Any]) -> LocalTraining:
        """How every site trains."""
        privacy = self.privacy.build(self.schedule.rounds) if self.privacy else None
        return LocalTraining(objective, self.recipe.train, privacy)

    def make_schedule(self) -> Schedule:
        """Who works when."""
        strategy = self.make_strategy()
        inner = strategy.strategy if isinstance(strategy, Secure) else strategy
        made = self.schedule.build(inner, Work(steps=self.local.steps, epochs=self.local.epochs))
        return made if self.secure is None else secure_schedule(made)

    def make_codec(self, direction: Literal["up", "down"]) -> Codec | None:
        """The chain of codecs of a direction; None: nothing is encoded."""
        chosen = self.codec if direction == "up" else self.down
        made = [_plugin("codecs", choice, direction) for choice in chosen]
        if not made:
            return None
        codec: Codec = made[0] if len(made) == 1 else Chain(made)
        if direction == "up" and self.secure is not None:
            refuse_codec(codec)
        return ErrorFeedback(codec) if direction == "up" and self.error_feedback else codec

    def make_devices(self, count: int) -> list[DeviceProfile]:
        """One for each client."""
        if self.devices == "log_uniform":
            return log_uniform(count, self.seed)
        return [DeviceProfile()] * count

    def make_runtime(self, sites: Sequence[Site], model: nn.Module) -> Runtime:
        """Where the sites work. Nothing is started yet."""
        if self.runtime == "processes":
            return Processes(sites, model, self.workers or 2)
        if self.runtime == "ray":
            from anabranch.federated.runtimes.ray import Ray  # says so if Ray is missing

            return Ray(sites, model, self.workers)
        if self.runtime == "flower":
            raise ConfigurationError(
                "runtime: flower begins in an app of Flower, not here; running.federate starts one"
            )
        return Simulation(sites, model, strict=False)

    def make_topology(self, clients: Sequence[str]) -> Topology:
        """A star, or a balanced tree."""
        return Star() if self.tree is None else Tree.balanced(clients, self.tree)

    @field_validator("secure", mode="before")
    @classmethod
    def _defaults(cls, value: Any) -> Any:
        return {} if value is True else None if value is False else value

    @model_validator(mode="after")
    def _consistent(self) -> FederateJob:
        if self.publish is not None and self.recipe.adapter.method in ALL_WEIGHTS:
            raise ValueError("publish serves adapters; the recipe trains all weights")
        if self.secure is not None and self.tree is not None:
            raise ValueError("tree: the sites of a secure sum send to the coordinator only")
        if self.runtime != "simulation" and self.devices != "equal":
            raise ValueError("devices are simulated speeds; processes are as fast as they are")
        if self.runtime not in ("processes", "ray") and self.workers is not None:
            raise ValueError(f"workers are for runtime: processes or ray; {self.runtime} has none")
        if self.runtime == "flower" and self.clients.held_out:
            raise ValueError("clients.held_out: nothing is evaluated on the nodes of Flower")
        if self.error_feedback and not self.codec:
            raise ValueError("error_feedback corrects a codec; none is given")
        if self.keep_versions and self.recipe.adapter.method in ALL_WEIGHTS:
            raise ValueError("keep_versions stores adapters; the recipe trains all weights")
        return self

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, as plain values."""
        return self.model_dump(mode="json")


def load_job(source: str | Path, overrides: Iterable[str] = ()) -> FederateJob:
    """A job file with ``key=value`` on top. Names and options of plug-ins are checked, too.

    Raises :class:`ConfigurationError` with one line per mistake.
    """
    path = Path(source)
    try:
        values = parse_yaml(path.read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error
    within_recipe = []
    for override in overrides:
        key = override.partition(".")[0]
        if key == "recipe" and isinstance(values.get("recipe"), str):
            within_recipe.append(override.partition(".")[2])
        else:
            values = with_override(values, override)
    if isinstance(recipe := values.get("recipe"), str):
        beside = path.parent / recipe
        values["recipe"] = load_recipe(beside if beside.is_file() else recipe, within_recipe)
    values["evaluations"] = _beside(values.get("evaluations", []), path.parent)
    job = parse_options(FederateJob, values)
    try:
        job.make_schedule(), job.make_codec("up"), job.make_codec("down"), job.make_benchmarks()
    except UnknownName as error:
        raise ConfigurationError(str(error)) from None
    return job


def _beside(evaluations: Any, folder: Path) -> Any:
    """Let relative paths start at ``folder``; what is malformed is left to be refused."""
    if not isinstance(evaluations, list):
        return evaluations
    return [
        {**given, "path": str(folder / given["path"])}
        if isinstance(given, dict) and isinstance(given.get("path"), str)
        else given
        for given in evaluations
    ]


def _plugin(kind: str, choice: Choice, where: str) -> Any:
    return construct(registry.get(kind, choice.name), choice.options, where)


def _checked_options(cls: type[Any], choice: Choice) -> dict[str, Any]:
    """Options of a strategy, which may pass some on to the method that it builds on."""
    try:
        cls(**choice.options)
    except TypeError as error:
        raise ConfigurationError(f"strategy: {error}") from None
    return choice.options
