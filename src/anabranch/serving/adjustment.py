"""What changes logits before a token is chosen: bias, penalties, constraints; all rows at once.

A row may lie behind drafted tokens. It is then treated as if they had been drawn.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding

from anabranch.errors import RequestFailed
from anabranch.models.protocol import SamplingParameters
from anabranch.serving.sequence import Sequence

_CLOSED = torch.tensor(
    [[0.0 if byte >> bit & 1 else float("-inf") for bit in range(8)] for byte in range(256)]
)
"""What eight bits of a mask add to logits: looked up, as filling by booleans takes five times as
long."""


class Row(NamedTuple):
    """Whose next token a row of logits is for."""

    sequence: Sequence
    drafted: tuple[int, ...] = ()
    """Tokens between the sequence's own and the one that is chosen here."""


def adjust(logits: Tensor, rows: SequenceOf[Row]) -> Tensor:
    """Logits ``[rows, vocabulary]``, float32, from which tokens are drawn."""
    logits = logits.float()
    logits = _add_bias(logits, rows)
    logits = _penalise(logits, rows)
    return _mask(logits, rows)


def has_penalties(sampling: SamplingParameters) -> bool:
    """Whether tokens seen before change the distribution."""
    return (
        sampling.repetition_penalty != 1.0
        or sampling.frequency_penalty != 0.0
        or sampling.presence_penalty != 0.0
    )


def _add_bias(logits: Tensor, rows: SequenceOf[Row]) -> Tensor:
    biased = [i for i, row in enumerate(rows) if row.sequence.request.sampling.logit_bias]
    if not biased:
        return logits
    logits = logits.clone()
    for row in biased:
        bias = rows[row].sequence.request.sampling.logit_bias
        logits[row, list(bias)] += torch.tensor(list(bias.values()), device=logits.device)
    return logits


def _penalise(logits: Tensor, rows: SequenceOf[Row]) -> Tensor:
    """Repetition penalty (Keskar et al. 2019, section 4.1) and OpenAI's two penalties.

    Repetition looks at prompt and output, frequency and presence at the output only.
    """
    penalised = [i for i, r in enumerate(rows) if has_penalties(r.sequence.request.sampling)]
    if not penalised:
        return logits
    logits = logits.clone()
    for index in penalised:
        sequence, sampling = rows[index].sequence, rows[index].sequence.request.sampling
        if sequence.token_counts is None:
            sequence.token_counts = _count_tokens(sequence, logits.shape[1], logits.device)
        prompt, output = sequence.token_counts
        if rows[index].drafted:
            drafted = torch.tensor(rows[index].drafted, device=logits.device)
            output = output.index_add(0, drafted, torch.ones_like(drafted, dtype=output.dtype))
        row = logits[index]
        if sampling.repetition_penalty != 1.0:
            factor = sampling.repetition_penalty
            shrunk = torch.where(row > 0, row / factor, row * factor)
            row = torch.where((prompt + output) > 0, shrunk, row)
        row = row - sampling.frequency_penalty * output
        logits[index] = row - sampling.presence_penalty * (output > 0)
    return logits


def _count_tokens(sequence: Sequence, vocabulary: int, device: torch.device) -> Tensor:
    parts = sequence.tokens[: sequence.prompt_length], sequence.tokens[sequence.prompt_length :]
    counts = [
        torch.bincount(torch.tensor(p, dtype=torch.long), minlength=vocabulary) for p in parts
    ]
    return torch.stack(counts).to(device=device, dtype=torch.int32)


def _mask(logits: Tensor, rows: SequenceOf[Row]) -> Tensor:
    """Leave the tokens that keep an answer in the language of its constraint."""
    constrained = [i for i, row in enumerate(rows) if row.sequence.constraint is not None]
    if not constrained:
        return logits
    vocabulary = logits.shape[1]
    words = np.zeros((len(constrained), -(-vocabulary // 32)), dtype=np.int32)
    for word, index in zip(words, constrained, strict=True):
        _fill_mask(rows[index], word)
    bytes_ = torch.from_numpy(words.view(np.uint8)).to(logits.device).int()
    closed = embedding(bytes_, _CLOSED.to(logits.device)).view(len(constrained), -1)[:, :vocabulary]
    if len(constrained) == len(rows):
        return closed.add_(logits)
    logits = logits.clone()
    logits[constrained] += closed
    return logits


def _fill_mask(row: Row, words: np.ndarray) -> None:
    """Leaves nothing, so that the sequence fails, where the constraint runs into its limits."""
    sequence = row.sequence
    state = sequence.constraint
    assert state is not None
    if sequence.failure is not None:
        return
    taken = 0
    try:
        for token in row.drafted:
            if not state.accept(token):
                break
            taken += 1
        if taken == len(row.drafted):
            state.fill_mask(words)
        else:
            words.fill(-1)  # nobody gets to a row behind a token that is refused
        if taken:
            state.rollback(taken)
    except RequestFailed as error:
        words.fill(0)
        sequence.failure = str(error)
