"""Steps whose gradients reveal little of any single example (Abadi et al. 2016, algorithm 1)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.training.errors import TrainingError
from anabranch.training.language import LanguageObjective
from anabranch.training.losses.causal import Causal
from anabranch.training.privacy import PrivacyAccount, load_opacus, without_warnings
from anabranch.training.trainer import Trainer

_SMALL = 1e-6
"""Keeps a gradient of zero from being divided by its norm."""


@dataclass(frozen=True)
class Clipped:
    """Sums over examples of clipped gradients, by parameter name, and how many were clipped."""

    sums: dict[str, Tensor]
    clipped: int


def private_steps(trainer: Trainer[Any], account: PrivacyAccount, *words: int | str) -> float:
    """Take all of the trainer's steps; epsilon afterwards.

    A step's batch has each item with probability ``q = batch / items``, and may be empty: then the
    step is noise. The gradient is ``(sum of clipped gradients + noise) / batch``. What the trainer
    does with it afterwards, moments and clipping included, reveals no more. ``words`` name the
    task, so that its noise is its own.

    Raises :class:`PrivacyBudgetExceeded` before the first step if the budget does not allow all.
    """
    if trainer.precision.dtype == torch.float16:
        raise TrainingError("private steps need precision fp32 or bf16: fp16 scales the gradients")
    count = len(trainer.items)
    q = min(1.0, trainer.options.batch / count)
    noise = account.noise(q, trainer.total_steps)
    spent = account.charge(noise, q, trainer.total_steps)
    generator = account.generator(*words)
    clip = account.privacy.clip
    for _ in range(trainer.total_steps):
        drawn = torch.rand(count, generator=generator) < q
        chosen = [trainer.items[index] for index in drawn.nonzero().flatten().tolist()]
        # The step's items are for its figures only, which nobody is told.
        step = trainer.begin_step(chosen or trainer.items[:1])
        found = clipped_gradients(trainer, chosen, clip)
        add_noise(found.sums, noise * clip, generator)
        for name, parameter in trainer.trainable.items():
            parameter.grad = (found.sums[name] / (q * count)).to(parameter.dtype)
        trainer.finish_step(step, 0.0, {})
    return spent


def add_noise(sums: dict[str, Tensor], deviation: float, generator: torch.Generator) -> None:
    """Add Gaussian noise in place, in the order of names."""
    for name in sorted(sums):
        tensor = sums[name]
        drawn = torch.randn(tensor.shape, generator=generator)
        tensor.add_(drawn.to(tensor.device), alpha=deviation)


def clipped_gradients(trainer: Trainer[Any], items: Sequence[Any], clip: float) -> Clipped:
    """Each item's own gradient, scaled down to norm ``clip`` if it is longer, added up in float32.

    An item's loss is that of a step with it alone; one whose gradient is not finite counts as zero,
    as a NaN would be no secret. Language models whose trained weights are those
    of linear modules compute all gradients in one pass, by Opacus' hooks; others one by one.
    """
    sums = {
        name: torch.zeros_like(parameter, dtype=torch.float32)
        for name, parameter in trainer.trainable.items()
    }
    batched = _batched(trainer, items)
    if not items:
        return Clipped(sums, 0)
    if batched is None:
        return _one_by_one(trainer, items, clip, sums)
    return _at_once(trainer, batched, items, clip, sums)


def _one_by_one(
    trainer: Trainer[Any], items: Sequence[Any], clip: float, sums: dict[str, Tensor]
) -> Clipped:
    clipped = 0
    for item in items:
        _, found = trainer.gradients_at(trainer.trainable, [item])
        own = {name: gradient.float() for name, gradient in found.items()}
        norm = torch.stack([gradient.norm() for gradient in own.values()]).norm()
        if not norm.isfinite():
            continue
        factor = float((clip / (norm + _SMALL)).clamp(max=1.0))
        clipped += factor < 1
        for name, gradient in own.items():
            sums[name].add_(gradient, alpha=factor)
    return Clipped(sums, clipped)


def _at_once(
    trainer: Trainer[Any],
    objective: LanguageObjective,
    items: Sequence[Any],
    clip: float,
    sums: dict[str, Tensor],
) -> Clipped:
    model, clipped = trainer.model, 0
    with without_warnings():
        hooked = load_opacus().GradSampleModule(
            model, batch_first=True, loss_reduction="sum", strict=False
        )
    try:
        for micro_batch in objective.plan(items):
            rows = micro_batch.layout.rows
            with trainer.precision.autocast():
                output = objective.loss(model, micro_batch, {"samples": 1.0, "tokens": 1.0})
            with without_warnings():  # PyTorch remarks on inputs without a gradient: tokens
                output.loss.backward()
            own = {n: _rows(n, p, rows) for n, p in trainer.trainable.items()}
            norms = torch.stack([g.flatten(1).norm(dim=1) for g in own.values()]).norm(dim=0)
            factors = (clip / (norms + _SMALL)).clamp(max=1.0).nan_to_num(0.0)  # [rows]
            clipped += int((factors < 1).sum())
            spoilt = ~norms.isfinite()
            for name, gradients in own.items():
                gradients[spoilt] = 0
                sums[name] += torch.einsum("n,n...->...", factors, gradients)
            for parameter in trainer.trainable.values():
                parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]
    finally:
        hooked.remove_hooks()
        for parameter in model.parameters():
            for mark in ("grad_sample", "_forward_counter"):
                if hasattr(parameter, mark):
                    delattr(parameter, mark)
        model.zero_grad(set_to_none=True)
    return Clipped(sums, clipped)


def _rows(name: str, parameter: Any, rows: int) -> Tensor:
    """One gradient for each row of the micro-batch, [rows, ...]."""
    found = getattr(parameter, "grad_sample", None)
    if found is None:
        return torch.zeros(rows, *parameter.shape, device=parameter.device)
    if isinstance(found, list):  # the module was used several times
        found = torch.stack(found).sum(0)
    if len(found) != rows:
        raise TrainingError(
            f"{name} sees {len(found)} rows where there are {rows} examples, so that gradients "
            f"of single examples cannot be told apart; adapt other modules"
        )
    return found.float()


def _batched(trainer: Trainer[Any], items: Sequence[Any]) -> LanguageObjective | None:
    """The objective with a row an example and a loss that adds up the rows; None: there is none."""
    objective = trainer.objective
    if not isinstance(objective, LanguageObjective) or type(objective.criterion) is not Causal:
        return None
    if trainer.options.gradient_checkpointing or any(len(item) != 1 for item in items):
        return None
    trained = {id(parameter) for parameter in trainer.trainable.values()}
    head = getattr(trainer.model, "get_output_embeddings", lambda: None)()
    for module in trainer.model.modules():
        owned = [p for p in module.parameters(recurse=False) if id(p) in trained]
        if owned and (not isinstance(module, nn.Linear) or module is head):
            return None
    rowwise = copy.copy(objective)
    rowwise.criterion, rowwise.packing = Causal("sample"), "none"
    return rowwise
