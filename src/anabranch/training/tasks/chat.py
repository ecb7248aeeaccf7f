"""Supervised fine-tuning on conversations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

from anabranch.training.conversation import CONVERSATIONS, LISTS, conversation
from anabranch.training.errors import DataError
from anabranch.training.task import Message, Rendered, Row, Shape, Task


class Chat(Task):
    """Conversations of any number of turns; every assistant turn is learned.

    Generated last answers are compared with the data's: ``token_f1`` (overlap of words, Rajpurkar
    et al. 2016, section 6.1) and ``exact``.
    """

    name: ClassVar[str] = "chat"
    schema = CONVERSATIONS

    def render(self, row: Row) -> tuple[Rendered, ...]:
        """One conversation, ending with an answer. Turns of ``weight`` 0 are not learned."""
        shape = self.shape_of(row)
        messages = ends_with_answer(conversation(row, shape))
        return (Rendered(messages, untrained=without_weight(row, shape)),)

    def reference(self, row: Row) -> str:
        """The data's last answer."""
        return self.render(row)[0].answer.strip()

    def score(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        """Mean word overlap, and the share of answers that are the same to the letter."""
        if not predictions:
            return {}
        overlaps = [token_f1(str(p), str(r)) for p, r in zip(predictions, references, strict=True)]
        return {
            "token_f1": sum(overlaps) / len(overlaps),
            "exact": super().score(predictions, references)["accuracy"],
        }


def ends_with_answer(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages, if there is something to learn from them."""
    if not messages or messages[-1]["role"] != "assistant":
        last = f"is by {messages[-1]['role']!r}" if messages else "does not exist"
        raise DataError(f"the last turn {last}; it must be the assistant's, which is learned")
    return messages


def without_weight(row: Row, shape: Shape) -> frozenset[int]:
    """Indices of the turns that have ``weight`` 0, as OpenAI's files mark them."""
    if shape[0] not in LISTS:
        return frozenset()
    weights = [turn.get("weight", 1) for turn in row[shape[0]]]
    for index, weight in enumerate(weights):
        if weight not in (0, 1, None):
            raise DataError(f"{shape[0]}[{index}] has the weight {weight!r}; it must be 0 or 1")
    return frozenset(index for index, weight in enumerate(weights) if weight == 0)


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall of words; 1 for two empty texts."""
    given, wanted = prediction.lower().split(), reference.lower().split()
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))
