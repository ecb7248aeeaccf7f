"""What the server answers, for the OpenAPI document.

The routes build plain dictionaries (validating again what this server itself wrote would cost time
at every token); the tests check the dictionaries against these classes.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """What was wrong, where, and a code for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every answer with a status of 400 or more."""

    error: ErrorDetail


class PromptTokensDetails(BaseModel):
    """Prompt tokens whose keys and values were reused from earlier requests."""

    cached_tokens: int


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(BaseModel):
    """One of the most likely tokens. Minus infinity is written as -9999."""

    token: str
    bytes: list[int]
    logprob: float


class ChatTokenLogprob(TopLogprob):
    """The chosen token and the most likely ones."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities, token by token."""

    content: list[ChatTokenLogprob]
    refusal: None


class AnswerFunction(BaseModel):
    """The function to call; its arguments are JSON text."""

    name: str
    arguments: str


class AnswerCall(BaseModel):
    """A call that the client is asked to make."""

    id: str
    type: Literal["function"]
    function: AnswerFunction


class AnswerMessage(BaseModel):
    """The assistant's turn. ``content`` is null in an answer of nothing but calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[AnswerCall] | None = None


class ChatChoice(BaseModel):
    """One of ``n`` answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    """The answer to ``POST /v1/chat/completions`` without ``stream``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    """Log-probabilities; ``text_offset`` counts characters from the start of ``text``."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One of ``n`` continuations of one of the prompts."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """The answer to ``POST /v1/completions`` without ``stream``."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class EmbeddingUsage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingItem(BaseModel):
    """One input's vector: numbers, or the base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(BaseModel):
    """The answer to ``POST /v1/embeddings``."""

    object: Literal["list"]
    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingUsage


class ModelItem(BaseModel):
    """One served model. ``card`` is an extension: size, limits, licence and origin."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    card: dict[str, Any]


class DeletedModel(BaseModel):
    """An adapter that is no longer served."""

    id: str
    object: Literal["model"]
    deleted: bool


class ModelList(BaseModel):
    """The answer to ``GET /v1/models``."""

    object: Literal["list"]
    data: list[ModelItem]


class Health(BaseModel):
    """``draining``: running requests finish, new ones are refused."""

    status: Literal["ok", "draining"]
