"""Stage 1 of a recipe: read, check, render, clean, divide, and take out leaks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anabranch.models.progress import Progress, silent
from anabranch.training.data.contamination import Passage, find_overlap
from anabranch.training.data.minhash import NearDuplicates, normalise
from anabranch.training.data.report import DataReport, SourceReport
from anabranch.training.data.sources import SourceRow, read
from anabranch.training.data.split import split
from anabranch.training.errors import DataError
from anabranch.training.plugins import make_task
from anabranch.training.recipe import Data, Filters, Recipe, Split
from anabranch.training.task import Rendered, Task

DEFAULT_SPLIT = Split(train=0.9, valid=0.05, test=0.05)


@dataclass(frozen=True)
class PreparedRow:
    """A row that was kept: its rendered texts, its own words, and where it came from."""

    row: Mapping[str, Any]
    texts: tuple[Rendered, ...]
    content: str
    where: str
    source: str
    task: Task


@dataclass(frozen=True)
class Prepared:
    """The rows of each split. ``train`` holds a row as often as its source's weight says."""

    train: list[PreparedRow] = field(default_factory=list)
    valid: list[PreparedRow] = field(default_factory=list)
    test: list[PreparedRow] = field(default_factory=list)
    report: DataReport = field(default_factory=DataReport)

    def rows(self, name: str) -> list[PreparedRow]:
        """The rows of the split of this name."""
        found: list[PreparedRow] = getattr(self, name)
        return found


def prepare(recipe: Recipe, progress: Progress = silent) -> Prepared:
    """All rows of a recipe, ready to be tokenised.

    The order is: columns, task, empty, lengths, duplicates, near-duplicates, limit, split,
    contamination, weight. Duplicates are sought within a source, and among all sources that are
    only trained on. A source without training rows keeps its duplicates, so that figures on a
    published test set are about all of it; and a row that is both in a training and in a test set
    is contamination, and leaves the training set.

    Raises :class:`DataError` naming the row.
    """
    prepared = Prepared()
    seen: dict[str, _Duplicates] = {}
    weights: dict[str, float] = {}
    for position, data in enumerate(recipe.data):
        progress(f"reading {data.name}", position / len(recipe.data))
        task = make_task(data.task)
        source = read(data, recipe.seed)
        report = SourceReport(
            data.name, data.source, source.fingerprint, len(source.rows), weight=data.weight
        )
        report.note = source.note
        prepared.report.sources.append(report)
        weights[data.name] = data.weight
        if not source.rows:
            raise DataError(f"the source {data.name!r} has no rows")
        duplicates = _Duplicates(data.filters)
        if data.split is not None and data.split.train == 1.0:
            duplicates = seen.setdefault(data.filters.model_dump_json(), duplicates)
        elif data.split is not None and data.split.train == 0.0:
            duplicates = _Duplicates(Filters(duplicates=False, near_duplicates=None))
        progress(f"cleaning {data.name}", (position + 0.3) / len(recipe.data))
        rows = list(_clean(source.rows, data, task, report, duplicates))
        _divide(rows, data, recipe.seed, prepared, report)
    _take_out_leaks(recipe, prepared)
    for report in prepared.report.sources:
        report.splits = {
            name: sum(row.source == report.name for row in prepared.rows(name))
            for name in ("train", "valid", "test")
        }
    prepared.train[:] = _weighted(prepared.train, weights, recipe.seed)
    prepared.report.train_items = len(prepared.train)
    if not prepared.train:
        removed = ", ".join(f"{n} {why}" for why, n in prepared.report.removed.items()) or "none"
        raise DataError(f"no rows are left to train on; left out: {removed}")
    return prepared


@dataclass(frozen=True)
class _Kept:
    row: PreparedRow
    split: str | None


class _Duplicates:
    """Exact and near-duplicates among the rows shown to it."""

    def __init__(self, filters: Filters) -> None:
        self._exact: set[int] | None = set() if filters.duplicates else None
        near = filters.near_duplicates
        self._near = NearDuplicates(near) if near is not None else None

    def reason(self, text: str, where: str) -> str | None:
        """Why this text goes, or None, after which it counts as seen."""
        if self._exact is not None:
            key = hash(normalise(text))
            if key in self._exact:
                return "duplicate"
            self._exact.add(key)
        if self._near is not None and self._near.add(text, where) is not None:
            return "near-duplicate"
        return None


def _clean(
    rows: Sequence[SourceRow],
    data: Data,
    task: Task,
    report: SourceReport,
    duplicates: _Duplicates,
) -> Iterator[_Kept]:
    """The rows that pass the filters; the others are counted in ``report``."""
    kept: list[_Kept] = []
    for row in rows:
        try:
            texts = task.render(row.row)
        except DataError as error:
            if data.filters.invalid == "error":
                raise DataError(f"{data.name}, {row.where}: {error}") from error
            report.remove("invalid", row.where)
            continue
        if not all(text.question.strip() and text.answer.strip() for text in texts):
            report.remove("empty", row.where)
            continue
        content = task.content(row.row)
        if reason := _bounds(len(content), data.filters) or duplicates.reason(content, row.where):
            report.remove(reason, row.where)
            continue
        where = f"{data.name}, {row.where}"
        prepared = PreparedRow(row.row, texts, content, where, data.name, task)
        kept.append(_Kept(prepared, row.split))
    if data.limit is not None and len(kept) > data.limit:
        chosen = np.random.default_rng(report.read).permutation(len(kept))[: data.limit]
        for index in set(range(len(kept))) - set(chosen.tolist()):
            report.remove("over the limit", kept[index].row.where)
        kept = [kept[index] for index in sorted(chosen)]
    return iter(kept)


def _bounds(length: int, filters: Filters) -> str | None:
    if length < filters.min_chars:
        return "shorter than min_chars"
    if filters.max_chars is not None and length > filters.max_chars:
        return "longer than max_chars"
    return None


def _divide(
    rows: list[_Kept], data: Data, seed: int, prepared: Prepared, report: SourceReport
) -> None:
    if data.split is None and any(row.split for row in rows):
        for row in rows:
            prepared.rows(row.split or "train").append(row.row)
        return
    shares = data.split or DEFAULT_SPLIT

    def column(name: str | None) -> list[Any] | None:
        if name is None:
            return None
        for row in rows:
            if name not in row.row.row:
                raise DataError(
                    f"{row.row.where}: split by {name!r}, which is not a column of the row; it has "
                    f"{', '.join(map(str, row.row.row))}"
                )
        return [str(row.row.row[name]) for row in rows]

    chosen = split(len(rows), shares.shares, seed, column(shares.group), column(shares.stratify))
    for row, name in zip(rows, chosen, strict=True):
        prepared.rows(name).append(row.row)


def _take_out_leaks(recipe: Recipe, prepared: Prepared) -> None:
    """Drop or refuse training rows that overlap with validation or test rows."""
    rule = recipe.contamination
    if rule.action == "ignore":
        return
    overlap = find_overlap(
        [_passage(row) for row in prepared.train],
        [_passage(row) for row in (*prepared.valid, *prepared.test)],
        rule.ngram,
        rule.digits,
    )
    prepared.report.boilerplate_ngrams = overlap.boilerplate
    reasons = dict.fromkeys(overlap.question, "the question of an evaluation row")
    reasons |= dict.fromkeys(overlap.ngram, f"{rule.ngram} words of an evaluation row")
    if reasons and rule.action == "refuse":
        named = ", ".join(prepared.train[index].where for index in sorted(reasons)[:3])
        raise DataError(
            f"{len(reasons)} training rows overlap with evaluation rows, among them {named}; "
            f"contamination: {{action: drop}} leaves them out"
        )
    reports = {report.name: report for report in prepared.report.sources}
    for index, reason in sorted(reasons.items()):
        reports[prepared.train[index].source].remove(reason, prepared.train[index].where)
    prepared.train[:] = [row for i, row in enumerate(prepared.train) if i not in reasons]


def _passage(row: PreparedRow) -> Passage:
    return Passage(row.content, tuple(text.question for text in row.texts))


def _weighted(
    rows: Sequence[PreparedRow], weights: Mapping[str, float], seed: int
) -> list[PreparedRow]:
    """Each source's rows ``weight`` times: whole copies, and a random part for the fraction."""
    result: list[PreparedRow] = []
    for name, weight in weights.items():
        mine = [row for row in rows if row.source == name]
        copies, fraction = int(weight), weight - int(weight)
        result += mine * copies
        extra = round(fraction * len(mine))
        chosen = np.random.default_rng(seed).permutation(len(mine))[:extra]
        result += [mine[index] for index in sorted(chosen.tolist())]
    return result
