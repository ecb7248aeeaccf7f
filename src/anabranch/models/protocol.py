"""What every model is: something with a name and a card that turns messages into an answer.

The HTTP server, routers, cascades and agents only know this protocol. A model that runs on the
serving engine (:class:`anabranch.serving.EngineModel`), a sentence encoder, and later a cascade
or a program of calls are all the same to them.
"""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from anabranch.errors import InvalidRequest, ModelNotFound
from anabranch.models.card import ModelCard
from anabranch.models.constraint import OutputConstraint
from anabranch.models.tools import Tool

FinishReason = Literal["stop", "length", "abort", "error"]
"""``stop``: end token, stop string or id. ``length``: max_tokens or the context is used up.
``abort``: the client went away or cancelled. ``error``: this request failed, see ``error``."""


@dataclass(frozen=True)
class ContrastParameters:
    """Subtract what the model would say by habit, where it is unsure (USCD, Wang et al. 2024).

    ``prompt`` is asked beside the prompt proper: the same without its examples, which is what None
    makes of it. Other fields are those of
    :class:`~anabranch.serving.contrast.UncertaintyContrast`; None is its default.
    """

    prompt: str | None = None
    threshold: float | None = None
    weight: float | None = None
    filter_ratio: float | None = None


@dataclass(frozen=True)
class SamplingParameters:
    """How tokens are chosen from a model's distribution. Validated on construction.

    ``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 keep the whole vocabulary.
    ``logprobs`` None returns none, k >= 0 returns the chosen token's and the k most likely ones'.
    ``max_tokens`` None means: as many as fit in the context. With a ``seed`` the same request
    gives the same tokens whatever else is in the batch. ``stop`` strings are not returned. With a
    ``constraint`` only tokens are drawn that keep the answer in its language. ``prediction`` is
    text that the answer probably repeats: a hint for speed that never changes the answer.
    ``contrast`` makes each token depend on a second prompt.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    n: int = 1
    constraint: OutputConstraint | None = None
    prediction: str | None = None
    contrast: ContrastParameters | None = None

    def __post_init__(self) -> None:
        self._check("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1")
        self._range("temperature", 0.0, 2.0)
        self._range("top_p", 0.0, 1.0, open_low=True)
        self._check("top_k", self.top_k >= 0, "0 (off) or more")
        self._range("min_p", 0.0, 1.0)
        self._range("repetition_penalty", 0.0, 10.0, open_low=True)
        self._range("frequency_penalty", -2.0, 2.0)
        self._range("presence_penalty", -2.0, 2.0)
        self._check("n", 1 <= self.n <= 128, "between 1 and 128")
        self._check("stop", len(self.stop) <= 16, "at most 16 strings")
        self._check("stop", all(self.stop), "non-empty strings")
        self._check("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "0 to 20")
        self._check(
            "logit_bias",
            all(math.isfinite(v) and -100 <= v <= 100 for v in self.logit_bias.values()),
            "finite numbers between -100 and 100",
        )

    def _range(self, name: str, low: float, high: float, open_low: bool = False) -> None:
        value = getattr(self, name)
        inside = math.isfinite(value) and (low < value if open_low else low <= value)
        lower = f"above {low:g}" if open_low else f"at least {low:g}"
        self._check(name, inside and value <= high, f"{lower} and at most {high:g}")

    def _check(self, name: str, condition: bool, wanted: str) -> None:
        if not condition:
            raise InvalidRequest(name, f"must be {wanted}, not {getattr(self, name)!r}")


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of one token under the model's own distribution (temperature 1)."""

    token_id: int
    token: str
    bytes: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class OutputDelta:
    """What one step added to one choice of a request.

    ``text`` never splits a character; it may be empty while one is incomplete or while a stop
    string may be under way. The last delta of a choice has a ``finish_reason``.
    """

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None


class Generation(Protocol):
    """A request under way: iterate over it for deltas, close it to abort."""

    id: str
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens whose keys and values were reused; known once the first delta arrived."""

    def __aiter__(self) -> AsyncIterator[OutputDelta]: ...

    async def aclose(self) -> None:
        """Stop generating and free the request's memory. Harmless when it has finished."""


@dataclass(frozen=True)
class Embedding:
    """One text's vector and the number of tokens it was computed from."""

    vector: list[float]
    tokens: int


@dataclass(frozen=True)
class ModelStatistics:
    """Load of a model now, and totals since it started. ``cache_usage`` is a fraction of 1."""

    waiting: int = 0
    running: int = 0
    cache_usage: float = 0.0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    """Tokens that were verified instead of computed one after the other."""
    accepted_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    finetune_tokens: int = 0
    """Tokens that fine-tuning jobs trained through, forward and backward."""
    finetune_jobs: int = 0
    """Fine-tuning jobs that the engine holds and that are not paused."""
    slo_steps: int = 0
    """Steps with a token of a running stream, for which there is a latency target."""
    slo_met: int = 0
    """Those of them that kept the target."""


Message = Mapping[str, Any]
"""``{"role": "user", "content": "..."}``; content is text (parts are joined by the API).

An assistant's turn may have ``tool_calls``: ``{"id", "type": "function", "function": {"name",
"arguments"}}`` with the arguments as an object, or as text if the model wrote no object. Turns of
role ``tool`` behind it have ``tool_call_id`` and the function's ``name``.
"""


class Model(ABC):
    """Anything that answers. Methods that a model does not offer raise :class:`InvalidRequest`."""

    name: str
    card: ModelCard
    source: str | None = None
    """What :func:`anabranch.models.load` knows it by; None if it cannot be loaded again."""
    adapter_folder: Path | None = None
    """Of a variant: where its adapter lies, in PEFT's format."""
    time_between_tokens: float | None = None
    """The latency target of its streams, in seconds."""

    async def start(self) -> None:
        """Begin to serve. Called once, before the first request."""
        return

    async def close(self) -> None:
        """Abort what runs and release memory and threads."""
        return

    def statistics(self) -> ModelStatistics:
        """Load and totals, for metrics."""
        return ModelStatistics()

    async def chat(
        self,
        messages: Sequence[Message],
        sampling: SamplingParameters,
        *,
        tools: Sequence[Tool] = (),
        opening: str = "",
    ) -> Generation:
        """Answer a conversation. Raises before the first token if it cannot be served.

        The model is told that it may call ``tools``; calls are text of the answer, written as
        :mod:`anabranch.models.tools` describes. ``opening`` is how the answer begins: it belongs
        to the prompt, and a constraint begins behind it.
        """
        raise self._cannot("chat")

    async def complete(
        self, prompt: str | Sequence[int], sampling: SamplingParameters
    ) -> Generation:
        """Continue a text or a list of token ids."""
        raise self._cannot("complete text")

    async def embed(self, texts: Sequence[str | Sequence[int]]) -> list[Embedding]:
        """One vector of unit length for each text, in order."""
        raise self._cannot("compute embeddings")

    def variants(self) -> list[Model]:
        """This model with each of its adapters, under the names ``model:adapter``."""
        return []

    def variant(self, adapter: str) -> Model:
        """This model with one adapter; :class:`ModelNotFound` if it has none so named."""
        raise ModelNotFound(f"model: {self.name!r} has no adapter {adapter[:100]!r}")

    async def add_adapter(self, name: str, folder: Path) -> Model:
        """Load an adapter, or a new version of one, from a PEFT folder; returns the variant.

        Raises :class:`AdapterError` if it does not fit; what was served before is still served.
        """
        raise self._cannot("take adapters")

    async def remove_adapter(self, name: str) -> None:
        """Forget an adapter; requests that run on it finish."""
        raise self._cannot("take adapters")

    def _cannot(self, what: str) -> InvalidRequest:
        return InvalidRequest("model", f"{self.name!r} cannot {what}")
