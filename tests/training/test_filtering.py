import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.training.errors import DataError
from anabranch.training.example import Example
from anabranch.training.filtering import RowPolicy, filter_rows


def row(length: int, trained: set[int], source: str = "rows.jsonl:1"):
    return (Example(list(range(length)), [i in trained for i in range(length)], source=source),)


LONG = row(10, {3, 8}, "rows.jsonl:2")
SHORT = row(4, {2, 3})


def test_overlong_rows_are_an_error_that_names_them():
    with pytest.raises(DataError, match=r"rows\.jsonl:2 is longer than max_length \(5 tokens.* 10"):
        filter_rows([SHORT, LONG], RowPolicy(max_length=5))


def test_drop_is_counted():
    prepared = filter_rows([SHORT, LONG], RowPolicy(5, "drop"))
    assert prepared.items == [SHORT]
    assert prepared.dropped == {"longer than max_length": 1}


def test_truncate_keeps_the_beginning():
    prepared = filter_rows([LONG], RowPolicy(5, "truncate"))
    assert list(prepared.items[0][0].tokens) == [0, 1, 2, 3, 4]
    assert prepared.dropped == {"truncated": 1}


def test_truncation_that_leaves_nothing_to_train_is_an_error():
    with pytest.raises(DataError, match="in its first 5"):
        filter_rows([row(10, {8})], RowPolicy(5, "truncate"))


@given(st.integers(2, 40), st.integers(2, 12), st.data())
def test_split_predicts_every_trained_token_once_after_its_own_past(length, limit, data):
    trained = data.draw(st.sets(st.integers(1, length - 1), min_size=1))
    prepared = filter_rows([row(length, trained)], RowPolicy(limit, "split"))
    found = []
    for (piece,) in prepared.items:
        assert 2 <= len(piece) <= limit
        tokens = list(piece.tokens)
        assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))
        found += [t for t, mark in zip(tokens, piece.trained, strict=True) if mark]
    assert sorted(found) == sorted(trained)
    assert prepared.dropped.get("split", 0) == (length > limit)


def test_pairs_are_not_split():
    with pytest.raises(DataError, match="compared as wholes"):
        filter_rows([LONG + LONG], RowPolicy(5, "split"))


def test_rows_without_a_trained_token():
    empty = row(4, set(), "rows.jsonl:7")
    with pytest.raises(DataError, match=r"rows\.jsonl:7 is without a token to train on"):
        filter_rows([SHORT, empty], RowPolicy())
    prepared = filter_rows([SHORT, empty], RowPolicy(untrained="drop"))
    assert prepared.items == [SHORT]
    assert prepared.dropped == {"no token to train on": 1}


def test_a_pair_needs_trained_tokens_on_both_sides():
    with pytest.raises(DataError, match="without a token"):
        filter_rows([SHORT + row(4, set())], RowPolicy())


def test_an_item_must_fit_in_a_forward_pass():
    with pytest.raises(DataError, match="raise micro_batch_tokens to 20"):
        filter_rows([LONG + SHORT], RowPolicy(max_item_tokens=19))
    assert filter_rows([LONG + SHORT], RowPolicy(max_item_tokens=20)).items


def test_many_rows_are_counted_and_the_first_named():
    rows = [row(9, {1}, f"r:{i}") for i in range(8)]
    with pytest.raises(DataError, match=r"8 rows \(r:0, r:1, r:2, r:3, r:4, \.\.\.\) are longer"):
        filter_rows(rows, RowPolicy(5))


def test_no_rows():
    assert filter_rows([], RowPolicy(5, "drop")).items == []
