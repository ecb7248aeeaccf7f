"""Dividing rows: whole groups, every stratum in proportion, the same for the same seed."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np


def split(
    count: int,
    shares: Mapping[str, float],
    seed: int,
    groups: Sequence[Hashable] | None = None,
    strata: Sequence[Hashable] | None = None,
) -> list[str]:
    """The split of each of ``count`` rows.

    ``groups``: rows with equal values stay together. ``strata``: every value is divided in the same
    proportions; a group belongs to the stratum of its first row.

    Groups are shuffled within their stratum and put in line, stratum after stratum; walking along,
    each goes where most rows are missing so far (systematic sampling). So the shares hold within
    about a group over all rows, and over each stratum, which is a stretch of the line.
    """
    generator = np.random.default_rng(seed)
    members: dict[Hashable, list[int]] = {}
    for row in range(count):
        members.setdefault(groups[row] if groups is not None else row, []).append(row)
    lines: dict[Hashable, list[list[int]]] = {}
    for rows in members.values():
        lines.setdefault(strata[rows[0]] if strata is not None else None, []).append(rows)

    wanted = {name: share for name, share in shares.items() if share > 0}
    assigned = dict.fromkeys(wanted, 0)
    result = [""] * count
    placed = 0
    for line in lines.values():
        for position in generator.permutation(len(line)):
            rows = line[position]
            placed += len(rows)
            missing = {name: wanted[name] * placed - assigned[name] for name in wanted}
            chosen = max(missing, key=lambda name: missing[name])
            assigned[chosen] += len(rows)
            for row in rows:
                result[row] = chosen
    return result
