"""Chooses the next token of every row of logits, all rows at once.

Logits are adjusted, divided by the temperature, truncated (top-k, top-p, min-p), and a token is
drawn. Randomness comes from each sequence's own generator, one number per token, so a seeded
request gives the same tokens whatever else is in the batch, and whether they were drafted or not.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch
from torch import Tensor

from anabranch.models.protocol import SamplingParameters
from anabranch.serving.adjustment import Row

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


def finite(logits: Tensor, adjusted: Tensor) -> list[bool]:
    """Which rows a token can be drawn from.

    ``+inf`` and NaN mean that the model or an adapter overflowed. ``-inf`` is a legal mask, as
    long as something remains.
    """
    # One NaN or +inf makes a row's maximum NaN or +inf; a fully masked row has -inf.
    return (logits.amax(dim=-1).isfinite() & adjusted.amax(dim=-1).isfinite()).tolist()


def is_greedy(sampling: SamplingParameters) -> bool:
    """Whether the most likely token is taken."""
    return sampling.temperature <= GREEDY_BELOW


def described(logits: Tensor, index: int, row: Row, token: int) -> Sampled:
    """A chosen token, with the log-probabilities that its request asked for."""
    count = row.sequence.request.sampling.logprobs
    if count is None:
        return Sampled(token)
    logprobs = logits[index].float().log_softmax(dim=-1)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Sampled(token, float(logprobs[token]), top)


def draw(adjusted: Tensor, rows: SequenceOf[Row]) -> list[int]:
    """A token for each row of adjusted logits ``[rows, vocabulary]``."""
    settings = [row.sequence.request.sampling for row in rows]
    tokens = _most_likely(adjusted)
    random = [i for i, s in enumerate(settings) if not is_greedy(s)]
    if not random:
        return tokens.tolist()

    uniform = torch.tensor(
        [rows[i].sequence.uniform(len(rows[i].drafted)) for i in random], dtype=torch.float64
    )
    scaled = _scaled(adjusted, settings, random)
    plain = torch.tensor([not _truncates(settings[i]) for i in random])
    chosen = torch.empty(len(random), dtype=torch.long)
    if plain.any():
        chosen[plain] = _inverse(scaled[plain].softmax(dim=-1), uniform[plain]).cpu()
    if not plain.all():
        cut = ~plain
        kept = [settings[i] for i, p in zip(random, plain.tolist(), strict=True) if not p]
        mass, ids = _truncated(scaled[cut], kept)
        position = _inverse(mass, uniform[cut])
        chosen[cut] = ids.gather(1, position[:, None])[:, 0].cpu()
    tokens[random] = chosen.to(tokens.device)
    return tokens.tolist()


def distributions(adjusted: Tensor, rows: SequenceOf[Row]) -> Tensor:
    """The laws ``[rows, vocabulary]`` that :func:`draw` draws from; greedy ones are one-hot."""
    settings = [row.sequence.request.sampling for row in rows]
    laws = torch.zeros_like(adjusted)
    greedy = [i for i, s in enumerate(settings) if is_greedy(s)]
    laws[greedy, _most_likely(adjusted[greedy])] = 1.0
    plain = [i for i, s in enumerate(settings) if not is_greedy(s) and not _truncates(s)]
    laws[plain] = _scaled(adjusted, settings, plain).softmax(dim=-1)
    cut = [i for i, s in enumerate(settings) if not is_greedy(s) and _truncates(s)]
    if cut:
        scaled = _scaled(adjusted, settings, cut)
        mass, ids = _truncated(scaled, [settings[i] for i in cut])
        laws[cut] = torch.zeros_like(scaled).scatter_(1, ids, mass)
    return laws


def _most_likely(logits: Tensor) -> Tensor:
    """The first of the largest of each row: NumPy's, where it can be, is 15 times as fast."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def _scaled(adjusted: Tensor, settings: list[SamplingParameters], rows: list[int]) -> Tensor:
    temperature = torch.tensor([settings[i].temperature for i in rows])
    return adjusted[rows] / temperature[:, None].to(adjusted.device)


def _truncates(sampling: SamplingParameters) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


def _truncated(logits: Tensor, settings: SequenceOf[SamplingParameters]) -> tuple[Tensor, Tensor]:
    """Probabilities and ids of the tokens that top-k, top-p and min-p leave, 0 for the others.

    ``logits`` is ``[rows, vocabulary]``; both results have as many columns as were looked at. Each
    limit is applied to the distribution that the one before it left, as in transformers.
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
    return kept / kept.sum(dim=-1, keepdim=True), ids


def _inverse(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Index at which each row's cumulative distribution passes its uniform number."""
    # Double precision: in single precision the tail of a large vocabulary adds up to nothing.
    cumulative = probabilities.double().cumsum(dim=-1)
    target = uniform.to(cumulative.device)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # Rounding may push the target to the very end; the last token with any mass is meant then.
    last = probabilities.shape[1] - 1 - (probabilities > 0).flip(-1).int().argmax(dim=-1)
    return torch.minimum(index, last)
