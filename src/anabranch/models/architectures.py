"""Which architectures can be loaded as what, decided from config.json before any weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anabranch.errors import ModelUnsupported, did_you_mean


def require_causal(config: dict[str, Any], folder: Path) -> None:
    """Raise :class:`ModelUnsupported` unless this is a language model that generates text."""
    from transformers.models.auto import modeling_auto as auto

    _require_known(config, folder)
    kind = config["model_type"]
    classes = _classes(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, kind)
    named = _named(config)
    if named is None:
        # Encoders such as BERT also have a (rarely trained) generating head.
        causal = bool(classes) and kind not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    else:
        causal = named in classes
    if not causal or config.get("is_encoder_decoder") is True:
        raise ModelUnsupported(
            f"{folder} holds {named or kind}, which does not generate text from left to right; "
            f"if it is a sentence encoder, load it with load_encoder"
        )


def require_encoder(config: dict[str, Any], folder: Path) -> None:
    """Raise :class:`ModelUnsupported` unless this can give one vector for each token."""
    from transformers.models.auto import modeling_auto as auto

    _require_known(config, folder)
    kind, named = config["model_type"], _named(config)
    if config.get("is_encoder_decoder") is True:
        raise ModelUnsupported(f"{folder} holds {named or kind}, an encoder with a decoder")
    generates = named in _classes(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, kind)
    if generates and not (folder / "modules.json").is_file():
        raise ModelUnsupported(
            f"{folder} holds {named}, a language model and not a sentence encoder; "
            f"load it with load"
        )


def _require_known(config: dict[str, Any], folder: Path) -> None:
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind = config["model_type"]
    if kind not in CONFIG_MAPPING_NAMES:
        own_code = (
            " (its own code, named in auto_map, is never run)" if "auto_map" in config else ""
        )
        raise ModelUnsupported(
            f"{folder}: transformers {__version__} knows no model_type {kind!r}{own_code}"
            f"{did_you_mean(kind, CONFIG_MAPPING_NAMES)}"
        )
    if packed := config.get("quantization_config"):
        method = packed.get("quant_method", "unknown") if isinstance(packed, dict) else "unknown"
        raise ModelUnsupported(
            f"{folder} has weights packed by {method!r}; use the unpacked checkpoint or a GGUF file"
        )


def _named(config: dict[str, Any]) -> str | None:
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else None


def _classes(mapping: Any, kind: str) -> tuple[str, ...]:
    classes = mapping.get(kind, ())
    return (classes,) if isinstance(classes, str) else tuple(classes)
