"""What can be known to be wrong with a recipe before any data or model is read."""

from __future__ import annotations

from pathlib import Path

from anabranch import adapters
from anabranch.errors import ConfigurationError, UnknownName, did_you_mean
from anabranch.training.data.generators import check_generator
from anabranch.training.half import HalfFineTuning
from anabranch.training.hooks import Hook
from anabranch.training.plugins import construct, make_loss, make_task
from anabranch.training.recipe import TEMPLATES, Adapter, Recipe
from anabranch.training.template import check_jinja

ALL_WEIGHTS = ("full", "hft")
"""Values of ``adapter.method`` that train the base itself: all of it, or half of it in turns."""


def check(recipe: Recipe) -> None:
    """Raise for unknown plug-ins and options, and for parts that do not fit together."""
    _check_adapter(recipe.adapter)
    half_fine_tuning(recipe)
    loss = make_loss(recipe.loss)
    if loss.needs_reference and recipe.adapter.method in ALL_WEIGHTS:
        raise ConfigurationError(
            f"loss: {recipe.loss.name} compares with the frozen base, which adapter: "
            f"{recipe.adapter.method} changes; use an adapter such as lora"
        )
    for data in recipe.data:
        task = make_task(data.task)
        if loss.texts != task.texts:
            wanted = "pairs (task: preference)" if loss.texts == 2 else "single texts"
            raise ConfigurationError(
                f"loss: {recipe.loss.name} learns from {wanted}, but data {data.name!r} has "
                f"task: {data.task.name}"
            )
        if data.source.startswith("generator:"):
            check_generator(data.source.partition(":")[2], data.options)
        if data.fallback is not None:
            check_generator(data.fallback.partition(":")[2], data.fallback_options)
    if recipe.template not in TEMPLATES:
        check_jinja(Path(recipe.template))


def half_fine_tuning(recipe: Recipe) -> list[Hook]:
    """The hook of ``adapter: hft``; none for other methods."""
    if recipe.adapter.method != "hft":
        return []
    options = {"seed": recipe.seed, **recipe.adapter.options}
    return [construct(HalfFineTuning, options, "adapter")]


def _check_adapter(adapter: Adapter) -> None:
    if adapter.method == "full" and adapter.options:
        raise ConfigurationError(
            f"adapter: full trains the base itself and has no options; "
            f"{', '.join(adapter.options)} given"
        )
    if adapter.method in ALL_WEIGHTS:
        return
    if adapter.method not in adapters.catalogue():
        raise UnknownName("adapter.method", adapter.method, [*adapters.catalogue(), *ALL_WEIGHTS])
    known = adapters.method(adapter.method).options()
    for key in adapter.options:
        if key not in known:
            raise ConfigurationError(
                f"adapter.{key}: {adapter.method} has no such option{did_you_mean(key, known)}; "
                f"known: {', '.join(sorted(known))}"
            )
