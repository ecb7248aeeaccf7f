"""Rows against loops in plain Python and against closed forms."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anabranch.errors import AnabranchError, InvalidRequest, RequestFailed
from anabranch.serving.contrast import UncertaintyContrast, certainty

INF, NAN = float("inf"), float("nan")


def random_laws(rows: int, vocabulary: int, seed: int, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(rows, vocabulary, generator=generator)).softmax(-1)


def mixed_by_loop(
    contrast: UncertaintyContrast, standard: Tensor, lame: Tensor
) -> list[list[float]]:
    """The definition, token by token, in double precision."""
    rows = []
    for p, q in zip(standard.tolist(), lame.tolist(), strict=True):
        mean = 1 / len(p)
        kept = [
            max(a + contrast.weight * b, 0.0) if a >= contrast.filter_ratio * mean else 0.0
            for a, b in zip(p, q, strict=True)
        ]
        if not any(value > 0 for value in kept):
            kept = p
        rows.append([math.log(value) if value > 0 else -INF for value in kept])
    return rows


shapes = st.tuples(st.integers(1, 4), st.integers(2, 40), st.integers(0, 10_000))


@given(
    shapes,
    st.floats(-2.0, 0.0),
    st.floats(0.0, 1.5),
    st.floats(0.1, 8.0),
)
@settings(max_examples=150, deadline=None)
def test_the_mix_is_that_of_a_loop(
    shape: tuple[int, int, int], weight: float, ratio: float, spread: float
) -> None:
    rows, vocabulary, seed = shape
    contrast = UncertaintyContrast(weight=weight, filter_ratio=ratio)
    standard = random_laws(rows, vocabulary, seed, spread)
    lame = random_laws(rows, vocabulary, seed + 1, spread)
    expected = torch.tensor(mixed_by_loop(contrast, standard, lame), dtype=torch.float64)
    actual = contrast.mix(standard, lame)
    assert actual.dtype == torch.float32
    # Compared as weights: where p and 0.7 q nearly cancel, logarithms amplify rounding.
    torch.testing.assert_close(actual.double().exp(), expected.exp(), atol=1e-6, rtol=1e-5)


@given(shapes, st.floats(0.0, 1.2), st.floats(0.1, 8.0))
@settings(max_examples=100, deadline=None)
def test_uncertain_rows_are_those_of_a_loop(
    shape: tuple[int, int, int], threshold: float, spread: float
) -> None:
    laws = random_laws(*shape, spread)
    found = UncertaintyContrast(threshold=threshold).uncertain(laws).tolist()
    for law, unsure in zip(laws.tolist(), found, strict=True):
        c = statistics.stdev(law) * math.sqrt(len(law))
        if abs(c - threshold) > 1e-5:
            assert unsure == (c < threshold)


@pytest.mark.parametrize("vocabulary", [2, 256, 49_152])
def test_certainty_is_0_for_uniform_and_1_for_one_hot_rows(
    vocabulary: int,
) -> None:
    one_hot = torch.zeros(1, vocabulary)
    one_hot[0, vocabulary // 2] = 1.0
    assert certainty(one_hot).item() == pytest.approx(1.0, abs=1e-5)
    assert certainty(torch.full((1, vocabulary), 1 / vocabulary)).item() == pytest.approx(
        0, abs=1e-5
    )


def test_certainty_is_the_collision_probability_in_disguise() -> None:
    laws = random_laws(5, 300, 1)
    collision = laws.double().square().sum(-1)
    squared = 300 / 299 * (collision - 1 / 300)
    torch.testing.assert_close(certainty(laws).double().square(), squared, atol=1e-6, rtol=1e-5)


def test_the_default_is_the_threshold_of_the_paper_at_its_vocabulary() -> None:
    laws = random_laws(200, 32_000, 3, spread=6.0)
    expected = laws.std(-1) < 0.005
    assert torch.equal(UncertaintyContrast().uncertain(laws), expected)
    assert 0 < expected.sum() < 200


def test_threshold_0_never_contrasts_and_2_always_does() -> None:
    laws = torch.cat([random_laws(6, 50, 2), torch.full((1, 50), 0.02), torch.eye(50)[:1]])
    assert not UncertaintyContrast(threshold=0.0).uncertain(laws).any()
    assert UncertaintyContrast(threshold=2.0).uncertain(laws).all()


def test_weight_0_gives_the_filtered_standard_law() -> None:
    standard, lame = random_laws(4, 60, 5), random_laws(4, 60, 6)
    logits = UncertaintyContrast(weight=0.0).mix(standard, lame)
    filtered = standard.masked_fill(standard < (2 / 3) / 60, 0.0)
    assert torch.equal(logits, filtered.log())
    unfiltered = UncertaintyContrast(weight=0.0, filter_ratio=0.0).mix(standard, lame)
    assert torch.equal(unfiltered, standard.log())


def test_where_nothing_is_left_the_standard_row_decides_and_other_rows_are_mixed() -> None:
    standard = torch.tensor([[0.6, 0.2, 0.2], [0.5, 0.4, 0.1]])
    lame = torch.tensor([[0.6, 0.2, 0.2], [0.9, 0.05, 0.05]])
    logits = UncertaintyContrast(weight=-1.5).mix(standard, lame)
    assert torch.equal(logits[0], standard[0].log())
    assert logits[1].exp().tolist() == pytest.approx([0.0, 0.4 - 0.075, 0.0])


def test_a_masked_token_stays_masked() -> None:
    standard = torch.tensor([[2.0, 1.0, -INF, 0.0]]).softmax(-1)
    for weight in (0.0, -0.7):
        logits = UncertaintyContrast(weight=weight, filter_ratio=0.0).mix(
            standard, torch.full((1, 4), 0.25)
        )
        assert logits[0, 2] == -INF
        assert logits[0, 0] > -INF


def test_rows_do_not_see_each_other() -> None:
    contrast = UncertaintyContrast()
    standard, lame = random_laws(5, 30, 8), random_laws(5, 30, 9)
    single = torch.cat([contrast.mix(standard[i : i + 1], lame[i : i + 1]) for i in range(5)])
    assert torch.equal(contrast.mix(standard, lame), single)


def test_no_rows_and_a_vocabulary_of_one() -> None:
    contrast = UncertaintyContrast()
    assert contrast.mix(torch.empty(0, 7), torch.empty(0, 7)).shape == (0, 7)
    assert contrast.uncertain(torch.empty(0, 7)).shape == (0,)
    assert contrast.uncertain(torch.ones(2, 1)).tolist() == [False, False]


@pytest.mark.parametrize("bad", [NAN, INF, -0.1])
def test_rows_that_are_no_law_are_named(bad: float) -> None:
    laws = random_laws(3, 8, 1)
    broken = laws.clone()
    broken[1, 3] = bad
    contrast = UncertaintyContrast()
    for call in (
        lambda: contrast.uncertain(broken),
        lambda: contrast.mix(broken, laws),
        lambda: contrast.mix(laws, broken),
    ):
        with pytest.raises(RequestFailed, match=r"rows \[1\]"):
            call()


def test_laws_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        UncertaintyContrast().mix(random_laws(1, 8, 1), random_laws(1, 9, 1))
    with pytest.raises(ValueError, match=r"\[rows, V\]"):
        certainty(torch.ones(3))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weight", 0.1),
        ("weight", NAN),
        ("weight", -INF),
        ("threshold", -0.1),
        ("threshold", NAN),
        ("filter_ratio", -1.0),
        ("filter_ratio", NAN),
        ("filter_ratio", INF),
    ],
)
def test_impossible_settings_name_their_field(field: str, value: float) -> None:
    with pytest.raises(InvalidRequest) as caught:
        UncertaintyContrast(**{field: value})
    assert caught.value.field == f"contrast.{field}"
    assert isinstance(caught.value, AnabranchError | ValueError)


def test_a_positive_weight_is_called_what_it_is() -> None:
    with pytest.raises(ValueError, match="ensembling"):
        UncertaintyContrast(weight=0.5)
