"""Losses by category: what was learned of the kinds of tasks that clients have, and of others."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from anabranch.training.example import Item
from anabranch.training.trainer import Trainer


def group_by_category(items: Sequence[Item]) -> dict[str, list[Item]]:
    """Items by the category of their first example (its data source), in order of appearance."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item[0].task, []).append(item)
    return groups


def category_losses(
    trainer: Trainer[Item], items: Sequence[Item], trained_on: Sequence[Item]
) -> dict[str, float]:
    """``loss/<category>`` of the held-out ``items``, and the plain means ``loss/seen`` and
    ``loss/unseen`` over categories that are among ``trained_on`` and that are not.

    Nothing if there is one category only: that is the loss itself. A mean over no category is left
    out.
    """
    groups = group_by_category(items)
    if len(groups) < 2:
        return {}
    losses = {name: trainer.evaluate(group)["loss"] for name, group in groups.items()}
    known = group_by_category(trained_on).keys()
    means = {
        "loss/seen": [loss for name, loss in losses.items() if name in known],
        "loss/unseen": [loss for name, loss in losses.items() if name not in known],
    }
    return {f"loss/{name}": loss for name, loss in losses.items()} | {
        name: fmean(values) for name, values in means.items() if values
    }
