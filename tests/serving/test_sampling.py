"""Sampling against brute force and against transformers' own logits processors."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from anabranch.serving import sampling
from anabranch.serving.sequence import Sequence
from tests.serving.helpers import Scripted, make_sequence, sample

NAN, INFINITY = float("nan"), float("inf")


def tokens_of(logits: Tensor, sequences: list[Sequence]) -> list[int | None]:
    return [None if s is None else s.token for s in sample(logits, sequences)]


def distinct_logits(vocabulary: int, seed: int, spread: float = 4.0) -> Tensor:
    """A shuffled row without ties, so that no limit has to choose between equals."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.linspace(-spread / 2, spread / 2, vocabulary)
    row += torch.rand(vocabulary, generator=generator) * spread / vocabulary / 3
    return row[torch.randperm(vocabulary, generator=generator)]


def drawn_shares(row: Tensor, points: int, **parameters: Any) -> Tensor:
    """Tokens drawn by ``points`` evenly spaced uniform numbers, counted.

    Every token owns one interval of uniform numbers, so its count is within 1 of its probability
    times ``points``: the distribution is read off exactly, without randomness.
    """
    sequences = [make_sequence(**parameters) for _ in range(points)]
    for i, sequence in enumerate(sequences):
        sequence.random = Scripted([(i + 0.5) / points])  # type: ignore[assignment]
    drawn = torch.tensor(tokens_of(row.expand(points, -1), sequences))
    return torch.bincount(drawn, minlength=len(row))


def warped_by_transformers(
    row: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    scores = row.double()[None] / temperature
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1.0:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    return scores.softmax(-1)[0]


def is_decided(row: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> bool:
    """Whether single precision cannot move a token across a limit."""
    scores = (row.double() / temperature).sort(descending=True).values
    probabilities = scores[: top_k or None].softmax(-1)
    cumulative = probabilities.cumsum(-1)
    by_top_p = (cumulative - top_p).abs().min() > 1e-5 or top_p == 1.0
    ratio = probabilities / probabilities[0]
    by_min_p = (ratio - min_p).abs().min() > 1e-5 or min_p == 0.0
    return bool(by_top_p) and bool(by_min_p)


def assert_same_distribution(counts: Tensor, expected: Tensor) -> None:
    points = int(counts.sum())
    assert set(counts.nonzero().flatten().tolist()) <= set(expected.nonzero().flatten().tolist())
    unseen = (counts == 0) & (expected * points > 1.001)
    assert not unseen.any(), f"tokens {unseen.nonzero().flatten().tolist()} are never drawn"
    worst = (counts - expected * points).abs().max()
    assert worst <= 1.01, f"a token's count is off by {worst}"


class TestGreedy:
    @pytest.mark.parametrize("temperature", [0.0, 1e-9, sampling.GREEDY_BELOW])
    def test_takes_the_argmax(self, temperature: float) -> None:
        logits = torch.randn(20, 50) * 3
        sequences = [make_sequence(temperature=temperature, top_p=0.3, seed=i) for i in range(20)]
        assert tokens_of(logits, sequences) == logits.argmax(-1).tolist()

    @pytest.mark.parametrize("parameters", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
    def test_is_the_limit_of_small_temperatures(self, parameters: dict[str, Any]) -> None:
        logits = torch.randn(50, 50) * 3
        sequences = [make_sequence(temperature=1.1e-5, seed=i, **parameters) for i in range(50)]
        assert tokens_of(logits, sequences) == logits.argmax(-1).tolist()

    def test_no_rows_need_no_tokens(self) -> None:
        assert sample(torch.empty(0, 10), []) == []

    def test_half_precision_logits_are_accepted(self) -> None:
        logits = torch.randn(4, 30).bfloat16()
        sequences = [make_sequence(temperature=0.0) for _ in range(4)]
        assert tokens_of(logits, sequences) == logits.float().argmax(-1).tolist()


class TestDistribution:
    @pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
    @pytest.mark.parametrize("truncated", [False, True])
    def test_draws_of_many_seeds_follow_the_softmax(
        self, temperature: float, truncated: bool
    ) -> None:
        draws, vocabulary = 6000, 7
        row = distinct_logits(vocabulary, seed=3, spread=2.0)
        limits = {"top_k": vocabulary - 1} if truncated else {}
        sequences = [make_sequence(temperature=temperature, seed=i, **limits) for i in range(draws)]
        drawn = torch.tensor(tokens_of(row.expand(draws, -1), sequences))
        expected = draws * warped_by_transformers(row, temperature, limits.get("top_k", 0), 1, 0)
        counts = torch.bincount(drawn, minlength=vocabulary)
        possible = expected > 0
        assert not counts[~possible].any()
        chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
        assert chi_square < 27.9  # 6 degrees of freedom, one false alarm in 10,000

    def test_draws_of_one_sequence_over_time_follow_the_softmax(self) -> None:
        row = distinct_logits(5, seed=1, spread=2.0)
        sequence = make_sequence(seed=11)
        counts = torch.zeros(5)
        for _ in range(2000):
            (token,) = tokens_of(row[None], [sequence])
            counts[token] += 1
            sequence.append(token)
        expected = 2000 * row.softmax(-1)
        assert ((counts - expected) ** 2 / expected).sum() < 23.5  # 4 degrees of freedom

    @settings(deadline=None, max_examples=100)
    @given(
        vocabulary=st.integers(1, 60),
        candidates=st.integers(1, 30),
        temperature=st.floats(0.3, 2.0),
        top_k=st.integers(0, 70),
        top_p=st.one_of(st.just(1.0), st.floats(0.01, 1.0)),
        min_p=st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
        spread=st.floats(0.5, 8.0),
        seed=st.integers(0, 1000),
    )
    def test_limits_leave_the_same_distribution_as_in_transformers(
        self,
        vocabulary: int,
        candidates: int,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        spread: float,
        seed: int,
    ) -> None:
        row = distinct_logits(vocabulary, seed, spread)
        limits = (temperature, top_k, top_p, min_p)
        assume(is_decided(row, *limits))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling, "CANDIDATES", candidates)
            counts = drawn_shares(
                row, 1000, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
            )
        assert_same_distribution(counts, warped_by_transformers(row, *limits))

    @pytest.mark.parametrize(
        ("spread", "top_k", "top_p", "min_p"),
        [
            (0.1, 0, 0.9, 0.0),  # flat: the nucleus is larger than the candidates
            (0.1, 1600, 1.0, 0.0),
            (0.1, 1600, 0.9, 0.0),  # the nucleus is a share of what top-k left
            (4.0, 1600, 0.95, 0.0),
            (4.0, 1600, 0.95, 0.2),
            (2.0, 0, 0.999, 0.5),
            (8.0, 1600, 0.95, 0.0),  # the candidates hold that share of everything, but not of them
            (8.0, 1600, 0.97, 0.03),
            (20.0, 0, 0.9005, 0.0),  # peaked: the candidates are enough
            (20.0, 0, 1.0, 0.01),
            (2.0, 40, 0.9, 0.1),
        ],
    )
    def test_limits_beyond_the_candidates(
        self, spread: float, top_k: int, top_p: float, min_p: float
    ) -> None:
        row = distinct_logits(2 * sampling.CANDIDATES, seed=5, spread=spread)
        limits = (1.0, top_k, top_p, min_p)
        assert is_decided(row, *limits)
        counts = drawn_shares(row, 2500, top_k=top_k, top_p=top_p, min_p=min_p)
        assert_same_distribution(counts, warped_by_transformers(row, *limits))

    def test_a_limit_that_is_off_keeps_improbable_tokens(self) -> None:
        row = torch.tensor([0.0, -18.0, -19.0, -20.0])  # the tail is below single precision's 1
        sequence = make_sequence(top_k=3)
        sequence.random = Scripted([1 - 2**-53])  # type: ignore[assignment]
        assert tokens_of(row[None], [sequence]) == [2]

    @pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
    @pytest.mark.parametrize("limits", [{}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.01}])
    def test_masked_tokens_are_never_drawn(self, uniform: float, limits: dict[str, Any]) -> None:
        row = torch.full((30,), -INFINITY)
        row[[7, 11]] = 0.0
        sequence = make_sequence(**limits)
        sequence.random = Scripted([uniform])  # type: ignore[assignment]
        assert tokens_of(row[None], [sequence])[0] in (7, 11)

    @pytest.mark.parametrize("limits", [{}, {"top_p": 0.9999}])
    def test_the_tail_of_a_large_vocabulary_adds_up(self, limits: dict[str, Any]) -> None:
        """Half of the mass is spread over 100,000 tokens that are nothing one by one."""
        row = torch.zeros(100_001)
        row[0] = math.log(100_000)
        sequences = [make_sequence(**limits) for _ in range(9)]
        for i, sequence in enumerate(sequences, start=1):
            sequence.random = Scripted([i / 10 + 0.01])  # type: ignore[assignment]
        drawn = tokens_of(row.expand(9, -1), sequences)
        assert [token == 0 for token in drawn] == [True] * 4 + [False] * 5
        assert len(set(drawn[4:])) == 5


class TestSeeds:
    parameters = (
        {},
        {"temperature": 0.0},
        {"top_p": 0.8},
        {"top_k": 3},
        {"min_p": 0.05},
        {"top_k": 20, "top_p": 0.9},
        {"frequency_penalty": 1.0, "top_p": 0.95},
        {"repetition_penalty": 1.3},
        {"logit_bias": {3: 2.0}},
        {"temperature": 1.7, "top_p": 0.99},
    )

    def sequences(self) -> list[Sequence]:
        return [
            make_sequence(range(5), [6, 6], seed=i // 2, index=i % 2, **p)
            for i, p in enumerate(self.parameters)
        ]

    @pytest.mark.parametrize("candidates", [8, 1024])
    @pytest.mark.parametrize("tied", [False, True])
    def test_tokens_do_not_depend_on_batch_mates_or_their_order(
        self, candidates: int, tied: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sampling, "CANDIDATES", candidates)
        steps, rows = 12, len(self.parameters)
        logits = torch.randn(steps, rows, 40)
        if tied:  # as the logits of models in half precision often are
            logits = logits.round()

        def run(order: list[int], together: bool) -> dict[int, list[int | None]]:
            sequences = self.sequences()
            drawn: dict[int, list[int | None]] = {row: [] for row in order}
            for step in range(steps):
                for batch in [order] if together else [[row] for row in order]:
                    chosen = [sequences[row] for row in batch]
                    for row, token in zip(
                        batch, tokens_of(logits[step, batch], chosen), strict=True
                    ):
                        drawn[row].append(token)
            return drawn

        order = list(range(rows))
        alone = run(order, together=False)
        assert run(order, together=True) == alone
        for seed in range(5):
            random.Random(seed).shuffle(order)
            assert run(order, together=True) == alone

    def test_choices_of_one_request_differ(self) -> None:
        logits = torch.zeros(2, 10_000)
        choices = [make_sequence(seed=5, index=i) for i in range(2)]
        assert len(set(tokens_of(logits, choices))) == 2

    def test_requests_without_a_seed_differ(self) -> None:
        assert len(set(tokens_of(torch.zeros(9, 10_000), [make_sequence() for _ in range(9)]))) > 1


def penalised(
    row: list[float], prompt: list[int], output: list[int], parameters: dict[str, float]
) -> list[float]:
    result = []
    for token, logit in enumerate(row):
        value = logit
        if token in prompt or token in output:
            factor = parameters.get("repetition_penalty", 1.0)
            value = value / factor if value > 0 else value * factor
        value -= parameters.get("frequency_penalty", 0.0) * output.count(token)
        value -= parameters.get("presence_penalty", 0.0) * (token in output)
        result.append(value)
    return result


class TestPenalties:
    @settings(deadline=None, max_examples=60)
    @given(
        prompt=st.lists(st.integers(0, 9), min_size=1, max_size=12),
        output=st.lists(st.integers(0, 9), max_size=12),
        repetition=st.one_of(st.just(1.0), st.floats(0.5, 3.0)),
        frequency=st.one_of(st.just(0.0), st.floats(-2.0, 2.0)),
        presence=st.one_of(st.just(0.0), st.floats(-2.0, 2.0)),
        seed=st.integers(0, 1000),
    )
    def test_equal_a_plain_loop_at_every_step(
        self,
        prompt: list[int],
        output: list[int],
        repetition: float,
        frequency: float,
        presence: float,
        seed: int,
    ) -> None:
        parameters = {
            "repetition_penalty": repetition,
            "frequency_penalty": frequency,
            "presence_penalty": presence,
        }
        sequence = make_sequence(prompt, output, temperature=0.0, **parameters)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(6):
            row = torch.randn(10, generator=generator)
            before = row.clone()
            expected = penalised(row.tolist(), prompt, sequence.tokens[len(prompt) :], parameters)
            ranked = sorted(expected)
            token = tokens_of(row[None], [sequence])[0]
            assert token is not None
            assert expected[token] >= ranked[-1] - 1e-5
            assert torch.equal(row, before), "the model's logits were overwritten"
            sequence.append(token)

    def test_change_the_distribution_and_not_only_the_maximum(self) -> None:
        row = distinct_logits(10, seed=2)
        prompt, output = [0, 1, 2, 2], [2, 3, 3]
        parameters = {
            "repetition_penalty": 1.7,
            "frequency_penalty": 0.4,
            "presence_penalty": -0.9,
        }
        sequences = [make_sequence(prompt, output, **parameters) for _ in range(2000)]
        for i, sequence in enumerate(sequences):
            sequence.random = Scripted([(i + 0.5) / 2000])  # type: ignore[assignment]
        drawn = torch.tensor(tokens_of(row.expand(2000, -1), sequences))
        expected = torch.tensor(penalised(row.tolist(), prompt, output, parameters)).softmax(-1)
        assert_same_distribution(torch.bincount(drawn, minlength=10), expected)

    def test_frequency_and_presence_ignore_the_prompt(self) -> None:
        row = torch.tensor([[1.0, 0.9, 0.0]])
        in_prompt = make_sequence([0] * 9, temperature=0.0, frequency_penalty=2, presence_penalty=2)
        in_output = make_sequence([2], [0], temperature=0.0, presence_penalty=2)
        assert tokens_of(row.expand(2, -1), [in_prompt, in_output]) == [0, 1]

    def test_masked_tokens_stay_masked(self) -> None:
        row = torch.tensor([[-INFINITY, 0.0, -INFINITY]])
        sequence = make_sequence(
            [0, 1], [0, 1], temperature=0.0, repetition_penalty=10.0, frequency_penalty=2.0
        )
        assert tokens_of(row, [sequence]) == [1]

    def test_rows_without_penalties_are_untouched(self) -> None:
        row = distinct_logits(10, seed=4)
        best = int(row.argmax())
        plain = make_sequence([best], temperature=0.0)
        punished = make_sequence([best], [best], temperature=0.0, frequency_penalty=2.0)
        assert tokens_of(row.expand(2, -1), [plain, punished])[0] == best
        assert plain.token_counts is None


class TestBias:
    @pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
    def test_100_forces_and_minus_100_bans(self, temperature: float) -> None:
        logits = torch.randn(200, 12)
        best = logits.argmax(-1).tolist()
        forced = [make_sequence(temperature=temperature, logit_bias={5: 100}) for _ in best]
        assert tokens_of(logits, forced) == [5] * 200
        banned = [
            make_sequence(temperature=temperature, logit_bias={b: -100, (b + 1) % 12: -100.0})
            for b in best
        ]
        for token, b in zip(tokens_of(logits, banned), best, strict=True):
            assert token not in (b, (b + 1) % 12)

    def test_is_added_to_the_logits(self) -> None:
        row = distinct_logits(10, seed=6)
        bias = {0: 1.5, 3: -0.7, 9: 0.25}
        expected = row.clone()
        for token, value in bias.items():
            expected[token] += value
        counts = drawn_shares(row, 2000, logit_bias=bias)
        assert_same_distribution(counts, expected.softmax(-1))

    def test_comes_before_the_penalties(self) -> None:
        """A biased logit of 4 - 5 < 0 is multiplied; shrunk first, 4 / 2 - 5 would lose."""
        row = torch.tensor([[4.0, -2.5]])
        parameters = {"repetition_penalty": 2.0, "temperature": 0.0, "logit_bias": {0: -5.0}}
        assert tokens_of(row, [make_sequence([0], **parameters)]) == [0]  # -2 against -2.5

    def test_cannot_revive_a_masked_token(self) -> None:
        row = torch.tensor([[-INFINITY, 0.0]])
        assert tokens_of(row, [make_sequence(logit_bias={0: 100})]) == [1]


class TestLogprobs:
    def test_are_those_of_the_raw_logits(self) -> None:
        logits = torch.randn(4, 30) * 4
        sequences = [
            make_sequence(
                [1],
                [2],
                logprobs=k,
                temperature=0.5,
                top_k=10,
                frequency_penalty=1.0,
                logit_bias={4: 3.0},
            )
            for k in (0, 1, 5, 20)
        ]
        expected = logits.log_softmax(-1)
        for row, k, sampled in zip(expected, (0, 1, 5, 20), sample(logits, sequences), strict=True):
            assert sampled is not None
            assert sampled.logprob == pytest.approx(float(row[sampled.token]), abs=1e-5)
            ranked = sorted(enumerate(row.tolist()), key=lambda pair: -pair[1])[:k]
            assert [token for token, _ in sampled.top] == [token for token, _ in ranked]
            assert [value for _, value in sampled.top] == pytest.approx([v for _, v in ranked])

    def test_are_absent_unless_asked_for(self) -> None:
        asked, silent = sample(torch.zeros(2, 5), [make_sequence(logprobs=0), make_sequence()])
        assert asked is not None and asked.logprob == pytest.approx(-math.log(5))
        assert silent is not None and silent.logprob is None and silent.top == ()

    def test_of_a_vocabulary_smaller_than_their_number(self) -> None:
        (sampled,) = sample(torch.zeros(1, 5), [make_sequence(logprobs=20)])
        assert sampled is not None and len(sampled.top) == 5


class TestUnhealthyRows:
    @pytest.mark.parametrize("bad", [NAN, INFINITY])
    @pytest.mark.parametrize("whole", [False, True])
    @pytest.mark.parametrize("candidates", [4, 1024])
    def test_are_none_and_leave_the_others_alone(
        self, bad: float, whole: bool, candidates: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sampling, "CANDIDATES", candidates)
        parameters = [*TestSeeds.parameters, {"logprobs": 3}]
        logits = torch.randn(2 * len(parameters), 20)
        good = [make_sequence([1], [2], seed=1, **p) for p in parameters]
        expected = tokens_of(
            logits[::2], [make_sequence([1], [2], seed=1, **p) for p in parameters]
        )
        mixed = [s for g, p in zip(good, parameters, strict=True) for s in (g, make_sequence(**p))]
        if whole:
            logits[1::2] = bad
        else:
            logits[1::2, 13] = bad
        drawn = tokens_of(logits, mixed)
        assert drawn[1::2] == [None] * len(parameters)
        assert drawn[::2] == expected

    def test_a_fully_masked_row_is_none(self) -> None:
        logits = torch.zeros(2, 8)
        logits[0] = -INFINITY
        for parameters in TestSeeds.parameters:
            drawn = tokens_of(logits, [make_sequence(**parameters) for _ in range(2)])
            assert drawn[0] is None and drawn[1] is not None

    def test_a_token_that_was_not_sampled_is_not_counted(self) -> None:
        sequence = make_sequence([1], [2, 2], frequency_penalty=1.0)
        assert tokens_of(torch.full((1, 4), NAN), [sequence]) == [None]
        assert sequence.token_counts is not None
        assert sequence.token_counts[1].tolist() == [0, 0, 2, 0]
