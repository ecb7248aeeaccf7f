"""Parameter-efficient methods on equal terms: one base, one task, one budget of weights.

Every method starts from the same base, sees the same items in the same order and takes the same
number of steps; its size is chosen to train about ``budget`` weights. The learning rate is that of
its kind (:data:`LEARNING_RATES`), because a prompt needs another one than a matrix.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from anabranch import adapters
from anabranch.adapters.lora_sb import estimate_gradients, initialise
from anabranch.adapters.sparse import choose, fisher_information, movement
from anabranch.models.progress import Progress, silent
from anabranch.training.example import Item
from anabranch.training.hooks import Hook
from anabranch.training.language import LanguageObjective
from anabranch.training.losses.causal import Causal
from anabranch.training.options import TrainOptions
from anabranch.training.randomness import seed_all
from anabranch.training.trainer import Trainer

FULL = "full"
"""Every weight is trained: the reference that the methods are measured by."""
SAMPLES = 64
"""Items from which FishMask, LT-SFT and LoRA-SB take their gradients."""

LEARNING_RATES: Mapping[str, float] = {
    FULL: 3e-3,
    "soft prompt": 3e-1,
    "adapter": 3e-2,
    "low rank": 1e-2,
    "unstructured": 2e-2,
    "": 1e-2,
}
"""By leaf of the taxonomy, for a tiny model; ``""`` for the others. Larger models take less."""


@dataclass(frozen=True)
class Problem:
    """What the methods are compared on. ``general`` is what the base knew and may forget."""

    train: Sequence[Item]
    valid: Sequence[Item]
    general: Sequence[Item]
    steps: int = 100
    batch: int = 8
    lr_scale: float = 1.0


@dataclass(frozen=True)
class Row:
    """One method with one seed. NLL in nats a token, sizes in bytes, times in seconds.

    ``forgetting`` is how much the NLL of ``general`` rose with the adapter on.
    ``gap_closed`` is the part of full fine-tuning's improvement, if that was run.
    """

    method: str
    seed: int
    options: Mapping[str, Any]
    trainable: int
    saved_bytes: int
    peak_bytes: int
    step_seconds: float
    tokens_per_second: float | None
    merged_tokens_per_second: float | None
    nll: float
    base_nll: float
    forgetting: float
    base_intact: bool
    """Whether switching the adapter off gives the base's logits to the last bit."""
    gap_closed: float | None = None


@dataclass(frozen=True)
class Comparison:
    """All rows, in the order in which they were run."""

    budget: int
    rows: list[Row] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    """Methods that cannot be built at this budget, and why."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Before:
    """The base's NLL on the task and on what it knew."""

    nll: float
    general: float


def measure_base(base: nn.Module, problem: Problem) -> Before:
    """What the base gives without any adapter."""
    options = _options(problem, 1.0, 0)
    objective = LanguageObjective.from_options(Causal(), options)
    trainer = Trainer(
        copy.deepcopy(base).requires_grad_(True), objective, options, problem.train[:1]
    )
    return Before(
        trainer.evaluate(problem.valid)["loss"], trainer.evaluate(problem.general)["loss"]
    )


def compare(
    methods: Sequence[str],
    base: nn.Module,
    problem: Problem,
    budget: int,
    seeds: Sequence[int] = (0,),
    progress: Progress = silent,
    brief: bool = False,
) -> Comparison:
    """Adapt the base by every method and seed; :data:`FULL` is run first if it is among them.

    The base is not touched. A method that has no setting within 20 % of the budget is listed with
    the reason in ``refused`` and the others go on. ``brief`` leaves out how fast they run.
    """
    ordered = sorted(dict.fromkeys(methods), key=lambda name: name != FULL)
    comparison = Comparison(budget)
    options: dict[str, dict[str, Any]] = {FULL: {}}
    for name in ordered:
        progress(f"{name}: fitting the budget", None)
        try:
            if name != FULL:
                options[name] = adapters.fit_budget(name, base, budget)
        except adapters.AdapterError as error:
            comparison.refused[name] = str(error)
    before = measure_base(base, problem)
    best: dict[int, float] = {}
    total, done = len(options) * len(seeds), 0
    for name in (name for name in ordered if name in options):
        for seed in seeds:
            progress(f"{name}, seed {seed}", done / total)
            row = adapt(name, base, problem, options[name], seed, before, brief=brief)
            if name == FULL:
                best[seed] = row.nll
            comparison.rows.append(_with_gap(row, best.get(seed)))
            done += 1
    return comparison


def adapt(
    name: str,
    base: nn.Module,
    problem: Problem,
    options: Mapping[str, Any],
    seed: int,
    before: Before,
    lr: float | None = None,
    brief: bool = False,
    prepare: Callable[[Any], None] | None = None,
) -> Row:
    """Train one method on a copy of the base, and measure it.

    ``before`` is what :func:`measure_base` gives. ``lr`` None is that of the method's kind.
    ``brief`` leaves out how fast it runs. ``prepare`` gives the new adapter another start.
    """
    seed_all(seed)
    network = copy.deepcopy(base)
    model: Any = (
        network.requires_grad_(True)
        if name == FULL
        else adapters.build(name, network, **dict(options))
    )
    if prepare is not None:
        prepare(model)
    train = _options(problem, (learning_rate(name) if lr is None else lr) * problem.lr_scale, seed)
    objective = LanguageObjective.from_options(Causal(), train)
    memory = _Memory()
    trainer = Trainer(model, objective, train, problem.train, hooks=[memory])
    if name in _CHOOSERS:
        trainer = _CHOOSERS[name](model, trainer, problem, memory)
    reports = [trainer.step(trainer.next_items()) for _ in range(problem.steps)]

    trainable = trainable_weights(model)
    nll = trainer.evaluate(problem.valid)["loss"]
    forgetting = trainer.evaluate(problem.general)["loss"] - before.general
    speed = None if brief else _speed(trainer, problem.valid)
    intact = name == FULL or _intact(model, base, problem.general[: problem.batch])
    saved = _saved_bytes(model, name)
    return Row(
        method=name,
        seed=seed,
        options=dict(options),
        trainable=trainable,
        saved_bytes=saved,
        peak_bytes=memory.peak,
        step_seconds=sorted(report.seconds for report in reports)[len(reports) // 2],
        tokens_per_second=speed,
        merged_tokens_per_second=None if brief else _merged_speed(model, name, train, problem),
        nll=nll,
        base_nll=before.nll,
        forgetting=forgetting,
        base_intact=intact,
    )


def learning_rate(name: str) -> float:
    """The rate for a method's kind."""
    kind = FULL if name == FULL else adapters.method(name).leaf
    return LEARNING_RATES.get(kind, LEARNING_RATES[""])


def trainable_weights(model: nn.Module) -> int:
    """Trainable weights."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


class _Memory(Hook):
    """The largest resident memory (CPU) or allocation (GPU) of a step above the first reading."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._before = self._now()
        self.peak = 0

    def after_gradients(self, trainer: Any) -> None:
        self.peak = max(self.peak, self._now() - self._before)

    def after_step(self, trainer: Any, report: Any) -> None:
        self.peak = max(self.peak, self._now() - self._before)

    def _now(self) -> int:
        if torch.cuda.is_available():
            return int(torch.cuda.max_memory_allocated())
        return int(self._process.memory_info().rss)


def _options(problem: Problem, lr: float, seed: int) -> TrainOptions:
    values = {
        "steps": problem.steps,
        "batch": problem.batch,
        "lr": lr,
        "precision": "fp32",
        "packing": "none",  # soft prompts ignore the block mask of packed rows
        "micro_batch_tokens": max(len(item[0]) for item in problem.train) * problem.batch,
        "seed": seed,
    }
    return TrainOptions.model_validate(values)


def _losses(trainer: Any, items: Sequence[Item]) -> list[Callable[[], Tensor]]:
    """A function for each item that gives its mean loss by the trainer's objective."""
    objective = trainer.objective

    def loss(item: Item) -> Tensor:
        (micro_batch,) = objective.plan([item])
        return objective.loss(trainer.model, micro_batch, objective.denominators([item])).loss

    return [lambda item=item: loss(item) for item in items]  # type: ignore[misc]


def _again(model: Any, trainer: Any, memory: Hook) -> Any:
    """A trainer of the parameters that are there now, otherwise the same."""
    return Trainer(model, trainer.objective, trainer.options, trainer.items, hooks=[memory])


def _fishmask(model: Any, trainer: Any, problem: Problem, memory: Hook) -> Any:
    choose(model, fisher_information(model, _losses(trainer, problem.train[:SAMPLES])))
    return _again(model, trainer, memory)


def _lt_sft(model: Any, trainer: Any, problem: Problem, memory: Hook) -> Any:
    def tune() -> None:
        options = trainer.options.model_copy(
            update={"lr": LEARNING_RATES[FULL] * problem.lr_scale, "steps": problem.steps}
        )
        full = Trainer(model, trainer.objective, options, problem.train)
        for _ in range(problem.steps):
            full.step(full.next_items())

    choose(model, movement(model, tune))
    return _again(model, trainer, memory)


def _lora_sb(model: Any, trainer: Any, problem: Problem, memory: Hook) -> Any:
    gradients = estimate_gradients(model, _losses(trainer, problem.train[:SAMPLES]))
    initialise(model, gradients, LEARNING_RATES[FULL] * problem.lr_scale)
    return trainer


_CHOOSERS: Mapping[str, Callable[[Any, Any, Problem, Hook], Any]] = {
    "fishmask": _fishmask,
    "lt_sft": _lt_sft,
    "lora_sb": _lora_sb,
}
"""What a method does with data before its first step."""


@torch.no_grad()
def _intact(model: Any, base: Any, items: Sequence[Item]) -> bool:
    model.eval()
    device = next(base.parameters()).device
    with model.disable_adapter():
        for (example,) in items:
            tokens = torch.tensor([list(example.tokens)], device=device)
            if not torch.equal(model(input_ids=tokens).logits, base(input_ids=tokens).logits):
                return False
    return True


def _speed(trainer: Any, items: Sequence[Item]) -> float:
    """Tokens a second of the forward pass, the best of three."""
    tokens = trainer.objective.tokens(items)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        trainer.evaluate(items)
        times.append(time.perf_counter() - began)
    return tokens / min(times)


def _merged_speed(model: Any, name: str, train: TrainOptions, problem: Problem) -> float | None:
    if name == FULL or not adapters.method(name).mergeable:
        return None
    try:
        merged = adapters.merge(copy.deepcopy(model)).requires_grad_(True)
    except adapters.NotMergeable:
        return None
    objective = LanguageObjective.from_options(Causal(), train)
    return _speed(Trainer(merged, objective, train, problem.train), problem.valid)


def _saved_bytes(model: Any, name: str) -> int:
    if name == FULL:
        return sum(p.numel() * p.element_size() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        stored = adapters.save(model, Path(folder) / "adapter")
        return (stored / "adapter_model.safetensors").stat().st_size


def _with_gap(row: Row, best: float | None) -> Row:
    if best is None or row.base_nll == best:
        return row
    return Row(**{**vars(row), "gap_closed": (row.base_nll - row.nll) / (row.base_nll - best)})
