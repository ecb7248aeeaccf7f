"""What clients may send: OpenAI's requests, strictly.

Three kinds of field:

* fields with an effect here, with their limits;
* fields of OpenAI's whose effect is nil here (``user``, ``metadata``, ...): accepted, and their
  description says so;
* fields of OpenAI's whose effect would be lost without a word (``tools``, ``suffix``, ...): only
  ``null`` is accepted (:data:`Unsupported`).

Any other field is refused: a misspelt option must not be ignored. Types are strict: ``"5"`` is not
a number and ``true`` is not 1.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Unsupported = Annotated[None, Field(description="Not supported here: only null is accepted.")]

Text = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
TokenIdText = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
Bias = Annotated[float, Field(ge=-100, le=100)]

MAX_PROMPTS = 256
MAX_EMBEDDING_INPUTS = 2048


class Strict(BaseModel):
    """Unknown fields are refused and nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    """Only with ``stream``."""

    include_usage: bool | None = Field(None, description="Send the token counts before [DONE].")
    include_obfuscation: Literal[False] | None = Field(
        None, description="Chunks are not padded: true is refused."
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

    user: str | None = Field(None, description="Accepted; no effect.")


class TextPart(Strict):
    """A piece of a message. Images, audio and files are refused."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """One turn. The fields of an assistant's earlier answer may be sent back as they came."""

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="developer is treated as system."
    )
    content: str | Annotated[list[TextPart], Field(min_length=1)] = Field(
        description="Text, or text parts, which are joined without a separator."
    )
    name: str | None = Field(None, description="Given to the chat template, if it reads names.")
    annotations: Annotated[list[Any], Field(max_length=0)] | None = Field(
        None, description="Accepted when empty."
    )
    refusal: Unsupported = None
    audio: Unsupported = None
    tool_calls: Unsupported = None
    tool_call_id: Unsupported = None
    function_call: Unsupported = None


class PlainText(Strict):
    """The only answer format."""

    type: Literal["text"]


class ChatCompletionRequest(Generate):
    """The body of ``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: int | None = Field(
        None, ge=1, le=2**31 - 1, description="The same as max_tokens; give one of them."
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20, description="Needs logprobs: true.")

    response_format: PlainText | None = Field(None, description="Only text.")
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    tool_choice: Literal["none", "auto"] | None = Field(None, description="There are no tools.")

    metadata: dict[str, str] | None = Field(None, description="Accepted; no effect.")
    store: bool | None = Field(None, description="Accepted; nothing is ever stored.")
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = Field(
        None, description="Accepted; there is one tier."
    )
    parallel_tool_calls: bool | None = Field(None, description="Accepted; there are no tools.")
    prediction: dict[str, Any] | None = Field(
        None, description="Accepted; a hint for speed that never changes the answer."
    )
    prompt_cache_key: str | None = Field(None, description="Accepted; prefixes are always shared.")
    prompt_cache_options: dict[str, Any] | None = Field(None, description="Accepted; no effect.")
    prompt_cache_retention: Literal["in_memory", "24h"] | None = Field(
        None, description="Accepted; no effect."
    )
    safety_identifier: str | None = Field(None, description="Accepted; no effect.")

    tools: Unsupported = None
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
