"""SpecTr on two plain transformers models: what it should do, without an engine."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain
from random import Random
from typing import Any

import torch
from torch import Tensor

from anabranch.serving.speculation.proposal import Proposal
from anabranch.serving.speculation.spectr import draw, merge_drafts, select

HALF_OF_30 = (0, 1, 2, 8, 9, 10, 11, 15, 20, 21, 22, 24, 27, 28, 29)
"""Half of SmolLM2-135M's layers. Found by leaving out, fifteen times, the layer without which the
laws after each token of three short prompts were closest to those of the whole model."""


def with_layers(network: Any, layers: Sequence[int]) -> Any:
    """A Llama-like network of only these layers, which shares its tensors with ``network``."""
    shared = {id(t): t for t in chain(network.parameters(), network.buffers())}
    fewer = copy.deepcopy(network, shared)
    fewer.model.layers = torch.nn.ModuleList([fewer.model.layers[i] for i in layers])
    for index, layer in enumerate(fewer.model.layers):
        layer.self_attn.layer_idx = index
    fewer.config.num_hidden_layers = len(layers)
    return fewer


class TreeModel:
    """A network that has read a text and says what follows it, and each node of a tree."""

    def __init__(self, network: Any, text: Sequence[int]) -> None:
        from transformers import DynamicCache

        self._network = network
        self._cache = DynamicCache(config=network.config)
        self._unread = list(text)

    def append(self, tokens: Sequence[int]) -> None:
        """The text goes on."""
        self._unread += tokens

    @torch.inference_mode()
    def laws(self, tree: Proposal, rows: int | None = None) -> Tensor:
        """[rows, vocabulary]: the last of the laws after the text and after each node; default all.

        In single precision.
        """
        past, unread, nodes = self._cache.get_seq_length(), len(self._unread), len(tree)
        text = past + unread
        ids = torch.tensor([[*self._unread, *tree.tokens]])
        positions = [*range(past, text), *(text - 1 + depth for depth in tree.depths)]
        seen = torch.ones(unread + nodes, text + nodes, dtype=torch.bool).tril(past)
        for node in range(nodes):
            seen[unread + node, text:] = False
            seen[unread + node, [text + i for i in tree.path(node)]] = True
        mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
        logits = self._network(
            ids,
            attention_mask=mask[None, None],
            position_ids=torch.tensor([positions]),
            past_key_values=self._cache,
            logits_to_keep=nodes + 1 if rows is None else rows,
        ).logits[0]
        # The last token of the text is read again: the row after it is wanted each time.
        self._cache.crop(-(nodes + 1))
        self._unread = self._unread[-1:]
        return logits.softmax(-1)


def tokens_per_call(
    target: Any,
    draft: Any,
    text: Sequence[int],
    sizes: Sequence[int],
    length: int,
    calls: int,
    seed: str,
) -> dict[int, list[int]]:
    """Tokens that calls of the target emit, by number of drafts.

    The text goes on as with the last of ``sizes``, the largest. The others judge parts of the same
    drafts with the same laws, as many parts as there are, so that all are compared after the same
    texts.
    """
    random = Random(seed)
    judge, drafter = TreeModel(target, text), TreeModel(draft, text)
    emitted: dict[int, list[int]] = {size: [] for size in sizes}
    for _ in range(calls):
        drafts, draft_laws = independent_drafts(drafter, sizes[-1], length, random)
        tree, paths = merge_drafts(drafts)
        target_laws = judge.laws(tree)
        for size in sizes:
            for start in range(0, len(drafts), size):
                part = slice(start, start + size)
                some, places = _part(drafts[part], paths[part])
                rows = [0, *(1 + node for node in places)]
                tokens = select(some, draft_laws[rows], target_laws[rows], random).tokens
                emitted[size].append(len(tokens))
        judge.append(tokens)
        drafter.append(tokens)
    return emitted


def independent_drafts(
    draft: TreeModel, count: int, length: int, random: Random
) -> tuple[list[list[int]], Tensor]:
    """Drafts, and the laws ``[nodes + 1, vocabulary]`` of their merged tree; 0 after leaves."""
    drafts: list[list[int]] = [[] for _ in range(count)]
    laws: list[Tensor] = []
    for _ in range(length):
        # Nodes come level by level, so that those of a longer tree begin with these.
        tree, paths = merge_drafts(drafts)
        laws += draft.laws(tree, 1 + len(tree) - len(laws))
        for tokens, path in zip(drafts, paths, strict=True):
            tokens.append(draw(laws[1 + path[-1] if path else 0], random.random()))
    leaves = 1 + len(merge_drafts(drafts)[0]) - len(laws)
    return drafts, torch.stack(laws + [torch.zeros_like(laws[0])] * leaves)


def _part(
    drafts: Sequence[Sequence[int]], paths: Sequence[Sequence[int]]
) -> tuple[Proposal, list[int]]:
    """The tree of some drafts, and which node of the whole tree each of its nodes is."""
    tree, own = merge_drafts(drafts)
    places = dict(zip(chain(*own), chain(*paths), strict=True))
    return tree, [places[node] for node in range(len(tree))]
