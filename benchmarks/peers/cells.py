"""What is served: how many requests, how long, and with what in common.

Prompts are random token ids. They depend on the cell and the round only, so every side gets the
same ones, and no side finds a prompt of an earlier round in its prefix cache.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from zlib import crc32

TOKENS = range(100, 40_000)
"""Ids to draw from: ordinary text tokens of the default model."""


@dataclass(frozen=True)
class Cell:
    """Requests that arrive together. The first ``shared_tokens`` of every prompt are the same.

    With ``adapters``, request i runs on adapter ``i % adapters`` of as many that are loaded.
    """

    name: str
    requests: int
    prompt_tokens: int
    output_tokens: int
    shared_tokens: int = 0
    adapters: int = 0

    def prompts(self, round_: int) -> list[list[int]]:
        """Token ids of every prompt, of a length of ``shared_tokens + prompt_tokens``."""
        generator = random.Random(crc32(f"{self}/{round_}".encode()))
        shared = generator.choices(TOKENS, k=self.shared_tokens)
        return [
            shared + generator.choices(TOKENS, k=self.prompt_tokens) for _ in range(self.requests)
        ]

    def title(self) -> str:
        """The cell in words."""
        requests = "1 request" if self.requests == 1 else f"{self.requests} requests"
        shared = f"{self.shared_tokens:,} common + " if self.shared_tokens else ""
        mixed = f", {self.adapters} adapters" if self.adapters else ""
        return (
            f"{self.name}: {requests}, {shared}{self.prompt_tokens:,} in, "
            f"{self.output_tokens} out{mixed}"
        )


CELLS = {
    cell.name: cell
    for cell in (
        Cell("single", 1, 128, 64),
        Cell("chat", 16, 128, 64),
        Cell("write", 16, 32, 256),
        Cell("crowd", 64, 128, 64),
        Cell("long", 4, 2000, 32),
        Cell("prefix", 16, 50, 32, shared_tokens=1000),
        Cell("adapters", 16, 128, 64, adapters=8),
        Cell("tiny", 2, 8, 4),
    )
}
DEFAULT = [name for name in CELLS if name != "tiny"]
WARM_UP = Cell("warm-up", 4, 64, 8)
"""Before anything is measured: first calls compile, allocate and fill caches."""
TRIAL = Cell("trial", 8, 64, 32)
"""Decides between the settings that a side could use."""
