"""The objective of language models: packed sequences in, scores of the trained tokens out.

Everything between a loss and a model is here: which tokens share a forward pass, that they do not
see each other, and that the output head only computes the rows that a loss asks for. Losses
(:mod:`anabranch.training.losses`) never see the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anabranch.training import forward, sequences
from anabranch.training.errors import DataError, TrainingError
from anabranch.training.example import Item
from anabranch.training.filtering import Overlong, RowPolicy, Untrained, filter_rows
from anabranch.training.losses.base import Loss, TokenScores
from anabranch.training.objective import LossOutput, Objective, Prepared
from anabranch.training.options import TrainOptions
from anabranch.training.packing import FORWARD_COST, Layout, Packing, plan_layouts


@dataclass(frozen=True)
class LanguageBatch:
    """The items of one micro-batch and where their tokens go."""

    items: Sequence[Item]
    """Of the whole step; :attr:`layout` says which of them are here."""
    layout: Layout

    @property
    def own_items(self) -> list[Item]:
        """The items of this micro-batch, as losses index them."""
        return [self.items[i] for i in self.layout.items]


class LanguageObjective(Objective[Item, LanguageBatch]):
    """Trains any Hugging Face causal language model, bare or with a PEFT adapter.

    ``micro_batch_tokens`` bounds the cells of one forward pass. ``packing`` ``bfd`` puts several
    sequences in a row under a block mask, ``none`` pads. ``pad_id`` fills empty cells; any token
    will do, it is never attended to. ``reference`` is the frozen model that losses with
    ``needs_reference`` compare with; without it the adapter is switched off instead.

    ``forward_cost`` is what one more forward pass costs, in tokens (None: by the model's device);
    it decides between packing and padding.

    ``max_length``, ``overlong`` and ``untrained``: see :class:`TrainOptions`.
    """

    def __init__(
        self,
        loss: Loss,
        *,
        micro_batch_tokens: int = 4096,
        packing: Packing = "bfd",
        pad_id: int = 0,
        max_length: int | None = None,
        overlong: Overlong = "error",
        untrained: Untrained = "error",
        reference: nn.Module | None = None,
        forward_cost: float | None = None,
    ) -> None:
        self.criterion = loss
        self.micro_batch_tokens = micro_batch_tokens
        self.packing: Packing = packing
        self.pad_id = pad_id
        self.rows = RowPolicy(max_length, overlong, untrained, micro_batch_tokens)
        self.reference = reference
        self._route: forward.Route | None = None
        self.forward_cost = forward_cost

    @classmethod
    def from_options(
        cls,
        loss: Loss,
        options: TrainOptions,
        *,
        pad_id: int = 0,
        reference: nn.Module | None = None,
    ) -> LanguageObjective:
        """With the sizes and policies of a run's options."""
        return cls(
            loss,
            micro_batch_tokens=options.micro_batch_tokens,
            packing=options.packing,
            pad_id=pad_id,
            max_length=options.max_length,
            overlong=options.overlong,
            untrained=options.untrained,
            reference=reference,
        )

    def prepare(self, items: Sequence[Item]) -> Prepared[Item]:
        """Apply the policies for overlong rows and rows without trained tokens."""
        return filter_rows(items, self.rows)

    def check(self, model: nn.Module) -> None:
        """Find body and head of the model, and prove on a few tokens that packing does not leak."""
        needs_adapter = self.criterion.needs_reference and self.reference is None
        if needs_adapter and not hasattr(model, "disable_adapter"):
            raise TrainingError(
                f"the loss {self.criterion.name!r} compares with a reference model: train an "
                f"adapter (its base is the reference), or pass a frozen copy as reference"
            )
        if self.forward_cost is None:
            self.forward_cost = forward.start_cost(model)
        self._route = forward.choose_route(model, self.packing)

    def plan(self, items: Sequence[Item]) -> list[LanguageBatch]:
        """Micro-batches of at most ``micro_batch_tokens`` cells.

        Raises :class:`DataError` for an example without a token to train on.
        """
        for item in items:
            for example in item:
                if not any(example.trained):
                    raise DataError(
                        f"{example.source or 'an example'} has no token to train on; leave it out "
                        f"(LanguageObjective.prepare does, with untrained='drop')"
                    )
        lengths = [[len(example) for example in item] for item in items]
        start = FORWARD_COST["cpu"] if self.forward_cost is None else self.forward_cost
        layouts = plan_layouts(lengths, self.micro_batch_tokens, self.packing, start)
        return [LanguageBatch(items, layout) for layout in layouts]

    def denominators(self, items: Sequence[Item]) -> Mapping[str, float]:
        """The loss's counts."""
        return self.criterion.denominators(items)

    def loss(
        self, model: nn.Module, micro_batch: LanguageBatch, denominators: Mapping[str, float]
    ) -> LossOutput:
        """One forward pass, the head on the trained rows, and the loss of their scores."""
        return self.criterion(self._scores(model, micro_batch), denominators)

    @property
    def two_pass(self) -> bool:  # type: ignore[override]
        """Whether the loss needs a pass of its own before a step."""
        return self.criterion.two_pass

    def first_pass(self, model: nn.Module, micro_batch: LanguageBatch) -> Mapping[str, float]:
        """The loss's sums over the scores of one micro-batch."""
        return self.criterion.first_pass(self._scores(model, micro_batch))

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The loss's figures."""
        return self.criterion.metrics(sums)

    def tokens(self, items: Sequence[Item]) -> int:
        """Tokens of all examples, trained or not; padding does not count."""
        return sum(len(example) for item in items for example in item)

    def settings(self) -> dict[str, Any]:
        """The loss and its plain options."""
        plain = {
            name: value
            for name, value in vars(self.criterion).items()
            if not name.startswith("_") and isinstance(value, str | int | float | bool | None)
        }
        return {**super().settings(), "loss": {"name": self.criterion.name, **plain}}

    def fingerprint(self, items: Sequence[Item]) -> str:
        """Digest of all tokens and marks."""
        digest = hashlib.blake2b(digest_size=16)
        for item in items:
            for example in item:
                digest.update(np.asarray([len(item), len(example)], dtype=np.int64).tobytes())
                digest.update(np.asarray(example.tokens, dtype=np.int64).tobytes())
                digest.update(np.asarray(example.trained, dtype=bool).tobytes())
        return f"{len(items)} items, {digest.hexdigest()}"

    def state_dict(self) -> dict[str, Any]:
        """The loss's state."""
        return self.criterion.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the loss's state."""
        self.criterion.load_state_dict(state)

    def _scores(self, model: nn.Module, micro_batch: LanguageBatch) -> TokenScores:
        device = next(model.parameters()).device
        batch = sequences.build(micro_batch.items, micro_batch.layout, self.pad_id, device)
        reference = self._reference_nll(model, batch) if self.criterion.needs_reference else None
        return TokenScores(
            nll=self._nll(model, batch),
            item=batch.item,
            example=batch.example,
            items=micro_batch.own_items,
            reference=reference,
        )

    def _nll(self, model: nn.Module, batch: sequences.SequenceBatch) -> Tensor:
        """Negative log-likelihood of the trained tokens ``[trained]``."""
        if self._route is None:
            self._route = forward.choose_route(model, self.packing)
        return forward.nll(model, batch, self._route)

    @torch.no_grad()
    def _reference_nll(self, model: nn.Module, batch: sequences.SequenceBatch) -> Tensor:
        if self.reference is not None:
            with forward.evaluating(self.reference):
                return self._nll(self.reference, batch)
        with forward.evaluating(model), forward.base_only(model):
            return self._nll(model, batch)
