"""What the configurations of the networks here share: a misspelt option is refused."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

from anabranch.errors import did_you_mean
from anabranch.models.geometry.errors import GeometryError

_WRITTEN = {
    "_attn_implementation",
    "_commit_hash",
    "_name_or_path",
    "attn_implementation",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "per_layer_config",
    "torch_dtype",
}
"""What transformers itself writes to a configuration, or takes, beside its fields."""


class GeometryConfig(PreTrainedConfig):
    """A configuration of transformers, which keeps unknown names; this one refuses them."""

    def __post_init__(self, **others: Any) -> None:
        known = [field.name for field in fields(type(self))]
        own = [name for name in known if name not in _INHERITED]
        for name in others:
            if name not in _WRITTEN:
                raise GeometryError(
                    f"{type(self).__name__} has no option {name!r}{did_you_mean(name, own)}; "
                    f"it has {', '.join(own)}"
                )
        super().__post_init__(**others)


_INHERITED = {field.name for field in fields(PreTrainedConfig)}
