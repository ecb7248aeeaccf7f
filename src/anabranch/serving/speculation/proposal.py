"""Tokens that somebody thinks will follow: what drafters make and verifiers judge."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

MAX_NODES = 63
"""Nodes of one tree: what a node sees of it is a mask of 64 bits, one of which is the sign."""


@dataclass(frozen=True, eq=False)
class Proposal:
    """A chain of tokens, or a tree of several continuations, after a sequence.

    Node i is token ``tokens[i]`` after node ``parents[i]``, or after the sequence where that is -1;
    parents come before their children. ``parents`` None is a chain. ``laws``
    ``[nodes + 1, vocabulary]`` are the distributions that a drafter drew from: row 0 for what
    follows the sequence, row 1 + i for what follows node i; rows without children are never read.
    None means that the tokens were not drawn but chosen. ``counts`` says how many drafts pass
    through each node of a tree of independent drafts.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...] | None = None
    laws: Tensor | None = None
    counts: tuple[int, ...] | None = None
    forced: bool = False
    """Whether a constraint leaves no other text: whether to verify it is no question then."""
    likeness: Hashable = None
    """What tells good drafts of one proposer from bad ones: those alike are accepted alike."""

    def __post_init__(self) -> None:
        if self.parents is None:
            return
        if len(self.tokens) > MAX_NODES:
            raise ValueError(f"a tree has at most {MAX_NODES} nodes, not {len(self.tokens)}")
        if any(not -1 <= parent < node for node, parent in enumerate(self.parents)):
            raise ValueError(f"parents come before their children, not {self.parents}")

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def depths(self) -> list[int]:
        """How many tokens after the sequence each node is; 1 for the first."""
        if self.parents is None:
            return list(range(1, len(self.tokens) + 1))
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths

    @cached_property
    def visible(self) -> list[int]:
        """For each node of a tree the nodes that it sees: bit j for node j, itself included."""
        masks: list[int] = []
        for node, parent in enumerate(self.parents or range(-1, len(self.tokens) - 1)):
            masks.append((masks[parent] if parent >= 0 else 0) | 1 << node)
        return masks

    @cached_property
    def children(self) -> list[dict[int, int]]:
        """Token -> node of what follows the sequence (entry 0) and each node i (entry 1 + i)."""
        children: list[dict[int, int]] = [{} for _ in range(len(self.tokens) + 1)]
        for node, parent in enumerate(self.parents or range(-1, len(self.tokens) - 1)):
            children[1 + parent].setdefault(self.tokens[node], node)
        return children

    def path(self, node: int) -> list[int]:
        """Nodes from the sequence to a node, which is the last; empty for -1."""
        if self.parents is None:
            return list(range(node + 1))
        path: list[int] = []
        while node >= 0:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    def spelled(self, node: int) -> tuple[int, ...]:
        """Tokens from the sequence to a node."""
        if self.parents is None:
            return self.tokens[: node + 1]
        return tuple(self.tokens[step] for step in self.path(node))

    def first(self, count: int) -> Proposal | None:
        """The first nodes, None for none. Of independent drafts whole depths, or they are not."""
        if count >= len(self.tokens):
            return self
        if self.counts is not None:
            depths = self.depths
            while count > 0 and depths[count] == depths[count - 1]:
                count -= 1
        if count <= 0:
            return None
        return replace(
            self,
            tokens=self.tokens[:count],
            parents=None if self.parents is None else self.parents[:count],
            laws=None if self.laws is None else self.laws[: count + 1],
            counts=None if self.counts is None else self.counts[:count],
        )
