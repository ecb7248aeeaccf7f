"""Reading, cleaning, dividing and decontaminating rows."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import AnabranchError, ConfigurationError, UnknownName
from anabranch.training.data import Prepared, prepare
from anabranch.training.data.contamination import BOILERPLATE, Passage, find_overlap
from anabranch.training.data.minhash import NearDuplicates, jaccard, shingles
from anabranch.training.data.sources import read
from anabranch.training.data.split import split
from anabranch.training.errors import DataError
from anabranch.training.options import parse_options
from anabranch.training.recipe import Data, Recipe

ROWS = [{"prompt": f"question {i}", "answer": f"answer {i}"} for i in range(5)]


def prepared(*data: dict[str, Any], **keys: Any) -> Prepared:
    values = {"recipe": "test", "train": {"steps": 1}, "data": list(data), **keys}
    return prepare(parse_options(Recipe, values))


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def accounted(found: Prepared) -> bool:
    """Every row that was read is in a split or counted as removed."""
    return all(
        source.read == sum(source.splits.values()) + sum(source.removed.values())
        for source in found.report.sources
    )


# Sources


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "a.jsonl").write_text(text)
    with lzma.open(tmp_path / "a.jsonl.xz", "wt") as file:
        file.write(text)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(text)
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "answer"])
        writer.writeheader()
        writer.writerows(ROWS)
    for name in ("a.jsonl", "a.jsonl.xz", "a.jsonl.gz", "a.json", "a.csv"):
        source = "csv" if name.endswith("csv") else "jsonl"
        found = read(Data(source=source, path=tmp_path / name), 0)
        assert [dict(row.row) for row in found.rows] == ROWS, name
        assert len(found.fingerprint) == 64


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra 'parquet' is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    found = read(Data(source="parquet", path=tmp_path / "a.parquet"), 0)
    assert [dict(row.row) for row in found.rows] == ROWS


def test_folders_keep_the_splits_that_their_files_are_named_after(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train-00000.jsonl", ROWS[:3])
    write_jsonl(tmp_path / "data" / "validation.jsonl", ROWS[3:4])
    write_jsonl(tmp_path / "data" / "test.jsonl", ROWS[4:])
    found = prepared({"source": "hf-dir", "path": str(tmp_path)})
    assert [len(found.rows(name)) for name in ("train", "valid", "test")] == [3, 1, 1]


@pytest.mark.parametrize(
    ("unit", "chars", "texts"),
    [
        ("file", 1, ["a\nb\n\nc\n\n\nd"]),
        ("line", 1, ["a", "b", "c", "d"]),
        ("paragraph", 1, ["a\nb", "c", "d"]),
        ("paragraph", 4, ["a\nb\n\nc", "d"]),
    ],
)
def test_units_of_text(tmp_path: Path, unit: str, chars: int, texts: list[str]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a\nb\n\nc\n\n\nd\n")
    data = parse_options(
        Data, {"source": "text", "path": path, "unit": unit, "unit_chars": chars, "task": "text"}
    )
    found = [row.row["text"] for row in read(data, 0).rows]
    assert [text for text in found if text] == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}\n{oops\n', r"a\.jsonl:2 is not JSON"),
        ('{"a": 1}\n[1]\n', r"a\.jsonl:2 must be an object"),
        ("", "has no rows"),
        ('{"x": "1"}\n', r"a\.jsonl:1: .*columns x.*accepts messages.*map:"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_bad_files_name_the_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        prepared({"source": "jsonl", "path": str(path)})


def test_truncated_archives_and_ragged_tables(tmp_path: Path) -> None:
    packed = tmp_path / "a.jsonl.xz"
    packed.write_bytes(lzma.compress(b'{"a": 1}\n' * 1000)[:40])
    with pytest.raises(DataError, match="cannot be read"):
        read(Data(source="jsonl", path=packed), 0)
    table = tmp_path / "a.csv"
    table.write_text("prompt,answer\nq,a\nq\n")
    with pytest.raises(DataError, match=r"a\.csv:3 does not have 2 columns"):
        read(Data(source="csv", path=table), 0)
    with pytest.raises(DataError, match=r"there is no .*there are a\.csv, a\.jsonl\.xz"):
        read(Data(source="jsonl", path=tmp_path / "b.jsonl"), 0)


def test_columns_are_mapped(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"Q": "hello", "A": "world", "id": 3}])
    data = {"source": "jsonl", "path": str(path), "split": "train"}
    found = prepared({**data, "map": {"question": "Q", "answer": "A"}})
    assert found.train[0].texts[0].question == "hello"
    assert found.train[0].row["id"] == 3
    with pytest.raises(DataError, match=r"a\.jsonl:1: map: \{question: R\}.*has Q, A, id"):
        prepared({**data, "map": {"question": "R"}})


def test_builtin_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANABRANCH_DATA", raising=False)
    data = {"source": "builtin:small/train", "split": "train"}
    with pytest.raises(DataError, match="needs the environment variable ANABRANCH_DATA"):
        prepared(data)
    standing_in = prepared({**data, "fallback": "generator:instructions"})
    assert "stand in for builtin:small/train" in standing_in.report.sources[0].note
    (tmp_path / "small").mkdir()
    write_jsonl(tmp_path / "small" / "train.jsonl", ROWS)
    (tmp_path / "small" / "SOURCE.txt").write_text("about")
    monkeypatch.setenv("ANABRANCH_DATA", str(tmp_path))
    for source in ("builtin:small/train", "builtin:small"):
        found = prepared({**data, "source": source, "fallback": "generator:instructions"})
        assert len(found.train) == 5
        assert found.report.sources[0].note == ""
    with pytest.raises(UnknownName, match="did you mean 'train'"):
        prepared({**data, "source": "builtin:small/trian"})
    with pytest.raises(UnknownName, match="did you mean 'small'"):
        prepared({**data, "source": "builtin:smal/train"})


def test_generators_refuse_unknown_options() -> None:
    with pytest.raises(UnknownName, match="did you mean 'arithmetic'"):
        prepared({"source": "generator:arithmetics"})
    with pytest.raises(ConfigurationError, match="did you mean 'rows'"):
        prepared({"source": "generator:arithmetic", "options": {"row": 3}})
    with pytest.raises(ConfigurationError, match="whole number from 1"):
        prepared({"source": "generator:arithmetic", "options": {"rows": 0}})


# Filters


def test_every_filter_counts_what_it_leaves_out(tmp_path: Path) -> None:
    words = [f"word{i}" for i in range(60)]
    rows = [
        {"text": " ".join(words)},
        {"text": " ".join(words).upper() + "  "},  # the same after normalisation
        {"text": " ".join([*words[:-1], "other"])},  # 55 of 57 shingles
        {"text": "   "},
        {"text": "tiny"},
        {"text": "long " * 1000},
        {"text": 3.5},
        {"text": ["no"]},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    found = prepared(
        {
            "source": "jsonl",
            "path": str(path),
            "task": "text",
            "split": "train",
            "filters": {"invalid": "drop", "min_chars": 5, "max_chars": 4000},
        }
    )
    assert found.report.removed == {
        "duplicate": 1,
        "near-duplicate": 1,
        "empty": 1,
        "shorter than min_chars": 2,
        "longer than max_chars": 1,
        "invalid": 1,
    }
    assert found.report.sources[0].examples_removed["empty"] == ["a.jsonl:4"]
    assert accounted(found)
    with pytest.raises(DataError, match=r"data-0, a\.jsonl:8: column 'text' must be text"):
        prepared({"source": "jsonl", "path": str(path), "task": "text", "split": "train"})


def test_a_long_instruction_in_common_does_not_make_rows_duplicates() -> None:
    labels = [f"a_rather_long_label_number_{i}" for i in range(60)]
    rows = [{"text": f"text about {word}", "label": labels[0]} for word in "abcdefgh"]
    task = {"name": "classification", "labels": labels}
    data = parse_options(Data, {"source": "generator:none", "task": task})
    from anabranch.training.plugins import make_task

    made = make_task(data.task)
    near = NearDuplicates(0.8)
    assert [near.add(made.content(row), "x") for row in rows] == [None] * 8
    rendered = [made.render(row)[0] for row in rows]
    near = NearDuplicates(0.8)
    assert any(near.add(f"{r.question} {r.answer}", "x") for r in rendered)


def test_limit_and_weight(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [{"prompt": f"{'abcdefghij'[i]} {i}?", "answer": str(i)} for i in range(10)],
    )
    data = {"source": "jsonl", "path": str(path), "split": "train"}
    found = prepared({**data, "limit": 4, "weight": 2.5})
    assert found.report.removed == {"over the limit": 6}
    assert len(found.train) == found.report.train_items == 10
    assert sorted(Counter(row.where for row in found.train).values()) == [2, 2, 3, 3]
    assert accounted(found)


def test_test_sets_stay_whole_and_lose_nothing_to_training(tmp_path: Path) -> None:
    test = write_jsonl(tmp_path / "test.jsonl", [ROWS[0], ROWS[0], ROWS[1]])
    train = write_jsonl(tmp_path / "train.jsonl", [*ROWS, ROWS[2]])
    found = prepared(
        {"name": "a", "source": "jsonl", "path": str(train), "split": "train"},
        {"name": "b", "source": "jsonl", "path": str(train), "split": "train"},
        {"name": "c", "source": "jsonl", "path": str(test), "split": "test"},
    )
    assert len(found.test) == 3
    assert [row.row for row in found.train] == ROWS[2:]
    a, b, _ = (source.removed for source in found.report.sources)
    assert a == {"duplicate": 1, "the question of an evaluation row": 2}
    assert b == {"duplicate": 6}  # training sources are one pool
    assert accounted(found)


# Near-duplicates against the brute force


def mutated(words: list[str], changes: int, generator: random.Random) -> list[str]:
    copy = list(words)
    for _ in range(changes):
        copy[generator.randrange(len(copy))] = f"new{generator.randrange(10**6)}"
    return copy


@pytest.mark.parametrize("seed", range(3))
def test_minhash_finds_what_brute_force_finds(seed: int) -> None:
    generator = random.Random(seed)
    originals = [[f"w{generator.randrange(400)}" for _ in range(80)] for _ in range(40)]
    texts = [" ".join(words) for words in originals]
    for words in originals:
        texts += [" ".join(mutated(words, generator.randrange(0, 5), generator)) for _ in range(3)]
    near = NearDuplicates(0.8)
    sets = [shingles(text) for text in texts]
    kept: list[int] = []
    found = missed = 0
    for index, text in enumerate(texts):
        name = near.add(text, str(index))
        if name is not None:
            assert jaccard(sets[int(name)], sets[index]) > 0.8  # precision 1
            found += 1
        else:
            missed += any(jaccard(sets[k], sets[index]) > 0.8 for k in kept)
            kept.append(index)
    assert found > 40
    assert missed == 0  # at 0.8 a pair is missed once in 20,000


def test_minhash_stays_linear_when_all_rows_share_their_wording() -> None:
    """Rows that agree in 60 % of their shingles collide in many bands; the work stays bounded."""
    common = " ".join(f"common{i}" for i in range(60))
    near = NearDuplicates(0.8)
    rows = [f"{common} " + " ".join(f"own{i}x{j}" for j in range(40)) for i in range(300)]
    assert all(near.add(row, str(i)) is None for i, row in enumerate(rows))
    assert near.add(rows[250], "again") == "250"
    assert near.largest_bucket <= 64


@given(st.text(max_size=60), st.text(max_size=60))
def test_jaccard_is_that_of_sets(a: str, b: str) -> None:
    first, second = set(shingles(a).tolist()), set(shingles(b).tolist())
    assert jaccard(shingles(a), shingles(b)) == pytest.approx(
        len(first & second) / len(first | second)
    )


# Splits

shares = st.sampled_from(
    [
        {"train": 0.9, "valid": 0.05, "test": 0.05},
        {"train": 0.5, "valid": 0.25, "test": 0.25},
        {"train": 0.8, "valid": 0.0, "test": 0.2},
        {"train": 1.0},
    ]
)


@settings(deadline=None)
@given(st.integers(0, 300), shares, st.integers(0, 5))
def test_splits_are_complete_and_in_proportion(
    count: int, wanted: dict[str, float], seed: int
) -> None:
    found = split(count, wanted, seed)
    assert len(found) == count
    assert found == split(count, wanted, seed)
    for name, share in wanted.items():
        assert abs(found.count(name) - share * count) <= 1 + 1e-9


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=300), shares, st.integers(0, 5))
def test_every_stratum_is_in_proportion(
    strata: list[int], wanted: dict[str, float], seed: int
) -> None:
    found = split(len(strata), wanted, seed, strata=strata)
    for stratum, size in Counter(strata).items():
        for name, share in wanted.items():
            count = sum(f == name for f, s in zip(found, strata, strict=True) if s == stratum)
            assert abs(count - share * size) <= 2


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=200), shares, st.integers(0, 5))
def test_groups_stay_together(groups: list[int], wanted: dict[str, float], seed: int) -> None:
    found = split(len(groups), wanted, seed, groups=groups)
    homes: dict[int, set[str]] = {}
    for group, name in zip(groups, found, strict=True):
        homes.setdefault(group, set()).add(name)
    assert all(len(names) == 1 for names in homes.values())
    largest = max(Counter(groups).values())
    for name, share in wanted.items():
        assert abs(found.count(name) - share * len(groups)) <= 2 * largest


def test_split_by_columns(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} {'xyz'[i % 3]}?", "answer": str(i), "by": f"u{i // 4}"}
            for i in range(40)]  # fmt: skip
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    data = {"source": "jsonl", "path": str(path)}
    found = prepared({**data, "split": {"train": 0.5, "test": 0.5, "group": "by"}})
    owners = [{row.row["by"] for row in found.rows(name)} for name in ("train", "test")]
    assert not owners[0] & owners[1]
    assert len(found.test) == 20
    with pytest.raises(DataError, match=r"split by 'user'.*has prompt, answer, by"):
        prepared({**data, "split": {"train": 1.0, "group": "user"}})


# Contamination


def passage(text: str, question: str = "?") -> Passage:
    return Passage(text, (f"{question} {text[:20]}",))


def test_a_planted_overlap_is_found_and_only_it() -> None:
    generator = random.Random(0)

    def text(n: int = 60) -> list[str]:
        return [f"w{generator.randrange(10**5)}" for _ in range(n)]

    held_out, train = [text() for _ in range(20)], [text() for _ in range(200)]
    train[17][20:33] = held_out[3][5:18]  # 13 words
    train[42][20:32] = held_out[4][5:17]  # 12 words
    found = find_overlap(
        [passage(" ".join(w)) for w in train], [passage(" ".join(w)) for w in held_out]
    )
    assert (found.ngram, found.question) == ([17], [])
    disguised = " ".join(train[17]).upper().replace(" ", " , ")
    assert find_overlap([passage(disguised)], [passage(" ".join(held_out[3]))]).ngram == [0]


def test_wording_that_many_rows_share_is_no_leak() -> None:
    wording = " ".join(f"please{i}" for i in range(15))
    train = [passage(f"{wording} train{i}", str(i)) for i in range(BOILERPLATE + 1)]
    held_out = [passage(f"{wording} test", "t")]
    found = find_overlap(train, held_out)
    assert (found.ngram, found.boilerplate) == ([], 3)
    assert len(find_overlap(train[:-1], held_out).ngram) == BOILERPLATE


def test_short_questions_match_as_a_whole_and_numbers_can_be_masked() -> None:
    train = [Passage("x", ("Tom has 3 eggs, how many?",)), Passage("y", ("Tom has 4 eggs. Why?",))]
    held_out = [Passage("z", ("tom has 5 eggs how many",))]
    assert find_overlap(train, held_out).question == []
    assert find_overlap(train, held_out, digits="mask").question == [0]


def test_leaks_are_dropped_or_refused(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", ROWS)
    test = write_jsonl(tmp_path / "test.jsonl", ROWS[:2])
    data = [
        {"name": "a", "source": "jsonl", "path": str(train), "split": "train"},
        {"name": "b", "source": "jsonl", "path": str(test), "split": "test"},
    ]
    found = prepared(*data)
    assert found.report.removed == {"the question of an evaluation row": 2}
    assert accounted(found)
    assert len(prepared(*data, contamination={"action": "ignore"}).train) == 5
    with pytest.raises(DataError, match=r"2 training rows overlap.*a, train\.jsonl:1"):
        prepared(*data, contamination={"action": "refuse"})
    with pytest.raises(DataError, match="no rows are left to train on; left out: 5 the question"):
        prepared(*data, contamination={"digits": "mask"})


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(0, 3), st.sampled_from(["arithmetic", "instructions"]))
def test_nothing_is_dropped_silently(rows: int, seed: int, generator: str) -> None:
    task = "arithmetic" if generator == "arithmetic" else "chat"
    try:
        found = prepared(
            {"source": f"generator:{generator}", "options": {"rows": rows}, "task": task}, seed=seed
        )
    except AnabranchError as error:
        assert "no rows are left" in str(error)
        return
    assert accounted(found)
