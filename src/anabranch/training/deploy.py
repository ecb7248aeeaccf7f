"""Publishing a fine-tuned model under a name: an adapter's folder, or a merged model.

::

    <cache>/adapters/<name>/    adapter_config.json, adapter_model.safetensors (PEFT's format),
                                anabranch.json, README.md (card), monitor.json
    <cache>/models/<name>/      a merged or fully trained model, which ``anabranch up`` serves
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from anabranch.errors import AdapterError, ConfigurationError
from anabranch.files import sync, sync_tree, write_json, write_text
from anabranch.models import cache
from anabranch.models.card import ModelCard
from anabranch.models.quiet import quiet
from anabranch.training.recipe import NAME

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RECORD = "anabranch.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapter_folder(name: str) -> Path:
    """Where an adapter of this name is, or will be."""
    return cache.root() / "adapters" / name


def find_adapter(adapter: str) -> Path:
    """A folder in PEFT's format, or the one that was published under this name."""
    for folder in (Path(adapter), adapter_folder(adapter)):
        if (folder / ADAPTER_CONFIG).is_file():
            return folder.resolve()
    raise AdapterError(
        f"there is no adapter {adapter!r}: neither a folder with an {ADAPTER_CONFIG} nor one in "
        f"{cache.root() / 'adapters'}"
    )


def require_mergeable(adapter: Path, name: str) -> None:
    """What can be said of an adapter's folder and a new model's name before anything is loaded."""
    if not re.fullmatch(NAME, name):
        raise ConfigurationError(
            f"{name[:100]!r} cannot name a model: letters, digits, dot, dash and underscore, the "
            f"first one a letter or digit"
        )
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (adapter / file).is_file():
            raise AdapterError(f"{adapter} is no adapter: it has no {file}")


def require_free(name: str, run: str) -> None:
    """Raise :class:`ConfigurationError` if another run published something under this name."""
    if (folder := taken_by(name, run)) is not None:
        raise ConfigurationError(
            f"deploy.register_as: {name!r} is taken by {folder}; choose another name, or remove it"
        )


def taken_by(name: str, run: str) -> Path | None:
    """The folder of another run that was published under this name, if there is one."""
    for folder in (adapter_folder(name), cache.Entry(cache.slug(name)).path):
        if folder.exists() and _run_of(folder) != run:
            return folder
    return None


def publish_adapter(
    name: str, adapter: Path, card: str, facts: Mapping[str, Any], monitor: Mapping[str, Any]
) -> Path:
    """Copy a PEFT folder to its place under a name, whole or not at all. Returns the place.

    What is there already (see :func:`require_free`) is the same run's and stays.
    """
    final = adapter_folder(name)
    if final.exists():
        return final
    partial = final.parent / ".partial" / f"{name}-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(adapter, partial)
        _describe(partial, card, monitor)
        write_json(partial / RECORD, dict(facts))
        sync_tree(partial)
        partial.rename(final)
        sync(final.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def publish_model(
    name: str,
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    base: ModelCard,
    provenance: str,
    card: str,
    facts: Mapping[str, Any],
    monitor: Mapping[str, Any],
) -> Path:
    """Store a whole model in the cache under a name, in the base's number format."""
    import torch

    from anabranch.models import facts as model_facts
    from anabranch.models.checks import check_folder

    entry = cache.Entry(cache.slug(name))
    with entry.changing():
        if entry.path.exists():
            return entry.path
        with entry.filling() as folder:
            cast(Any, network).to(dtype=getattr(torch, base.dtype))
            with quiet():
                network.save_pretrained(folder, safe_serialization=True)
                tokenizer.save_pretrained(folder)
            _describe(folder, card, monitor)
            write_json(folder / "run.json", dict(facts))
            described = model_facts.folder_card(check_folder(folder), name, provenance)
            described = replace(described, licence=base.licence)
            cache.write_record(folder, cache.Record("training", described, {}))
    return entry.path


def reference_statistics(prompt_tokens: list[int], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a monitor compares requests with: the inner edges of 10 quantile bins of prompt length.

    The population stability index is sum((p - q) ln(p / q)) over those bins.
    """
    import numpy as np

    edges = np.quantile(prompt_tokens, np.linspace(0.1, 0.9, 9)).tolist() if prompt_tokens else []
    return {**settings, "rows": len(prompt_tokens), "prompt_token_edges": edges}


def _describe(folder: Path, card: str, monitor: Mapping[str, Any]) -> None:
    write_text(folder / "README.md", card)
    write_json(folder / "monitor.json", dict(monitor))


def _run_of(folder: Path) -> str | None:
    """The run that published a folder; None for anything else."""
    for file in (folder / "run.json", folder / RECORD):
        try:
            run = json.loads(file.read_text("utf-8")).get("run")
        except (OSError, ValueError, AttributeError):
            continue
        if run is not None:
            return str(run)
    return None
