"""The lame prompt's sequence: its own keys and values, computed no further than needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Companion:
    """A prompt that is continued with tokens which another sequence chose.

    It may lag behind: tokens that it was given wait until :meth:`logits` is asked for, and are then
    computed in one chunk. A chunk gives the same keys and values as single steps (up to rounding),
    so that lagging changes the cost and nothing else::

        tokens      [ n n n n n g g g g g g ]     n: lame prompt, g: tokens the leader chose
        computed    ------------->|               the next chunk starts here

    Not thread-safe; one row.
    """

    def __init__(self, model: Any, prompt: Sequence[int]) -> None:
        self._model = model
        self._waiting = list(prompt)
        self._cache: Any = None
        self._logits: Tensor | None = None
        self.forwards = 0
        """Chunks computed so far."""
        self.computed = 0
        """Tokens computed so far."""

    def append(self, token: int) -> None:
        """Continue with a token that the leader chose."""
        self._waiting.append(token)

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Of the next token, float32 ``[V]``; computes what waits."""
        if self._waiting:
            chunk = torch.tensor([self._waiting], device=self._model.device)  # [1, waiting]
            output = self._model(
                chunk, past_key_values=self._cache, use_cache=True, logits_to_keep=1
            )
            self._cache = output.past_key_values
            self._logits = output.logits[0, -1].float()
            self.computed += len(self._waiting)
            self.forwards += 1
            self._waiting = []
        if self._logits is None:
            raise ValueError("a companion needs a prompt of at least one token")
        return self._logits
