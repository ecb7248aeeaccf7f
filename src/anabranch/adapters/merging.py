"""Putting adapters into the base's weights for good."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

from anabranch.adapters.base import Tuner
from anabranch.adapters.catalogue import catalogue
from anabranch.adapters.errors import AdapterError, NotMergeable
from anabranch.adapters.rollback import unchanged_on_error


def merge(model: PeftModel) -> nn.Module:
    """The network with its active adapters in its weights and no adapter left.

    Raises :class:`NotMergeable` with the reason, and :class:`AdapterError` if the adapter or the
    result has NaN or infinite weights; the model is then as it was.
    """
    for adapter in model.active_adapters:
        obstacle = merge_obstacle(model.peft_config[adapter])
        if obstacle:
            raise NotMergeable(f"the adapter {adapter!r} cannot be merged: {obstacle}")
    _require_finite(model)
    with unchanged_on_error(model):
        try:
            return model.merge_and_unload(safe_merge=True)
        except AdapterError:
            raise
        except (ValueError, NotImplementedError) as error:
            reason = str(error) or "PEFT has no merge for it"
            raise NotMergeable(f"the adapter cannot be merged: {reason}") from error


def merge_obstacle(config: Any) -> str:
    """Why an adapter with this configuration cannot be merged, or an empty string."""
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if tuner is not None and issubclass(tuner, Tuner):
        return tuner.merge_obstacle(config)
    return next(
        (
            info.merge_note
            for info in catalogue().values()
            if type(config) is info.config and not info.mergeable
        ),
        "",
    )


def _require_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise AdapterError(f"{name} has NaN or infinite entries; nothing was merged")
