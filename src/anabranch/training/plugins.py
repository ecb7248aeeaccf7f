"""From names in a recipe to objects, with options checked before anything is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ConfigDict, create_model

from anabranch import registry
from anabranch.training.losses import Loss
from anabranch.training.options import parse_options
from anabranch.training.recipe import Choice
from anabranch.training.task import Task

Plugin = TypeVar("Plugin")


def make_task(choice: Choice) -> Task:
    """The task of a source. Raises for unknown names and options."""
    made: Task = construct(registry.get("tasks", choice.name), choice.options, "task")
    return made


def make_loss(choice: Choice) -> Loss:
    """The loss of a recipe. Raises for unknown names and options."""
    made: Loss = construct(registry.get("losses", choice.name), choice.options, "loss")
    return made


def construct(cls: type[Plugin], options: Mapping[str, Any], where: str) -> Plugin:
    """``cls(**options)``, with the types that its constructor declares.

    Raises :class:`ConfigurationError` with one line per mistake: the option, what is wrong, and the
    nearest of the options that there are.
    """
    fields: dict[str, Any] = {
        parameter.name: (
            Any if parameter.annotation is parameter.empty else parameter.annotation,
            ... if parameter.default is parameter.empty else parameter.default,
        )
        for parameter in inspect.signature(cls, eval_str=True).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    section = create_model(
        cls.__name__,
        __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True),
        **fields,
    )
    checked = parse_options(section, dict(options), where)
    return cls(**{name: getattr(checked, name) for name in fields})
