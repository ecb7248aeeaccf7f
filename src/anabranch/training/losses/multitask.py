"""One loss over several tasks, in which no task dominates by its size or its ease.

MFTCoder (Liu et al., KDD 2024), sections 3.2 and 3.3. What it does not know: how weights move
(:mod:`anabranch.training.losses.balance`), and which model gave the scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from anabranch import registry
from anabranch.errors import ConfigurationError, did_you_mean
from anabranch.training.errors import DataError, TrainingError
from anabranch.training.example import Example, Item
from anabranch.training.hooks import Hook
from anabranch.training.losses.balance import Balancer
from anabranch.training.losses.balance_hook import BalanceHook
from anabranch.training.losses.base import Loss, TokenScores
from anabranch.training.objective import LossOutput

Normalise = Literal["token", "sample", "task-token", "task-sample"]
Focal = Literal["sample", "task"]

SMALLEST = 1e-8
"""Probabilities below this one are taken as this one under a logarithm."""


class MultiTaskLoss(Loss):
    """Negative log-likelihood over several tasks, normalised per task, focal, or balanced.

    With the trained tokens k of sample j of task i, T their number and M a task's samples, both
    counted over the whole optimiser step, whatever its micro-batches::

        token        sum_ijk nll / sum_i T_i
        sample       mean_ij ( mean_k nll )
        task-token   sum_i w_i ( sum_jk nll / T_i )          / sum_i w_i
        task-sample  sum_i w_i ( mean_j ( mean_k nll ) )     / sum_i w_i

    where i runs over the tasks that the step has, and w are the balancer's weights (default: the
    same for all). ``focal`` looks at P = the mean probability of a sample's correct tokens and
    replaces mean_k nll by ``-alpha (1 - P)**gamma log P``: of each sample with ``"sample"``
    (normalise ``sample`` or ``task-sample``), of the mean P of each task's samples with ``"task"``
    (normalise ``task-sample``; it needs a first pass without gradient, at a third of a step's cost,
    because its derivative at one sample depends on all others).

    ``alpha`` is a number or one per task. ``balancer`` is a name, ``{"name": ..., option: ...}`` or
    an object; with a name the tasks and their sizes are taken from the data given to
    :meth:`hooks`. ``interval``, ``valid_batch`` and ``valid_batches`` say how often a balancer that
    follows validation losses evaluates, and on how many items.

    When to use it: tasks of unequal size or speed in one run. Known problems: with ``task-*`` a
    task with few rows in a step has a noisy gradient at full weight, so give steps enough rows.
    An example is a sample; one without trained tokens counts nowhere but in ``untrained``.
    """

    name = "multitask"

    def __init__(
        self,
        normalise: Normalise = "task-token",
        focal: Focal | None = None,
        balancer: Balancer | Mapping[str, Any] | str | None = None,
        *,
        gamma: float = 2.0,
        alpha: float | Mapping[str, float] = 1.0,
        interval: int = 1,
        valid_batch: int = 8,
        valid_batches: int = 1,
    ) -> None:
        _require(normalise, get_args(Normalise), "normalise")
        if focal is not None:
            _require(focal, get_args(Focal), "focal")
            fits = ("task-sample",) if focal == "task" else ("sample", "task-sample")
            if normalise not in fits:
                raise ConfigurationError(
                    f"focal {focal!r} is a mean over samples: set normalise to "
                    f"{' or '.join(fits)}, not {normalise!r}"
                )
        if balancer is not None and not normalise.startswith("task"):
            raise ConfigurationError(
                f"normalise {normalise!r} has no task weights that a balancer could set; "
                f"use task-token or task-sample"
            )
        if gamma < 0:
            raise ConfigurationError(f"gamma of a focal loss is at least 0, not {gamma}")
        self.normalise = normalise
        self.focal = focal
        self.gamma = gamma
        self.alpha = alpha
        self._wanted = balancer if not isinstance(balancer, Balancer) else None
        self._schedule = {"interval": interval, "batch": valid_batch, "batches": valid_batches}
        self.balancer = balancer if isinstance(balancer, Balancer) else None
        self._steps = 0
        self.two_pass = focal == "task"

    def hooks(self, items: Sequence[Item], validation: Sequence[Item]) -> Sequence[Hook]:
        """Builds the balancer from its name and the training data, and what feeds it."""
        if self._wanted is not None:
            sizes: dict[str, int] = {}
            for example in _trained(items):
                sizes[example.task] = sizes.get(example.task, 0) + 1
            self.balancer = build_balancer(self._wanted, sizes)
        if self.balancer is None:
            return ()
        counting = _CountSteps(self)
        if not self.balancer.observes:
            return (counting,)
        return (counting, BalanceHook(self.balancer, validation, **self._schedule))

    def denominators(self, items: Sequence[Item]) -> Mapping[str, float]:
        """``tokens/<task>`` and ``samples/<task>``; of every task of the balancer if there is one.

        Raises :class:`DataError` for a task that was not announced.
        """
        known = self._announced()
        counts = {f"{unit}/{task}": 0.0 for task in known for unit in ("tokens", "samples")}
        for example in _trained(items):
            if known and example.task not in known:
                raise DataError(
                    f"{example.source or 'an example'} is of task {example.task!r}"
                    f"{did_you_mean(example.task, known)}; the balancer has {', '.join(known)}"
                )
            for unit, amount in (("tokens", example.targets), ("samples", 1)):
                key = f"{unit}/{example.task}"
                counts[key] = counts.get(key, 0.0) + amount
        return counts

    def first_pass(self, scores: TokenScores) -> Mapping[str, float]:
        """``probability/<task>``: P of the task's samples, summed."""
        samples = _Samples.of(scores)
        return samples.per_task("probability", samples.probability)

    def __call__(self, scores: TokenScores, denominators: Mapping[str, float]) -> LossOutput:
        """This micro-batch's share, and per-task sums."""
        samples = _Samples.of(scores)
        values = self._values(samples)
        sums = samples.per_task("value", values.detach())
        # Every mode is a sum over samples of a value times a coefficient that the step determines.
        shares = self._shares(denominators)
        coefficients = values.new_tensor([shares[task] for task in samples.tasks])
        if self.focal == "task":
            values = self._linearised(values, samples, denominators)
        sums |= samples.per_task("nll", samples.nll.detach())
        sums |= samples.per_task("tokens", samples.tokens)
        sums |= samples.per_task("samples", torch.ones_like(samples.tokens))
        total = sum(len(item) for item in scores.items)
        if untrained := total - len(samples.tasks):
            sums["untrained"] = float(untrained)
        return LossOutput((values * coefficients).sum(), sums)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """``nll`` per token; ``loss/``, ``nll/``, ``present/`` and ``weight/`` of each task.

        ``loss/`` is the task's own term of the loss and counts with ``weight/``; ``nll/`` is its
        mean over tokens. Tasks that the
        sums do not have are left out, and ``present/`` is 0 for them.
        """
        present = _tasks_in(sums)
        if not present:
            return {}
        unit = "tokens" if self.normalise.endswith("token") else "samples"
        terms = {}
        for task in present:
            value = sums[f"value/{task}"] / sums[f"{unit}/{task}"]
            terms[task] = self._focus_at(value, task)[0] if self.two_pass else value
        shares = self._shares(sums)
        weight = {task: shares[task] * sums[f"{unit}/{task}"] for task in present}
        tokens = sum(sums[f"tokens/{task}"] for task in present)
        found = {"nll": sum(sums[f"nll/{task}"] for task in present) / tokens}
        if "untrained" in sums:
            found["untrained"] = sums["untrained"]
        for task in present:
            found[f"loss/{task}"] = terms[task]
            found[f"nll/{task}"] = sums[f"nll/{task}"] / sums[f"tokens/{task}"]
            found[f"weight/{task}"] = weight[task]
        for task in {*present, *self._announced()}:
            found[f"present/{task}"] = float(task in present)
        return found

    def count(self, step: int) -> None:
        """So many optimiser steps are done."""
        self._steps = step

    def state_dict(self) -> dict[str, Any]:
        """Steps done; the balancer's own state is its hook's."""
        return {"steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._steps = int(state["steps"])

    def _announced(self) -> tuple[str, ...]:
        return self.balancer.tasks if self.balancer is not None else ()

    def _values(self, samples: _Samples) -> Tensor:
        """What is averaged, [samples]."""
        if self.focal == "sample":
            alpha = samples.nll.new_tensor([self._alpha_of(task) for task in samples.tasks])
            return alpha * focal(samples.probability, self.gamma)
        if self.focal == "task":
            return samples.probability
        return samples.nll if self.normalise.endswith("token") else samples.nll / samples.tokens

    def _shares(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Coefficient of a sample's value by task; ``counts`` has the tokens or samples."""
        unit = "tokens" if self.normalise.endswith("token") else "samples"
        present = {task: counts[f"{unit}/{task}"] for task in _tasks_in(counts)}
        if not present:
            raise DataError(
                "no item of the step has a token to train on; mark the answers as trained, or "
                "leave out rows without one"
            )
        if not self.normalise.startswith("task"):
            return dict.fromkeys(present, 1 / sum(present.values()))
        weights = (
            self.balancer.weights(self._steps) if self.balancer else dict.fromkeys(present, 1.0)
        )
        total = sum(weights[task] for task in present)
        if not total:
            raise DataError(
                f"the tasks of this step ({', '.join(present)}) all have weight 0; "
                f"give them a weight, or leave them out of the data"
            )
        return {task: weights[task] / total / count for task, count in present.items()}

    def _linearised(
        self, values: Tensor, samples: _Samples, denominators: Mapping[str, float]
    ) -> Tensor:
        """Values whose sum over the step is f(mean P) of each task, and whose gradient is its.

        With P known, d f(P) = f'(P) dP is linear in the samples, so micro-batches add up.
        """
        if not all(f"probability/{task}" in denominators for task in samples.tasks):
            raise TrainingError(
                "focal 'task' needs the probabilities of the whole step: run first_pass over its "
                "micro-batches and add the sums to the denominators"
            )
        heights, slopes = [], []
        for task in samples.tasks:
            mean = denominators[f"probability/{task}"] / denominators[f"samples/{task}"]
            height, slope = self._focus_at(mean, task)
            heights.append(height)
            slopes.append(slope)
        return values.new_tensor(heights) + values.new_tensor(slopes) * (values - values.detach())

    def _focus_at(self, probability: float, task: str) -> tuple[float, float]:
        """The focal loss of a task at this mean probability, and its derivative."""
        # Metrics are asked for inside no_grad.
        with torch.enable_grad():
            at = torch.tensor(probability, dtype=torch.float64, requires_grad=True)
            height = self._alpha_of(task) * focal(at, self.gamma)
            (slope,) = torch.autograd.grad(height, at)
        return height.item(), slope.item()

    def _alpha_of(self, task: str) -> float:
        if not isinstance(self.alpha, Mapping):
            return float(self.alpha)
        if task not in self.alpha:
            raise ConfigurationError(
                f"alpha has no value for task {task!r}{did_you_mean(task, self.alpha)}"
            )
        return float(self.alpha[task])


def focal(probability: Tensor, gamma: float) -> Tensor:
    """``-(1 - P)**gamma log P``; any shape, gradient through both factors."""
    bounded = probability.clamp(SMALLEST, 1.0)
    return -((1 - bounded) ** gamma) * bounded.log()


def build_balancer(wanted: Mapping[str, Any] | str, sizes: Mapping[str, int]) -> Balancer:
    """A balancer by name, or from ``{"name": ..., option: value}``."""
    options = {"name": wanted} if isinstance(wanted, str) else dict(wanted)
    if "name" not in options:
        raise ConfigurationError(f"balancer: {dict(wanted)} lacks the key 'name'")  # type: ignore[arg-type]
    cls = registry.get("balancers", options.pop("name"))
    try:
        made: Balancer = cls(sizes, **options)
    except TypeError as error:
        raise ConfigurationError(f"balancer {cls.name!r}: {error}") from error
    return made


@dataclass(frozen=True)
class _Samples:
    """The samples of a micro-batch that have trained tokens; tensors are [samples]."""

    tasks: list[str]
    nll: Tensor
    tokens: Tensor
    probability: Tensor

    @classmethod
    def of(cls, scores: TokenScores) -> _Samples:
        """Sum over the tokens of each sample."""
        first = [0]
        for item in scores.items:
            first.append(first[-1] + len(item))
        sample = scores.nll.new_tensor(first, dtype=torch.int64)[scores.item] + scores.example
        counts = torch.bincount(sample, minlength=first[-1])
        kept = counts.nonzero().squeeze(1)
        examples = [example for item in scores.items for example in item]

        def total(values: Tensor) -> Tensor:
            return values.new_zeros(first[-1]).index_add(0, sample, values)[kept]

        tokens = counts[kept].to(scores.nll.dtype)
        probability = total(torch.exp(-scores.nll)) / tokens
        return cls(
            [examples[i].task for i in kept.tolist()], total(scores.nll), tokens, probability
        )

    def per_task(self, name: str, values: Tensor) -> dict[str, float]:
        """``name/<task>`` -> sum of the values of the task's samples."""
        sums: dict[str, float] = {}
        for task, value in zip(self.tasks, values.tolist(), strict=True):
            key = f"{name}/{task}"
            sums[key] = sums.get(key, 0.0) + value
        return sums


class _CountSteps(Hook):
    """Tells the loss how many steps are done, so that a balancer's warm-up ends in time."""

    def __init__(self, loss: MultiTaskLoss) -> None:
        self._loss = loss

    def after_step(self, trainer: Any, report: Any) -> None:
        self._loss.count(report.step)


def _trained(items: Sequence[Item]) -> list[Example]:
    return [example for item in items for example in item if example.targets]


def _tasks_in(counts: Mapping[str, float]) -> list[str]:
    return [k.partition("/")[2] for k, v in counts.items() if k.startswith("samples/") and v > 0]


def _require(value: str, known: Sequence[str], option: str) -> None:
    if value not in known:
        raise ConfigurationError(
            f"{option} must be one of {', '.join(known)}, not {value!r}{did_you_mean(value, known)}"
        )
