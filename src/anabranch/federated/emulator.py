"""A smaller stand-in for the middle of a language model, so that its ends can be tuned elsewhere.

    full      0 1 | 2 3 4 5 | 6 7        2 and 6: where the middle begins and where it has ended
    emulator  0 1 |  2   5  | 6 7        half of the middle dropped

The ends are trained, the middle is frozen. What was trained is put back by layer number: layer 4 of
the emulator above is layer 6 of the full model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.errors import ConfigurationError
from anabranch.federated.errors import FederationError
from anabranch.training.language import LanguageBatch, LanguageObjective
from anabranch.training.objective import LossOutput, Objective, Prepared
from anabranch.training.options import TrainOptions
from anabranch.training.trainer import Trainer


class SplitPlanError(ConfigurationError):
    """A model cannot be split into ends and middle as asked."""


@dataclass(frozen=True)
class SplitPlan:
    """Which of ``layers`` layers the emulator has.

    Layers before ``left`` and from ``right`` on are trained; ``kept`` of those between stay.
    """

    layers: int
    left: int
    right: int
    kept: tuple[int, ...]

    @classmethod
    def of(cls, layers: int, left: int, right: int, drop: float) -> SplitPlan:
        """A share ``drop`` of the middle left out, evenly (FederatedScope-LLM's drop-layer).

        At least one layer stays at both ends. Raises :class:`SplitPlanError`.
        """
        left, right = max(1, left), min(layers - 1, right)
        if not left < right:
            raise SplitPlanError(
                f"the middle would be layers {left} to {right - 1} of {layers}, which is none; "
                f"choose 1 <= left < right <= {layers - 1}"
            )
        if not 0 <= drop < 1:
            raise SplitPlanError(f"drop is a share from 0 to below 1, not {drop}")
        middle = right - left
        count = max(1, round(middle * (1 - drop)))
        if count == 1:
            return cls(layers, left, right, (left + middle // 2,))
        kept = tuple(left + int(i * (middle - 1) / (count - 1)) for i in range(count))
        return cls(layers, left, right, kept)

    @property
    def order(self) -> tuple[int, ...]:
        """The full model's number of each layer of the emulator."""
        return (*range(self.left), *self.kept, *range(self.right, self.layers))

    @property
    def emulated(self) -> range:
        """Positions of the frozen middle in the emulator."""
        return range(self.left, self.left + len(self.kept))


def make_emulator(model: Any, left: int, right: int, drop: float = 0.5) -> tuple[Any, SplitPlan]:
    """A copy of a transformers language model with a shorter middle, its ends trainable only.

    The given model is left alone. Raises :class:`SplitPlanError`.
    """
    path, layers = decoder_layers(model)
    plan = SplitPlan.of(len(layers), left, right, drop)
    emulator = copy.deepcopy(model)
    parent = emulator.get_submodule(path.rpartition(".")[0])
    kept = nn.ModuleList([copy.deepcopy(layers[index]) for index in plan.order])
    setattr(parent, path.rpartition(".")[2], kept)
    for position, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = position  # type: ignore[assignment]
    config = emulator.config
    types = getattr(config, "layer_types", None)
    config.num_hidden_layers = len(kept)
    if types is not None:
        config.layer_types = [types[index] for index in plan.order]
    train_ends(emulator, plan)
    return emulator, plan


def train_ends(emulator: Any, plan: SplitPlan) -> None:
    """Only the layers at the ends require gradients."""
    emulator.requires_grad_(False)
    for position, layer in enumerate(decoder_layers(emulator)[1]):
        layer.requires_grad_(position not in plan.emulated)


def plug_in(model: Any, tensors: Mapping[str, Tensor], plan: SplitPlan) -> dict[str, Tensor]:
    """What was trained in the emulator, under the full model's names, for ``load_shared``.

    Raises :class:`FederationError` naming a tensor that is of the middle, or fits nowhere.
    """
    path, _ = decoder_layers(model)
    parameters = dict(model.named_parameters())
    found = {}
    for name, tensor in tensors.items():
        if not name.startswith(f"{path}."):
            raise FederationError(f"{name} is of no layer; only layers at the ends are plugged in")
        position, _, rest = name.removeprefix(f"{path}.").partition(".")
        if int(position) in plan.emulated:
            raise FederationError(f"{name} is of the emulated middle, which has no place")
        place = f"{path}.{plan.order[int(position)]}.{rest}"
        if place not in parameters or parameters[place].shape != tensor.shape:
            there = list(parameters[place].shape) if place in parameters else "absent"
            raise FederationError(f"{name} is {list(tensor.shape)}, and {place} is {there}")
        found[place] = tensor
    return found


def align(
    model: Any,
    emulator: Any,
    plan: SplitPlan,
    items: Sequence[Any],
    objective: LanguageObjective,
    options: TrainOptions,
) -> float:
    """Train the emulator's middle to do what the full model's does; the last step's loss.

    ``0.9 mean(((h - h') / rms(h))^2) + 0.1`` times the objective's loss, where h and h' are what
    leaves the middle (FederatedScope-LLM, section 4.2). Afterwards the ends are trainable again.
    """
    emulator.requires_grad_(False)
    for position in plan.emulated:
        decoder_layers(emulator)[1][position].requires_grad_(True)
    try:
        trainer: Trainer[Any] = Trainer(
            emulator, _Alignment(model, plan, objective), options, items
        )
        loss = 0.0
        for _ in range(trainer.total_steps):
            loss = trainer.step(trainer.next_items()).loss
    finally:
        train_ends(emulator, plan)
    emulator.eval()
    return loss


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """Path and list of a transformers model's layers. Raises :class:`SplitPlanError`."""
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return path, module
    raise SplitPlanError(f"{type(model).__name__} has no list of {count} layers to split")


@contextmanager
def _leaving(model: Any, position: int) -> Iterator[list[Tensor]]:
    """What leaves a layer, [rows, columns, width], is in the list after a pass."""
    seen: list[Tensor] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = decoder_layers(model)[1][position].register_forward_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


class _Alignment(Objective[Any, LanguageBatch]):
    """The objective of :func:`align`; the model that it trains is the emulator."""

    def __init__(self, full: Any, plan: SplitPlan, language: LanguageObjective) -> None:
        self.full, self.split, self.language = full, plan, language

    def prepare(self, items: Sequence[Any]) -> Prepared[Any]:
        return self.language.prepare(items)

    def check(self, model: nn.Module) -> None:
        self.language.check(model)

    def plan(self, items: Sequence[Any]) -> list[LanguageBatch]:
        return self.language.plan(items)

    def denominators(self, items: Sequence[Any]) -> Mapping[str, float]:
        return {**self.language.denominators(items), "items": len(items)}

    def loss(
        self, model: nn.Module, micro_batch: LanguageBatch, denominators: Mapping[str, float]
    ) -> LossOutput:
        with torch.no_grad(), _leaving(self.full, self.split.right - 1) as wanted:
            self.language.loss(self.full, micro_batch, denominators)
        with _leaving(model, self.split.emulated[-1]) as got:
            output = self.language.loss(model, micro_batch, denominators)
        (h,), (emulated,) = wanted, got
        apart = ((h - emulated) / h.square().mean().sqrt()).square().mean()
        share = len(micro_batch.own_items) / denominators["items"]
        return LossOutput(0.9 * share * apart + 0.1 * output.loss)
