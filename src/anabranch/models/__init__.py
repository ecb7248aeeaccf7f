"""Base models: find, check, convert, describe and load them.

What belongs here: everything between a name that a user typed and a network in memory with its
tokenizer and card - name resolution, the cache on disk, integrity checks, GGUF conversion, hub
downloads - and the :class:`Model` protocol that all that answers shares. What does not: running a
network for many requests (``serving``), changing it (``adapters``, ``compression``, ``training``).
Importing this package is cheap; torch and transformers are imported when a model is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from anabranch.models.card import ModelCard
from anabranch.models.packaged import DEFAULT

if TYPE_CHECKING:
    from anabranch.models.encoder import SentenceEncoder, load_encoder
    from anabranch.models.library import available, pull, remove
    from anabranch.models.loading import LoadedModel, load
    from anabranch.models.progress import Progress
    from anabranch.models.protocol import (
        Embedding,
        Generation,
        Model,
        ModelStatistics,
        OutputDelta,
        SamplingParameters,
        TokenLogprob,
    )

__all__ = [
    "DEFAULT",
    "Embedding",
    "Generation",
    "LoadedModel",
    "Model",
    "ModelCard",
    "ModelStatistics",
    "OutputDelta",
    "Progress",
    "SamplingParameters",
    "SentenceEncoder",
    "TokenLogprob",
    "available",
    "card",
    "load",
    "load_encoder",
    "pull",
    "remove",
]

_PROTOCOL = (
    "Embedding",
    "Generation",
    "Model",
    "ModelStatistics",
    "OutputDelta",
    "SamplingParameters",
    "TokenLogprob",
)
_MODULE_OF = {
    "LoadedModel": "loading",
    "load": "loading",
    "SentenceEncoder": "encoder",
    "load_encoder": "encoder",
    "available": "library",
    "pull": "library",
    "remove": "library",
    "Progress": "progress",
    **dict.fromkeys(_PROTOCOL, "protocol"),
}


def card(name: str) -> ModelCard:
    """The facts about a model, without loading its weights; see ``library.card``."""
    # A real function: the submodule of the same name would hide one that is found lazily.
    from anabranch.models import library

    return library.card(name)


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that the command line starts fast."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
