"""Sequences that are contrasted with a companion, in the engine's continuous batch.

The leader is what the client asked for, its companion the same answer after a lame prompt. Both are
scheduled like any other sequence, so that a leader's row of logits may be there steps before its
companion's, or after. The row is held until both have come; where the leader is certain, the
companion is not asked at all and catches up later, in one piece.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from anabranch.serving.adjustment import Row, adjust
from anabranch.serving.contrast.uncertainty import UncertaintyContrast
from anabranch.serving.sampling import finite, is_greedy
from anabranch.serving.sequence import Request, Sequence


@dataclass(frozen=True)
class Contrast:
    """How a request is contrasted: with which prompt, when and how much.

    Without ``lazy`` the companion is computed in every step, which costs more and changes nothing.
    """

    prompt: tuple[int, ...]
    settings: UncertaintyContrast = field(default_factory=UncertaintyContrast)
    lazy: bool = True


def companion_of(leader: Sequence) -> Sequence:
    """A sequence that takes the leader's tokens behind its own prompt, and is never sampled."""
    request, contrast = leader.request, leader.request.contrast
    assert contrast is not None
    lame = Request(request.id, contrast.prompt, request.sampling, adapter=request.adapter)
    companion = Sequence(lame, leader.index, list(contrast.prompt), leader.max_tokens)
    leader.partner, companion.partner, companion.follows = companion, leader, True
    return companion


class Pairs:
    """Rows that wait for their partners'."""

    def __init__(self) -> None:
        self._held: dict[Sequence, Tensor] = {}
        self._answers: dict[Sequence, Tensor] = {}

    def hold(self, sequence: Sequence, row: Tensor) -> None:
        """A leader or a companion was computed to its end: its logits ``[vocabulary]``."""
        if sequence.follows:
            assert sequence.partner is not None
            self._answers[sequence.partner] = row
        else:
            self._held[sequence] = row

    def forget(self, leader: Sequence) -> None:
        """It has finished."""
        self._held.pop(leader, None)
        self._answers.pop(leader, None)

    def resolve(self) -> list[tuple[Sequence, Tensor, Tensor | None]]:
        """Leaders that can choose now, their own logits, and what they draw from instead.

        The companions of those that cannot are given the tokens that they lack.
        """
        ready: list[tuple[Sequence, Tensor, Tensor | None]] = []
        for leader, logits in list(self._held.items()):
            mixed, waits = self._mixed(leader, logits)
            if not waits:
                ready.append((leader, logits, mixed))
                self.forget(leader)
        return ready

    def _mixed(self, leader: Sequence, logits: Tensor) -> tuple[Tensor | None, bool]:
        companion, contrast = leader.partner, leader.request.contrast
        assert companion is not None and contrast is not None
        rows = [Row(leader)]
        adjusted = adjust(logits[None], rows)
        if not finite(logits[None], adjusted)[0]:
            return None, False  # it fails when it is drawn from
        sampling = leader.request.sampling
        temperature = 1.0 if is_greedy(sampling) else sampling.temperature
        standard = (adjusted / temperature).softmax(dim=-1)
        certain = not bool(contrast.settings.uncertain(standard)[0])
        if certain and contrast.lazy:
            return None, False
        answer = self._answers.get(leader)
        if answer is None:
            follow(leader)
            return None, True
        if certain:
            return None, False
        if not bool(answer.float().amax().isfinite()):
            return torch.full_like(adjusted[0], float("nan")), False
        lame = (answer[None].float() / temperature).softmax(dim=-1)
        # What is drawn from is divided by the temperature again.
        return contrast.settings.mix(standard, lame)[0] * temperature, False


def follow(leader: Sequence) -> None:
    """Give a companion the tokens that its leader has chosen since."""
    companion = leader.partner
    assert companion is not None
    chosen = leader.tokens[leader.prompt_length :]
    companion.tokens += chosen[companion.num_generated :]
