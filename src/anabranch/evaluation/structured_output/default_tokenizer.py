"""The default model's tokenizer, for work in other processes that needs no weights."""

from __future__ import annotations

from typing import Any

from anabranch.models.library import ready
from anabranch.models.loading import read_tokenizer
from anabranch.models.packaged import DEFAULT
from anabranch.models.progress import silent


def default_tokenizer() -> tuple[Any, int, tuple[int, ...]]:
    """Tokenizer, rows of the head, end tokens."""
    with ready(DEFAULT, silent) as model:
        tokenizer = read_tokenizer(model.contents.folder)
        rows = int(model.contents.config["vocab_size"])
    return tokenizer, rows, (int(tokenizer.eos_token_id),)
