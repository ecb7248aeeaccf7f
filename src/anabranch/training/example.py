"""What training reads: token sequences with the positions that count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anabranch.training.errors import DataError


@dataclass(frozen=True, slots=True)
class Example:
    """One token sequence. ``trained[t]`` says whether the loss counts the prediction of token t.

    Both have the same length. ``trained[0]`` is False: nothing precedes the first token.
    ``task`` names the task for multi-task losses, ``source`` the row (``file:line``) for messages.
    """

    tokens: Sequence[int]
    trained: Sequence[bool]
    task: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.trained):
            raise DataError(
                f"{self.source or 'an example'} has {len(self.tokens)} tokens but "
                f"{len(self.trained)} marks of what is trained on; give one per token"
            )
        if self.trained and self.trained[0]:
            raise DataError(
                f"{self.source or 'an example'}: the first token has nothing before it that "
                f"could predict it; mark it as not trained"
            )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def targets(self) -> int:
        """How many tokens the loss counts."""
        return sum(self.trained)


Item = tuple[Example, ...]
"""Examples whose loss is computed together: one, or the chosen and the rejected of a pair."""
