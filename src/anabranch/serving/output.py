"""From a sampled token to what the client sees: text, log-probabilities, the end."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from functools import lru_cache
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from anabranch.models.protocol import OutputDelta, TokenLogprob
from anabranch.serving.detokenizer import Detokenizer
from anabranch.serving.sampling import Sampled
from anabranch.serving.sequence import Request, Sequence


class OutputBuilder:
    """Builds deltas. Without a tokenizer they carry token ids only."""

    def __init__(self, tokenizer: Any, end_tokens: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._end_tokens = end_tokens
        self._name = TokenNames(tokenizer) if tokenizer is not None else None

    def detokenizer(self, request: Request) -> Detokenizer | None:
        """A fresh one for a choice of this request."""
        if self._tokenizer is None or request.pooling:
            return None
        return Detokenizer(self._tokenizer, request.prompt, request.sampling.stop)

    def token(self, sequence: Sequence, sampled: Sampled) -> OutputDelta:
        """The delta of a token just appended; sets the sequence's ``finish_reason``."""
        sampling = sequence.request.sampling
        ends = sampled.token in sampling.stop_token_ids or (
            sampled.token in self._end_tokens and not sampling.ignore_eos
        )
        text = self._text(sequence.detokenizer, sampled.token, ends)
        stopped = sequence.detokenizer is not None and sequence.detokenizer.stopped
        if ends or stopped:
            sequence.finish_reason = "stop"
        elif sequence.num_generated >= sequence.max_tokens:
            sequence.finish_reason = "length"
            text += self._rest(sequence.detokenizer)
            if sequence.detokenizer is not None and sequence.detokenizer.stopped:
                sequence.finish_reason = "stop"
        return OutputDelta(
            index=sequence.index,
            text=text,
            token_ids=(sampled.token,),
            logprobs=() if ends or sampled.logprob is None else (self._logprob(sampled),),
            finish_reason=sequence.finish_reason,
        )

    def _text(self, detokenizer: Detokenizer | None, token: int, ends: bool) -> str:
        if detokenizer is None:
            return ""
        return detokenizer.finish() if ends else detokenizer.push(token)

    def _rest(self, detokenizer: Detokenizer | None) -> str:
        return detokenizer.finish() if detokenizer is not None else ""

    def _logprob(self, sampled: Sampled) -> TokenLogprob:
        assert sampled.logprob is not None
        top = tuple(self._named(token, logprob) for token, logprob in sampled.top)
        chosen = self._named(sampled.token, sampled.logprob)
        return TokenLogprob(chosen.token_id, chosen.token, chosen.bytes, chosen.logprob, top)

    def _named(self, token: int, logprob: float) -> TokenLogprob:
        content = self._name(token) if self._name else b""
        return TokenLogprob(token, content.decode("utf-8", "replace"), content, logprob)


def merged(deltas: SequenceOf[OutputDelta]) -> OutputDelta:
    """Several deltas of one choice, the last of which may end it, as one."""
    if len(deltas) == 1:
        return deltas[0]
    return replace(
        deltas[-1],
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
    )


class TokenNames:
    """The bytes that a token stands for, which may be part of a character."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._byte_level = "ByteLevel" in str(getattr(backend, "decoder", ""))
        self._byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        self._cached = lru_cache(maxsize=65536)(self._look_up)

    def __call__(self, token: int) -> bytes:
        """Bytes of a token id; empty for ids that the tokenizer does not have."""
        return self._cached(token)

    def _look_up(self, token: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""  # the head has more rows than the tokenizer has tokens
        if token in self._special:
            return piece.encode()
        if self._byte_level:
            if all(character in self._byte_of for character in piece):
                return bytes(self._byte_of[character] for character in piece)
            return piece.encode()  # an added token, stored as plain text
        if piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:-1], 16)])  # byte fallback of SentencePiece
        return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
