"""Parties may only average adapters that mean the same: names and shapes do not show the scale."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from anabranch.adapters.errors import AdapterMismatch

_OF_ONE_PARTY = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
}
"""Settings that do not change what the shared tensors mean."""


def describe_adapter(model: nn.Module, **more: Any) -> str:
    """The active adapter's settings that differ from its method's defaults, as JSON; {} for none.

    ``more`` are further things that the parties must have alike.
    """
    described: dict[str, Any] = dict(more)
    configs = getattr(model, "peft_config", None)
    if configs:
        config = configs[getattr(model, "active_adapter", "default")]
        usual = type(config)().to_dict()
        described |= {
            name: _plain(value)
            for name, value in config.to_dict().items()
            if name not in _OF_ONE_PARTY and (value != usual.get(name) or name == "peft_type")
        }
    return json.dumps(described, sort_keys=True, separators=(",", ":"))


def require_same_adapter(client: str, mine: str, theirs: str) -> None:
    """:class:`AdapterMismatch` listing what differs from what the run began with."""
    if mine == theirs:
        return
    here, there = json.loads(mine), json.loads(theirs)
    changed = [
        f"{name}: {there.get(name, 'not set')} in the run, {here.get(name, 'not set')} here"
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    ]
    raise AdapterMismatch(f"{client} has another adapter than the run: {'; '.join(changed)}")


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """A short name of frozen values that all parties must hold."""
    found = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value))
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    return value if isinstance(value, str | int | float | bool | None) else str(value)
