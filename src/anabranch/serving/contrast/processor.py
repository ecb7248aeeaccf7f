"""Selective contrast for ``transformers``' own ``generate``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from anabranch.errors import InvalidRequest, RequestTooLong
from anabranch.serving.contrast.companion import Companion
from anabranch.serving.contrast.uncertainty import UncertaintyContrast

log = logging.getLogger("anabranch.serving")


class ContrastProcessor(LogitsProcessor):
    """Contrasts each row with a companion that starts from its lame prompt, where it is unsure.

    ``prompts`` and ``lame`` are token ids without padding, one entry a prompt; None in ``lame``
    switches contrast off for a row, and so does a lame prompt that equals the prompt (with a
    warning). ``generate`` gets the prompts padded on the left, greedy or sampled, with any
    ``num_return_sequences``, but without beams. ``temperature`` belongs here, because the laws are
    mixed after it: leave ``generate``'s own at 1. One processor serves one ``generate``.

    ``lazy`` leaves companions behind at confident steps; the tokens are the same. Every row has a
    cache of its own, since rows lag by different numbers of tokens: the companions of a batch are
    computed one after the other.

    Raises :class:`RequestTooLong` if a companion could outgrow the model's context, and
    :class:`InvalidRequest` for inputs that do not fit, both before a token is generated; while
    generating :class:`anabranch.errors.RequestFailed` for rows that are not finite.

    Example::

        processor = ContrastProcessor(
            model, UncertaintyContrast(), prompts, lame, max_new_tokens=128, temperature=0.8
        )
        model.generate(
            **batch, max_new_tokens=128, do_sample=True, temperature=1.0, top_p=0.95,
            logits_processor=[processor],
        )
    """

    def __init__(
        self,
        model: Any,
        contrast: UncertaintyContrast,
        prompts: Sequence[Sequence[int]],
        lame: Sequence[Sequence[int] | None],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        lazy: bool = True,
    ) -> None:
        if len(prompts) != len(lame):
            raise InvalidRequest(
                "contrast.lame_prompt",
                f"one for each of the {len(prompts)} prompts is needed (or None), not {len(lame)}",
            )
        if not temperature > 0:
            raise InvalidRequest(
                "contrast.temperature", f"must be above 0, not {temperature}; 1 for greedy"
            )
        self._model = model
        self._contrast = contrast
        self._prompts = [list(prompt) for prompt in prompts]
        self._lame = [
            _usable(index, prompt, other)
            for index, (prompt, other) in enumerate(zip(self._prompts, lame, strict=True))
        ]
        self._temperature = temperature
        self._lazy = lazy
        self._companions: list[Companion | None] | None = None
        self._seen: Tensor | None = None
        self.steps = 0
        """Rows that were looked at: one a sequence and token."""
        self.contrasted = 0
        """Of these, the ones that were unsure and mixed."""
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        longest = max((len(tokens) for tokens in self._lame if tokens is not None), default=0)
        if context is not None and longest + max_new_tokens > context:
            raise RequestTooLong(
                "contrast.lame_prompt",
                f"{longest} tokens and {max_new_tokens} new ones exceed the model's context of "
                f"{context}",
            )

    @property
    def forwards(self) -> int:
        """Forward passes of companions so far; eagerly one a step and row."""
        return sum(companion.forwards for companion in self._active())

    @property
    def computed_tokens(self) -> int:
        """Tokens that companions computed so far, prompts included."""
        return sum(companion.computed for companion in self._active())

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``input_ids [rows, tokens]``, ``scores [rows, V]``, constraints applied; the same shape.

        Confident rows are only divided by the temperature.
        """
        companions = self._follow(input_ids)
        scaled = scores.float() / self._temperature
        laws = scaled.softmax(dim=-1)
        unsure = self._contrast.uncertain(laws).tolist()
        self.steps += len(unsure)
        if not self._lazy:
            for companion in self._active():
                companion.logits()
        lame = {row: c.logits() for row, c in enumerate(companions) if c and unsure[row]}
        if lame:
            rows = list(lame)
            others = torch.stack(list(lame.values())).to(laws.device) / self._temperature
            scaled[rows] = self._contrast.mix(laws[rows], others.softmax(dim=-1))
            self.contrasted += len(rows)
        return scaled

    def _active(self) -> list[Companion]:
        return [companion for companion in self._companions or () if companion]

    def _follow(self, input_ids: Tensor) -> list[Companion | None]:
        """The rows' companions, given the token that each row chose since the last call."""
        if self._companions is None or self._seen is None:
            self._companions = self._start(input_ids)
        else:
            if input_ids.shape != (self._seen.shape[0], self._seen.shape[1] + 1) or not torch.equal(
                input_ids[:, :-1], self._seen
            ):
                raise InvalidRequest(
                    "contrast",
                    "the rows are not those of the last step with one more token each: beam search "
                    "reorders them and cannot be used; make a new processor for every generate()",
                )
            for companion, token in zip(self._companions, input_ids[:, -1].tolist(), strict=True):
                if companion:
                    companion.append(token)
        self._seen = input_ids.clone()
        return self._companions

    def _start(self, input_ids: Tensor) -> list[Companion | None]:
        rows = input_ids.shape[0]
        copies, rest = divmod(rows, max(len(self._prompts), 1))
        if rest or not copies:
            raise InvalidRequest(
                "contrast",
                f"{rows} rows are generated, but {len(self._prompts)} prompts were given",
            )
        companions: list[Companion | None] = []
        for row, tokens in enumerate(input_ids.tolist()):
            prompt, lame = self._prompts[row // copies], self._lame[row // copies]
            if len(prompt) > len(tokens) or tokens[len(tokens) - len(prompt) :] != prompt:
                raise InvalidRequest(
                    "contrast",
                    f"row {row} does not end with the tokens of prompt {row // copies}; "
                    "pad on the left, and give prompts in the order of the rows",
                )
            companions.append(None if lame is None else Companion(self._model, lame))
        return companions


def _usable(index: int, prompt: list[int], lame: Sequence[int] | None) -> list[int] | None:
    if lame is None:
        return None
    if not len(lame):
        raise InvalidRequest("contrast.lame_prompt", f"that of prompt {index} has no token")
    if list(lame) == prompt:
        log.warning(
            "contrast is off for prompt %d: its lame prompt equals the prompt, so that the "
            "difference would only weaken what is likely",
            index,
        )
        return None
    return list(lame)
