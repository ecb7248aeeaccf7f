"""Rated texts: reading the archive, drawing, the stand-in, and simulated labelling."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from anabranch.evaluation import package_archive, polarity
from anabranch.evaluation.labelling import full_assignment, rejection
from anabranch.evaluation.polarity import (
    DOMAINS,
    LABELS,
    RatedText,
    made_texts,
    rated_texts,
    stratified,
)
from anabranch.models.cache import file_sha256
from anabranch.training.errors import DataError


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path))


def packed(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    path = tmp_path / "data" / polarity._ARCHIVE
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    monkeypatch.setattr(polarity, "_SHA256", file_sha256(path))


def test_the_archive_is_read_with_each_raters_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {}
    for stem in DOMAINS.values():
        files[f"hutto_ICWSM_2014/{stem}_GroundTruth.txt"] = b"1_1\t0.6\tso\tso\n2\t-2\tbad\n"
        files[f"hutto_ICWSM_2014/{stem}_anonDataRatings.txt"] = (
            b"\xef\xbb\xbf1_1\t0.6\t1\t[1, 1, -1, 0]\n2\t-2\t0\t[-2, -2]\n"
        )
    stored(tmp_path, monkeypatch, packed({polarity._INNER: packed(files)}))
    found = rated_texts()
    assert len(found) == 8
    assert found[0] == RatedText(
        "so\tso", "tweets", "neutral", ("positive", "positive", "negative", "neutral")
    )
    assert found[1].label == "negative"


def test_a_damaged_archive_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(tmp_path, monkeypatch, b"no archive")
    with pytest.raises(DataError, match="delete it to fetch it again"):
        rated_texts()


def test_without_archive_and_pip_the_message_says_where_to_put_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(package_archive.sys, "executable", "/nowhere/python")
    with pytest.raises(DataError, match=r"put the file at .*vaderSentiment"):
        rated_texts()


def test_polarity_has_a_neutral_band() -> None:
    assert [polarity.polarity(x) for x in (-4, -0.51, -0.5, 0, 0.5, 0.51)] == [
        "negative", "negative", "neutral", "neutral", "neutral", "positive",
    ]  # fmt: skip


def test_drawing_takes_as_many_from_every_domain() -> None:
    texts = [RatedText(f"{d} {i}", d, "neutral", ("neutral",)) for d in "abc" for i in range(9)]
    drawn = stratified(texts, 10, seed=3)
    assert sorted(Counter(t.domain for t in drawn).values()) == [3, 3, 4]
    assert len({t.text for t in drawn}) == 10
    assert drawn == stratified(texts, 10, seed=3)
    with pytest.raises(DataError, match="28 texts are wanted, there are 27"):
        stratified(texts, 28, seed=0)


def test_stand_ins_have_all_labels_and_raters() -> None:
    made = made_texts(60, seed=0)
    assert {text.label for text in made} == set(LABELS)
    assert all(len(text.ratings) == 15 for text in made)


def test_rejecting_costs_less_than_assigning_and_finds_the_labels() -> None:
    truth = {f"text {i}": LABELS[i % 3] for i in range(200)}
    full = full_assignment(truth, LABELS, 0.0, seed=0)
    assert (full.clicks, full.quality) == (200, 1.0)
    ours = rejection(truth, LABELS, (0.2, 0.3, 0.4), 0.0, seed=0)
    assert ours.quality == 1.0
    assert ours.clicks < 0.6 * full.clicks
    assert len(truth) <= ours.judged < 2 * len(truth)
    perfect = rejection(truth, LABELS, (0.0,), 0.0, seed=0)
    assert (perfect.clicks, perfect.judged) == (10, 200)  # ten pages
    incomplete = rejection(truth, LABELS, (0.5,), 0.0, seed=0, complete=False)
    assert 0.35 < incomplete.quality < 0.65
    erring = full_assignment(truth, LABELS, 0.3, seed=0)
    assert 0.6 < erring.quality < 0.8
