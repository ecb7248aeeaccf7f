"""A model that answers what it was told to, and records what it was asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from anabranch.errors import InvalidConstraint
from anabranch.models.constraint import OutputConstraint
from anabranch.models.protocol import Generation, Message, SamplingParameters
from anabranch.models.tools import Tool

from .conftest import EchoGeneration, EchoModel

Refusal = Callable[[OutputConstraint | None], InvalidConstraint | None]


class ScriptedModel(EchoModel):
    """Answers ``text``, in deltas of ``size`` characters. ``refusal`` judges constraints."""

    def __init__(self, text: str = "", size: int = 3, refusal: Refusal | None = None) -> None:
        super().__init__()
        self.text = text
        self.size = size
        self.refusal = refusal
        self.tools: Sequence[Tool] = ()
        self.opening = ""
        self.tried: list[OutputConstraint | None] = []

    @property
    def constraint(self) -> OutputConstraint | None:
        """That of the last request."""
        return self.tried[-1]

    async def chat(
        self,
        messages: Sequence[Message],
        sampling: SamplingParameters,
        *,
        tools: Sequence[Tool] = (),
        opening: str = "",
    ) -> Generation:
        self.messages, self.tools, self.opening = list(messages), tools, opening
        return self._answer(sampling)

    async def complete(
        self, prompt: str | Sequence[int], sampling: SamplingParameters
    ) -> Generation:
        return self._answer(sampling)

    def _answer(self, sampling: SamplingParameters) -> EchoGeneration:
        self.sampling = sampling
        self.tried.append(sampling.constraint)
        if self.refusal is not None:
            error = self.refusal(sampling.constraint)
            if error is not None:
                raise error
        pieces = [self.text[i : i + self.size] for i in range(0, len(self.text), self.size)]
        generation = EchoGeneration(self, pieces or [""], 5, sampling)
        self.generations.append(generation)
        return generation
