"""Asking a model for labels: the probability of each label, or the answer that it writes.

Label scoring walks the tree of the labels' tokens behind each prompt in one forward pass::

    prompt tokens | root -> neg -> ative <end>      labels share the prompt, and each other's
                         -> pos -> itive <end>      beginnings; only branching nodes are computed
                                -> sible <end>

A label's probability is the product of its branches' probabilities among the branches that some
label takes there: what constrained decoding would draw from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from anabranch.errors import ConfigurationError
from anabranch.training.errors import DataError
from anabranch.training.forward import base_model, evaluating
from anabranch.training.recipe import Generate
from anabranch.training.scores import generate_answers
from anabranch.training.task import Rendered
from anabranch.training.tasks.classification import ClassificationTask
from anabranch.training.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = tuple[int, ...]

CELLS = 4096
"""Tokens of one forward pass, padding included."""
ANSWERED_TOGETHER = 16


@dataclass(frozen=True)
class LabelScores:
    """``log_probabilities`` [texts, labels] sum to 1 over a text's labels after ``exp``.

    ``cut`` are the indices of texts whose middle was left out to fit the context.
    """

    labels: tuple[str, ...]
    log_probabilities: np.ndarray
    cut: tuple[int, ...] = ()

    @property
    def best(self) -> list[str]:
        """The most probable label of each text."""
        return [self.labels[i] for i in self.log_probabilities.argmax(axis=1)]


class Asker:
    """A model and its tokenizer, its template, and a task.

    ``context`` bounds prompt and answer in tokens; longer texts lose their middle.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        task: ClassificationTask,
        context: int = 1024,
        answer_tokens: int = 64,
        cells: int = CELLS,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._template = template
        self._task = task
        self._room = context - answer_tokens
        self._answer_tokens = answer_tokens
        self._cells = cells
        if self._room < len(template.prompt(task.question(""))) + 8:
            raise ConfigurationError(
                f"a context of {context} tokens leaves no room for a text: the prompt without one "
                f"takes {len(template.prompt(task.question('')))}, the answer {answer_tokens}"
            )

    @torch.no_grad()
    def scores(self, texts: Sequence[str], constrained: bool = True) -> LabelScores:
        """Log-probability of every label for every text. For kind ``single``.

        Not ``constrained``: of the whole label string among all strings, brought to sum 1 after.
        """
        if self._task.kind != "single":
            raise ConfigurationError(
                f"label scoring compares single labels; kind {self._task.kind!r} needs the "
                f"answers that the model writes"
            )
        paths = self._label_tokens()
        nodes = inner_nodes(paths, branching_only=constrained)
        prompts, cut = self._prompts(texts)
        found = np.zeros((len(texts), len(paths)))
        with evaluating(self._model):
            for rows in self._batches(prompts, extra=len(nodes)):
                logits = self._tree_logits([prompts[i] for i in rows], nodes)
                found[rows] = _path_scores(logits, [(), *nodes], paths, constrained).cpu().numpy()
        if not constrained:
            found -= np.logaddexp.reduce(found, axis=1, keepdims=True)
        return LabelScores(self._task.labels, found, cut)

    def answers(self, texts: Sequence[str]) -> list[str]:
        """What the model writes for every text, greedily."""
        prompts, _ = self._prompts(texts)
        options = Generate(max_tokens=self._answer_tokens, batch=ANSWERED_TOGETHER)
        ends = self._template.end_tokens
        return generate_answers(self._model, self._tokenizer, prompts, ends, options)

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _label_tokens(self) -> list[Tokens]:
        """The tokens of each label as an answer, its end included, as training sees them."""
        found: dict[Tokens, str] = {}
        for label in self._task.labels:
            answer = {"role": "assistant", "content": self._task.answer(label)}
            rendered = Rendered(messages=(*self._task.question("text"), answer))
            example = self._template.example(rendered)
            tokens = tuple(
                t for t, kept in zip(example.tokens, example.trained, strict=True) if kept
            )
            if tokens in found:
                raise DataError(f"labels {found[tokens]!r} and {label!r} have the same tokens")
            found[tokens] = label
        return list(found)

    def _prompts(self, texts: Sequence[str]) -> tuple[list[list[int]], tuple[int, ...]]:
        prompts, cut = [], []
        for index, text in enumerate(texts):
            prompt = self._template.prompt(self._task.question(text))
            if len(prompt) > self._room:
                prompt = self._shortened(text, len(prompt))
                cut.append(index)
            prompts.append(prompt)
        return prompts, tuple(cut)

    def _shortened(self, text: str, length: int) -> list[int]:
        """The prompt of the text without its middle, found by halving what is kept."""
        low, high = 0, len(text)  # characters kept: low fits, high does not
        best = self._template.prompt(self._task.question(""))
        while high - low > max(1, len(text) // 200):
            kept = (low + high) // 2
            start = text[: kept - kept // 2]
            end = text[len(text) - kept // 2 :]
            prompt = self._template.prompt(self._task.question(f"{start} ... {end}"))
            if len(prompt) <= self._room:
                low, best = kept, prompt
            else:
                high = kept
        return best

    def _batches(self, prompts: Sequence[Sequence[int]], extra: int) -> Iterator[list[int]]:
        """Indices of prompts of similar length, within the cells of a forward pass."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        batch: list[int] = []
        for index in order:
            width = len(prompts[index]) + extra
            if batch and width * (len(batch) + 1) > self._cells:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _tree_logits(self, prompts: Sequence[Sequence[int]], nodes: Sequence[Tokens]) -> Tensor:
        """Logits after the prompt and every node, float32 [prompts, 1 + nodes, vocabulary]."""
        model: Any = self._model
        ids, real = _left_padded(prompts, self._device)
        batch, length = ids.shape
        count = len(nodes)
        tails = torch.tensor([[node[-1] for node in nodes]], dtype=torch.int64, device=ids.device)
        inputs = torch.cat([ids, tails.reshape(1, count).expand(batch, -1)], 1)

        # Prompt tokens see the prompt before them; a node sees the prompt and its ancestors.
        seen = torch.zeros(batch, length + count, length + count, dtype=torch.bool)
        seen[:, :length, :length] = torch.ones(length, length).tril().bool() & real[:, None].cpu()
        seen[:, length:, :length] = real[:, None].cpu()
        for index, node in enumerate(nodes):
            for other, ancestor in enumerate(nodes):
                seen[:, length + index, length + other] = node[: len(ancestor)] == ancestor
        seen |= torch.eye(length + count, dtype=torch.bool)  # padding sees itself, never nothing
        dtype = base_model(model).dtype
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)

        first = (real.long().cumsum(1) - 1).clamp(min=0)  # [prompts, length]
        depth = torch.tensor([len(node) for node in nodes], dtype=torch.int64, device=ids.device)
        positions = torch.cat([first, first[:, -1:] + depth], 1)
        output = model(
            input_ids=inputs,
            attention_mask=mask[:, None].to(ids.device),
            position_ids=positions,
            use_cache=False,
            logits_to_keep=1 + count,
        )
        logits: Tensor = output.logits.float()
        return logits


def inner_nodes(paths: Sequence[Tokens], branching_only: bool) -> list[Tokens]:
    """Beginnings of the label paths (not the empty one) that must be computed, parents first.

    With ``branching_only`` those after which two labels differ, and what leads there.
    """
    found = set()
    for path in paths:
        for depth in range(1, len(path)):
            node = path[:depth]
            branches = {other[depth] for other in paths if other[:depth] == node}
            if len(branches) > 1 or not branching_only:
                found |= {node[:above] for above in range(1, depth + 1)}
    return sorted(found, key=lambda node: (len(node), node))


def _path_scores(
    logits: Tensor, nodes: Sequence[Tokens], paths: Sequence[Tokens], constrained: bool
) -> Tensor:
    """Sum of the log-probabilities of each path's tokens, float64 [prompts, paths]."""
    place = {node: index for index, node in enumerate(nodes)}
    total = torch.zeros(logits.shape[0], len(paths), dtype=torch.float64)
    for column, path in enumerate(paths):
        for depth, token in enumerate(path):
            node = path[:depth]
            if node not in place:
                continue  # no other label goes on differently from here
            rows = logits[:, place[node]].double()
            if constrained:
                siblings = sorted({other[depth] for other in paths if other[:depth] == node})
                rows, token = rows[:, siblings], siblings.index(token)
            total[:, column] += rows.log_softmax(-1)[:, token].cpu()
    return total


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [prompts, longest] and what of them is real, padded before the prompt."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    real = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        real[row, longest - len(prompt) :] = True
    return ids.to(device), real.to(device)
