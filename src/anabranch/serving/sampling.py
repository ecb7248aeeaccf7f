"""Chooses the next token of every sequence from its row of logits, all rows at once.

Rows pass through stages in a fixed order: bias, penalties, temperature, truncation (top-k, top-p,
min-p), then one draw. Randomness comes from each sequence's own generator, one number per token,
so a seeded request gives the same tokens whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch
from torch import Tensor

from anabranch.models.protocol import SamplingParameters
from anabranch.serving.sequence import Sequence

CANDIDATES = 1024
"""Most likely tokens that truncation looks at first. Nearly always they hold the mass that top-p
asks for, which saves sorting the vocabulary; rows where they do not are sorted in full."""

GREEDY_BELOW = 1e-5
"""Temperatures up to this are greedy: dividing by less overflows single precision."""


class Sampled(NamedTuple):
    """One chosen token; the log-probabilities are the model's own, before any stage."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample(logits: Tensor, sequences: SequenceOf[Sequence]) -> list[Sampled | None]:
    """A token for each row of ``logits [rows, vocabulary]``; None where a row is not finite.

    ``+inf`` and NaN mean that the model or an adapter overflowed. ``-inf`` is a legal mask, as
    long as something remains.
    """
    if not sequences:
        return []
    rows = logits.float()
    # One NaN or +inf makes a row's maximum NaN or +inf; a fully masked row has -inf.
    healthy = torch.isfinite(rows.amax(dim=-1)).tolist()
    logprobs = _logprobs(rows, sequences)
    rows = _add_bias(rows, sequences)
    rows = _penalise(rows, sequences)
    tokens = _draw(rows, sequences)
    for sequence, token, good in zip(sequences, tokens, healthy, strict=True):
        if good and sequence.token_counts is not None:
            sequence.token_counts[1, token] += 1
    return [
        _sampled(token, *logprobs[row]) if good else None
        for row, (token, good) in enumerate(zip(tokens, healthy, strict=True))
    ]


def _sampled(token: int, row: Tensor | None, count: int) -> Sampled:
    if row is None:
        return Sampled(token)
    values, ids = row.topk(min(count, len(row)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Sampled(token, float(row[token]), top)


def _logprobs(rows: Tensor, sequences: SequenceOf[Sequence]) -> list[tuple[Tensor | None, int]]:
    return [
        (None, 0)
        if (count := sequence.request.sampling.logprobs) is None
        else (rows[row].log_softmax(dim=-1), count)
        for row, sequence in enumerate(sequences)
    ]


def _add_bias(rows: Tensor, sequences: SequenceOf[Sequence]) -> Tensor:
    biased = [i for i, sequence in enumerate(sequences) if sequence.request.sampling.logit_bias]
    if not biased:
        return rows
    rows = rows.clone()
    for row in biased:
        bias = sequences[row].request.sampling.logit_bias
        rows[row, list(bias)] += torch.tensor(list(bias.values()), device=rows.device)
    return rows


def _penalise(rows: Tensor, sequences: SequenceOf[Sequence]) -> Tensor:
    """Repetition penalty (Keskar et al. 2019, section 4.1) and OpenAI's two penalties.

    Repetition looks at prompt and output, frequency and presence at the output only.
    """
    penalised = [i for i, s in enumerate(sequences) if has_penalties(s.request.sampling)]
    if not penalised:
        return rows
    rows = rows.clone()
    for row in penalised:
        sequence, sampling = sequences[row], sequences[row].request.sampling
        if sequence.token_counts is None:
            sequence.token_counts = _count_tokens(sequence, rows.shape[1], rows.device)
        prompt, output = sequence.token_counts
        logits = rows[row]
        if sampling.repetition_penalty != 1.0:
            factor = sampling.repetition_penalty
            shrunk = torch.where(logits > 0, logits / factor, logits * factor)
            logits = torch.where((prompt + output) > 0, shrunk, logits)
        logits = logits - sampling.frequency_penalty * output
        rows[row] = logits - sampling.presence_penalty * (output > 0)
    return rows


def has_penalties(sampling: SamplingParameters) -> bool:
    """Whether tokens seen before change the distribution."""
    return (
        sampling.repetition_penalty != 1.0
        or sampling.frequency_penalty != 0.0
        or sampling.presence_penalty != 0.0
    )


def _count_tokens(sequence: Sequence, vocabulary: int, device: torch.device) -> Tensor:
    parts = sequence.tokens[: sequence.prompt_length], sequence.tokens[sequence.prompt_length :]
    counts = [
        torch.bincount(torch.tensor(p, dtype=torch.long), minlength=vocabulary) for p in parts
    ]
    return torch.stack(counts).to(device=device, dtype=torch.int32)


def _draw(rows: Tensor, sequences: SequenceOf[Sequence]) -> list[int]:
    settings = [sequence.request.sampling for sequence in sequences]
    tokens = rows.argmax(dim=-1)
    random = [i for i, s in enumerate(settings) if s.temperature > GREEDY_BELOW]
    if not random:
        return tokens.tolist()

    uniform = torch.tensor([sequences[i].random.random() for i in random], dtype=torch.float64)
    temperature = torch.tensor([settings[i].temperature for i in random])
    scaled = rows[random] / temperature[:, None].to(rows.device)
    plain = torch.tensor([not _truncates(settings[i]) for i in random])
    chosen = torch.empty(len(random), dtype=torch.long)
    if plain.any():
        chosen[plain] = _inverse(scaled[plain].softmax(dim=-1), uniform[plain]).cpu()
    if not plain.all():
        cut = ~plain
        kept = [settings[i] for i, p in zip(random, plain.tolist(), strict=True) if not p]
        chosen[cut] = _draw_truncated(scaled[cut], uniform[cut], kept).cpu()
    tokens[random] = chosen.to(tokens.device)
    return tokens.tolist()


def _truncates(sampling: SamplingParameters) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


def _draw_truncated(
    logits: Tensor, uniform: Tensor, settings: SequenceOf[SamplingParameters]
) -> Tensor:
    """Draw from the tokens that top-k, top-p and min-p leave; ``logits [rows, vocabulary]``.

    Each limit is applied to the distribution that the one before it left, as in transformers.
    """
    vocabulary = logits.shape[1]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    top_k = column([s.top_k or vocabulary for s in settings])
    top_p = column([s.top_p for s in settings])
    min_p = column([s.min_p for s in settings])

    width = min(CANDIDATES, vocabulary)
    values, ids = logits.topk(width, dim=-1)  # descending
    mass = (values.logsumexp(-1) - logits.logsumexp(-1)).exp()
    by_mass = (top_p[:, 0] < 1.0) & (mass >= top_p[:, 0])
    by_minimum = (values[:, -1] - values[:, 0]).exp() < min_p[:, 0]
    everything = top_k[:, 0] >= vocabulary
    enough = (top_k[:, 0] <= width) | (everything & (by_mass | by_minimum))
    if width < vocabulary and not bool(enough.all()):
        # Only these rows: the two ways order equal logits differently, and a row's token must
        # not depend on which way another row needs.
        far = ~enough
        filled = torch.full_like(logits, float("-inf"))
        filled[:, :width] = values
        positions = torch.zeros_like(logits, dtype=torch.long)
        positions[:, :width] = ids
        filled[far], positions[far] = logits[far].sort(dim=-1, descending=True)
        values, ids = filled, positions

    rank = torch.arange(values.shape[1], device=logits.device)
    in_top_k = rank < top_k
    # With top-k the nucleus is a share of what top-k left, without it of the whole vocabulary.
    within = values.masked_fill(~in_top_k, float("-inf"))
    total = torch.where(everything, logits.logsumexp(-1), within.logsumexp(-1))
    probabilities = (within - total[:, None]).exp()
    before = probabilities.cumsum(dim=-1) - probabilities  # mass of more likely tokens
    # Rounding may bring the mass to 1 before the last token, so 1 must not cut at all.
    keep = in_top_k & ((before < top_p) | (top_p >= 1.0) | (rank == 0))
    keep &= probabilities >= min_p * probabilities[:, :1]
    kept = probabilities * keep
    position = _inverse(kept / kept.sum(dim=-1, keepdim=True), uniform)
    return ids.gather(1, position[:, None])[:, 0]


def _inverse(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Index at which each row's cumulative distribution passes its uniform number."""
    # Double precision: in single precision the tail of a large vocabulary adds up to nothing.
    cumulative = probabilities.double().cumsum(dim=-1)
    target = uniform.to(cumulative.device)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # Rounding may push the target to the very end; the last token with any mass is meant then.
    last = probabilities.shape[1] - 1 - (probabilities > 0).flip(-1).int().argmax(dim=-1)
    return torch.minimum(index, last)
