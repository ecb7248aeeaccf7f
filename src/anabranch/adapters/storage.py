"""Adapters on disk, in PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError, safe_open
from torch import nn

from anabranch.adapters.building import attach
from anabranch.adapters.errors import AdapterError, AdapterMismatch
from anabranch.adapters.rollback import unchanged_on_error
from anabranch.errors import did_you_mean
from anabranch.files import sync

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def save(model: PeftModel, folder: str | Path, adapter: str = "default") -> Path:
    """Write one adapter to a folder that does not exist yet, whole or not at all.

    It is written beside, flushed to disk and renamed. Plain PEFT loads it, too; a method that only
    we have needs ``import anabranch.adapters`` first.
    """
    folder = Path(folder)
    if adapter not in model.peft_config:
        raise AdapterError(
            f"no adapter named {adapter!r}{did_you_mean(adapter, model.peft_config)}; "
            f"the model has {', '.join(sorted(model.peft_config))}"
        )
    if folder.exists():
        raise AdapterError(f"{folder} exists; choose a new folder or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        model.save_pretrained(str(beside), selected_adapters=[adapter], save_embedding_layers=False)
        # PEFT writes every adapter but "default" into a folder of its name.
        written = beside if adapter == "default" else beside / adapter
        for file in written.iterdir():
            sync(file)
        sync(written)
        written.chmod(0o755)  # a temporary folder is its owner's only
        written.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def load(
    model: nn.Module, folder: str | Path, adapter: str = "default", trainable: bool = False
) -> PeftModel:
    """Put a stored adapter on a network, or add it to a :class:`PeftModel` of the same method.

    Raises :class:`AdapterError` if the folder is no adapter or was written by a newer version, and
    :class:`AdapterMismatch` if it belongs to another base. The model is then as it was.
    """
    folder = Path(folder)
    config = _read_config(folder)
    config.inference_mode = not trainable
    if isinstance(model, PeftModel) and adapter in model.peft_config:
        raise AdapterError(f"the model already has an adapter named {adapter!r}")
    name = config.peft_type.value.lower()
    before = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    with unchanged_on_error(model):
        adapted = attach(model, config, adapter, name)
        _require_fit(adapted, folder, adapter)
        device = str(next(model.parameters()).device)
        adapted.load_adapter(str(folder), adapter, is_trainable=trainable, torch_device=device)
        if not trainable:  # PEFT leaves soft prompts trainable
            for parameter in adapted.parameters():
                if id(parameter) not in before:
                    parameter.requires_grad_(False)
    return adapted


def _require_fit(model: PeftModel, folder: Path, adapter: str) -> None:
    """Compare names and shapes in the file with those that the adapter has on this model."""
    wanted = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise AdapterError(f"{folder / WEIGHTS} is damaged: {error}") from error
    for key, tensor in wanted.items():
        if key not in stored:
            raise AdapterMismatch(f"{folder} does not fit this model: it lacks {key}")
        if stored[key] != tuple(tensor.shape):
            raise AdapterMismatch(
                f"{folder} does not fit this model: {key} is {list(stored[key])} there, "
                f"but {list(tensor.shape)} here"
            )
    base = model.get_base_model().state_dict()  # PEFT may store embeddings beside the adapter
    for key in stored.keys() - wanted.keys():
        if key.removeprefix("base_model.model.") not in base:
            raise AdapterMismatch(f"{folder} does not fit this model, which has no place for {key}")


def _read_config(folder: Path) -> Any:
    file = folder / CONFIG
    try:
        stored = json.loads(file.read_text())
    except FileNotFoundError:
        raise AdapterError(f"{folder} is no adapter: it has no {CONFIG}") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file} cannot be read: {error}") from error
    if not (folder / WEIGHTS).is_file():
        raise AdapterError(f"{folder} has no {WEIGHTS}; weights in other formats are not loaded")
    kind = stored.get("peft_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        known = sorted(member.value for member in PEFT_TYPE_TO_CONFIG_MAPPING)
        raise AdapterError(
            f"{file}: no adapter method {kind!r}{did_you_mean(str(kind), known)}; "
            f"known: {', '.join(known)}"
        )
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    newer = sorted(
        stored.keys() - {f.name for f in dataclasses.fields(config)} - {"runtime_config"}
    )
    if newer:
        raise AdapterError(
            f"{file} has settings that this version does not know: {', '.join(newer)}; "
            f"it was written with peft {stored.get('peft_version', 'of unknown version')}"
        )
    return config.from_pretrained(str(folder))
