"""Every method that can be built, PEFT's and ours, and how many weights each trains."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import torch
from torch import nn

from anabranch import registry
from anabranch.adapters.info import MethodInfo
from anabranch.adapters.peft_methods import UNAVAILABLE, peft_methods
from anabranch.errors import UnknownName

LEAVES: tuple[tuple[str, str], ...] = (
    ("additive", "adapter"),
    ("additive", "soft prompt"),
    ("additive", "other"),
    ("selective", "unstructured"),
    ("selective", "structured"),
    ("reparameterised", "low rank"),
    ("reparameterised", "rank search"),
    ("reparameterised", "rotation"),
    ("reparameterised", "spectral"),
    ("reparameterised", "mixture of LoRA"),
    ("hybrid", "combination"),
)
"""The survey's taxonomy, in its order."""


def catalogue() -> dict[str, MethodInfo]:
    """All methods by name, sorted. A preset of a method of ours is an entry of its own."""
    found = {info.name: info for info in peft_methods()}
    for tuner in registry.available("adapters").values():
        info = tuner.info
        found[info.name] = info
        for preset, options in tuner.presets.items():
            found[preset] = dataclasses.replace(
                info,
                name=preset,
                summary=f"{info.name} with {_words(options)}.",
                targets=options.get("target_modules", info.targets),
                defaults={
                    **info.defaults,
                    **{k: v for k, v in options.items() if k != "target_modules"},
                },
            )
    return dict(sorted(found.items()))


def method(name: str) -> MethodInfo:
    """One method; :class:`UnknownName` names the nearest one."""
    found = catalogue()
    if name not in found:
        reason = UNAVAILABLE.get(name.upper())
        raise (
            UnknownName("adapter method", name, found)
            if reason is None
            else UnknownName(
                f"adapter method that can be built from a base ({name} {reason})", name, found
            )
        )
    return found[name]


def coverage_markdown() -> str:
    """The catalogue as a Markdown table, family by family, for the documentation."""
    lines = [
        "| method | family / leaf | source | merges | mixed batch | engine | paper |",
        "|---|---|---|---|---|---|---|",
    ]
    entries = sorted(
        catalogue().values(),
        key=lambda info: (LEAVES.index((info.family, info.leaf)), info.source, info.name),
    )
    for info in entries:
        merges = "yes" if info.mergeable else "no"
        if info.merge_note:
            merges += f": {info.merge_note}"
        mixed = "yes" if info.mixed_batch else "no"
        lines.append(
            f"| `{info.name}` | {info.family} / {info.leaf} | {info.source} | {merges} "
            f"| {mixed} | {info.engine} | {info.paper} |"
        )
    lines += ["", "Not in the catalogue:", ""]
    lines += [f"- `{name}`: {reason}." for name, reason in sorted(UNAVAILABLE.items())]
    return "\n".join(lines) + "\n"


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device: shapes and no memory."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(
            torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad
        )
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def trainable_parameters(name: str, model: nn.Module, **options: Any) -> int:
    """How many weights a method would train on this model, which is not touched.

    Counted on shapes alone where the method allows it. Some of PEFT's methods read the base's
    weights when they are built (an SVD, a draw of indices); these are built on a copy.
    """
    from anabranch.adapters.building import build

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method(name).on_meta:
            with torch.device("meta"):
                return count(build(name, skeleton(model), **options))
        return count(build(name, copy.deepcopy(model), **options))


def count(model: nn.Module) -> int:
    """Trainable weights of a model."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _words(options: dict[str, Any]) -> str:
    def word(value: Any) -> str:
        return " and ".join(value) if isinstance(value, tuple) else str(value)

    return ", ".join(f"{name}={word(value)}" for name, value in options.items())
