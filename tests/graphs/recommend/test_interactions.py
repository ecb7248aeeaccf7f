"""Interactions: merging, splitting, reading, and what is refused."""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from anabranch.graphs.recommend import (
    Interactions,
    RecommendError,
    as_interactions,
    read_interactions,
)
from anabranch.graphs.recommend.interactions import How, require_disjoint
from tests.graphs.recommend.samples import PLANTED, interactions


def pairs(of: Interactions) -> set[tuple[int, int]]:
    return set(zip(of.user.tolist(), of.item.tolist(), strict=True))


def test_a_repeated_pair_counts_once_with_its_last_time() -> None:
    user, item, time = [1, 0, 1, 1], [2, 0, 2, 2], [5.0, 1.0, 9.0, 7.0]
    found = Interactions.from_pairs(user, item, time=time, rating=[1, 2, 3, 4])
    assert (found.num_users, found.num_items, len(found), found.merged) == (2, 3, 2, 2)
    assert found.time is not None
    assert found.rating is not None
    assert found.time.tolist() == [1.0, 9.0]
    assert found.rating.tolist() == [2.0, 3.0]
    untimed = Interactions.from_pairs(user, item, rating=[1, 2, 3, 4])
    assert untimed.rating is not None
    assert untimed.rating.tolist() == [2.0, 4.0], "the one given last"


@settings(max_examples=30)
@given(interactions())
def test_views_agree_with_the_pairs(found: Interactions) -> None:
    dense = np.zeros((found.num_users, found.num_items))
    for user, item in pairs(found):
        dense[user, item] = 1
    np.testing.assert_array_equal(found.csr().toarray(), dense)
    np.testing.assert_array_equal(found.user_degree, dense.sum(axis=1))
    np.testing.assert_array_equal(found.popularity(), dense.sum(axis=0))
    assert [row.tolist() for row in found.by_user()] == [
        np.flatnonzero(row).tolist() for row in dense
    ]
    again = as_interactions(sparse.csr_array(dense))
    assert pairs(again) == pairs(found)
    assert again.fingerprint() == found.fingerprint()
    assert pairs(as_interactions(dense)) == pairs(found)


@settings(max_examples=40)
@given(interactions(), st.sampled_from(["random", "per_user", "time"]), st.integers(0, 3))
def test_a_split_divides_and_a_seed_repeats_it(found: Interactions, how: How, seed: int) -> None:
    if how == "time" and found.time is None:
        with pytest.raises(RecommendError, match="needs times"):
            found.split(how)
        return
    train, test = found.split(how, 0.3, seed)
    assert pairs(train) | pairs(test) == pairs(found)
    assert not pairs(train) & pairs(test)
    assert (train.part, test.part) == ("train", "test")
    assert pairs(found.split(how, 0.3, seed)[1]) == pairs(test)
    if how == "per_user":
        np.testing.assert_array_equal(test.user_degree, np.floor(0.3 * found.user_degree))
    else:
        assert len(test) == round(0.3 * len(found))
    if how == "time" and len(test) and len(train):
        assert train.time is not None
        assert test.time is not None
        assert train.time.max() <= test.time.min()


def test_compact_drops_idle_ids_and_keeps_names() -> None:
    rated = Interactions.from_pairs(["b", "a", "c"], [7, 3, 9], rating=[5, 4, 1], relabel=True)
    found = rated.rated_at_least(4).compact()
    assert found.user_ids is not None
    assert found.item_ids is not None
    assert found.user_ids[found.user].tolist() == ["a", "b"]
    assert found.item_ids[found.item].tolist() == [3, 7]
    assert (found.num_users, found.num_items) == (2, 2)
    joined = found.joined(found)
    assert (len(joined), joined.merged) == (2, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Interactions.from_pairs([0, -1], [0, 0]), "interaction 1: user -1"),
        (lambda: Interactions([0, 3], [0, 0], 2, 1), "user 3 is outside 0..1"),  # type: ignore[arg-type]
        (lambda: Interactions.from_pairs([0, 1.5], [0, 0]), "user 1.5 is no row number"),
        (lambda: Interactions.from_pairs([0], [0, 1]), "1 users for 2 items"),
        (lambda: Interactions.from_pairs([0], [0], time=[np.nan]), "the time is nan"),
        (lambda: Interactions.from_pairs([0], [0], rating=["x"]), "a rating is no number"),
        (lambda: Interactions.from_pairs([0], [0], time=[1, 2]), "shape"),
        (lambda: Interactions.from_pairs(["a"], ["b"], num_users=3), "do not pass it"),
        (lambda: as_interactions(np.array([[-1.0]])), "entry (0, 0)"),
        (lambda: PLANTED.split(test=1.0), "test = 1.0"),
        (lambda: PLANTED.split("other"), "choose 'random'"),  # type: ignore[arg-type]
        (lambda: PLANTED.rated_at_least(3), "no ratings"),
        (lambda: require_disjoint(PLANTED, PLANTED), "are trained on"),
        (lambda: require_disjoint(PLANTED, as_interactions(np.ones((2, 2)))), "do not belong"),
    ],
)
def test_what_is_refused(make: Any, message: str) -> None:
    with pytest.raises(RecommendError) as refused:
        make()
    assert message in str(refused.value)


def test_no_interactions_are_legal() -> None:
    nothing = Interactions.from_pairs([], [])
    assert (len(nothing), nothing.num_users, nothing.num_items) == (0, 0, 0)
    assert nothing.csr().shape == (0, 0)
    assert nothing.by_user() == []


WANTED = {("u1", "i2"), ("u1", "i1"), ("u2", "i1")}


def named(found: Interactions) -> set[tuple[Any, Any]]:
    assert found.user_ids is not None
    assert found.item_ids is not None
    users, items = found.user_ids[found.user], found.item_ids[found.item]
    return set(zip(users.tolist(), items.tolist(), strict=True))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "u1,i2\nu1,i1\nu2,i1\n"),
        ("b.csv", "rating,item,user\n5,i2,u1\n4,i1,u1\n\n3,i1,u2\n"),
        ("c.tsv", "u1\ti2\t5\t100\nu1\ti1\t4\t50\nu2\ti1\t3\t70\n"),
        ("d.inter", "user_id:token\titem_id:token\trating:float\nu1\ti2\t5\nu1\ti1\t4\nu2\ti1\t3"),
        ("e.txt", "u1 i2 i1\nu2 i1\nu3\n"),
    ],
)
def test_text_files(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    found = read_interactions(tmp_path / name)
    assert named(found) == WANTED
    packed = tmp_path / f"{name}.xz"
    packed.write_bytes(lzma.compress(text.encode()))
    assert named(read_interactions(packed)) == WANTED
    if name in ("b.csv", "c.tsv", "d.inter"):
        assert found.rating is not None
        assert sorted(found.rating.tolist()) == [3, 4, 5]


def test_numpy_and_scipy_files_and_numbers_as_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", user=[0, 4], item=[1, 1], num_users=6)
    found = read_interactions(tmp_path / "a.npz")
    assert (found.num_users, found.num_items, found.user_ids) == (6, 2, None)
    sparse.save_npz(tmp_path / "b.npz", sparse.csr_array(np.eye(3)))
    assert pairs(read_interactions(tmp_path / "b.npz")) == {(0, 0), (1, 1), (2, 2)}
    (tmp_path / "c.csv").write_text("10,7\n20,7\n")
    assert read_interactions(tmp_path / "c.csv").num_users == 2
    assert read_interactions(tmp_path / "c.csv", relabel=False).num_users == 21


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"item_id": ["i2", "i1", "i1"], "user_id": ["u1", "u1", "u2"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert named(read_interactions(tmp_path / "a.parquet")) == WANTED


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"u1\n", "line 1"),
        ("b.csv", b"u1,i1\nu2,i2,3\n", "line 2"),
        ("c.csv", b"\xff\xfe\x00", "cannot be read"),
        ("d.json", b"{}", "are read from"),
        ("e.npz", b"PK", "cannot be read"),
        ("f.csv.xz", b"no", "cannot be read"),
        ("g.csv", b"u,i,r\nu1,i1,x\n", "no number"),
    ],
)
def test_damaged_files_are_refused_by_name(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecommendError, match=message) as refused:
        read_interactions(tmp_path / name)
    assert name in str(refused.value)
    with pytest.raises(RecommendError, match="there is no file"):
        read_interactions(tmp_path / "missing.csv")
    (tmp_path / "empty.csv").write_text("")
    assert len(read_interactions(tmp_path / "empty.csv")) == 0
