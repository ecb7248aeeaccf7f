"""What clients may send: OpenAI's requests, strictly.

Three kinds of field:

* fields with an effect here, with their limits;
* fields of OpenAI's whose effect is nil here (``user``, ``metadata``, ...): accepted, and their
  description says so;
* fields of OpenAI's whose effect would be lost without a word (``functions``, ``suffix``, ...):
  only ``null`` is accepted (:data:`Unsupported`).

Any other field is refused: a misspelt option must not be ignored. Types are strict: ``"5"`` is not
a number and ``true`` is not 1.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from anabranch.api.fields import Content, Strict, Text, TokenId, TokenIds, Unsupported
from anabranch.api.guidance import Constraint, ResponseFormat
from anabranch.api.messages import ChatMessage
from anabranch.api.tools.schemas import MAX_TOOLS, FunctionTool, ToolChoice

StopText = Annotated[str, Field(min_length=1, max_length=1000)]
TokenIdText = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
Bias = Annotated[float, Field(ge=-100, le=100)]

MAX_PROMPTS = 256
MAX_EMBEDDING_INPUTS = 2048


class StreamOptions(Strict):
    """Only with ``stream``."""

    include_usage: bool | None = Field(None, description="Send the token counts before [DONE].")
    include_obfuscation: Literal[False] | None = Field(
        None, description="Chunks are not padded: true is refused."
    )


class ContrastSettings(Strict):
    """Where the model is unsure, subtract what it would say without the prompt's examples."""

    prompt: Text | None = Field(
        None,
        description="What is asked without the examples: in chat instead of the last user message. "
        "If absent, examples are found and left out.",
    )
    threshold: float | None = Field(
        None, ge=0, description="Certainty below which to contrast: 0 never, above 1 always."
    )
    weight: float | None = Field(None, ge=-100, le=0, description="Of what is subtracted; -0.7.")
    filter_ratio: float | None = Field(
        None, ge=0, description="How much less likely than the mean token a token may be; 2/3."
    )


class Generate(Strict):
    """The fields that chat and text completion share."""

    model: str = Field(description="Exactly the name under which a model is served.")
    n: int | None = Field(None, ge=1, le=128, description="Choices for each prompt; 1 if absent.")
    stream: bool | None = Field(None, description="Server-sent events instead of one answer.")
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; 1 if absent.")
    top_p: float | None = Field(None, gt=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = Field(
        None, description="Up to 16 strings that end the answer; they are not returned."
    )
    logit_bias: dict[TokenIdText, Bias] | None = Field(
        None, description="Token id (as a string) -> what is added to its logit."
    )

    top_k: int | None = Field(None, ge=0, le=2**31 - 1, description="Extension: 0 is off.")
    min_p: float | None = Field(None, ge=0, le=1, description="Extension.")
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="Extension.")
    ignore_eos: bool | None = Field(None, description="Extension: generate past the end token.")
    stop_token_ids: list[TokenId] | None = Field(None, max_length=256, description="Extension.")
    contrast: ContrastSettings | None = Field(
        None, description="Extension: uncertainty-aware selective contrastive decoding. Not with n."
    )
    constraint: Constraint | None = Field(
        None, description="Extension: the answer is from this language. Not with ignore_eos."
    )

    user: str | None = Field(None, description="Accepted; no effect.")


class Prediction(Strict):
    """Text that the answer probably repeats, for example a file that is to be edited."""

    type: Literal["content"]
    content: Content


class ChatCompletionRequest(Generate):
    """The body of ``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: int | None = Field(
        None, ge=1, le=2**31 - 1, description="The same as max_tokens; give one of them."
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20, description="Needs logprobs: true.")

    response_format: ResponseFormat | None = Field(
        None, description="Not with constraint, ignore_eos or tools that may be called."
    )
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    tools: Annotated[list[FunctionTool], Field(min_length=1, max_length=MAX_TOOLS)] | None = Field(
        None, description="Functions that the model may call and the client runs."
    )
    tool_choice: ToolChoice | None = Field(None, description="auto if absent.")
    parallel_tool_calls: bool | None = Field(
        None, description="false: at most one call in an answer; true if absent."
    )
    prediction: Prediction | None = Field(
        None, description="A hint for speed that never changes the answer."
    )

    metadata: dict[str, str] | None = Field(None, description="Accepted; no effect.")
    store: bool | None = Field(None, description="Accepted; nothing is ever stored.")
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = Field(
        None, description="Accepted; there is one tier."
    )
    prompt_cache_key: str | None = Field(None, description="Accepted; prefixes are always shared.")
    prompt_cache_options: dict[str, Any] | None = Field(None, description="Accepted; no effect.")
    prompt_cache_retention: Literal["in_memory", "24h"] | None = Field(
        None, description="Accepted; no effect."
    )
    safety_identifier: str | None = Field(None, description="Accepted; no effect.")

    functions: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None
    moderation: Unsupported = None


class CompletionRequest(Generate):
    """The body of ``POST /v1/completions``."""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    ) = Field(description="Choice i*n + j is the j-th answer to prompt i.")
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="16 if absent.")
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = Field(
        None, description="Put the prompt before the answer. Not with logprobs or token ids."
    )
    best_of: int | None = Field(None, ge=1, le=128, description="Accepted when equal to n.")
    suffix: Unsupported = None


class EmbeddingRequest(Strict):
    """The body of ``POST /v1/embeddings``."""

    model: str = Field(description="Exactly the name under which a model is served.")
    input: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_EMBEDDING_INPUTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_EMBEDDING_INPUTS)]
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: little-endian float32."
    )
    dimensions: int | None = Field(
        None, ge=1, le=2**31 - 1, description="Accepted when it is the model's own size."
    )
    user: str | None = Field(None, description="Accepted; no effect.")


class MergeRequest(Strict):
    """An adapter to be put into a copy of its base."""

    model: str = Field(description="`base:adapter`, as it is served.")
    name: str = Field(min_length=1, max_length=100, description="What the new model is called.")


class AdapterRequest(Strict):
    """An adapter to be served as ``model:adapter``."""

    model: str = Field(description="The base model, by the name under which it is served.")
    adapter: str = Field(min_length=1, max_length=100, description="The name to serve it under.")
    source: str | None = Field(
        None,
        min_length=1,
        max_length=255,
        description="A folder's name in the server's folder of adapters; the same as `adapter` "
        "if absent.",
    )
