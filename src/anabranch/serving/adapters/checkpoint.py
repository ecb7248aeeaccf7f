"""Reads an adapter's folder in PEFT's format: ``adapter_config.json`` and safetensors.

Low-rank checkpoints become two matrices for each layer, so that a runner can compute many adapters
in one batch. Everything else is left to PEFT, one adapter at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from anabranch.errors import AdapterError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

_CHANGES_THE_FORWARD = (
    "alora_invocation_tokens",
    "arrow_config",
    "layer_replication",
    "use_bdlora",
    "use_qalora",
)
"""Options of PEFT's LoRA that leave no trace in the names of the tensors."""


_FACTORS = {
    "LORA": (".lora_A.weight", ".lora_B.weight"),
    "LORA_SB": tuple(f".anabn_lora_sb_branches.{factor}" for factor in ("A", "B", "R.weight")),
}
"""Method -> how the names of A, B and, between them, R end in its checkpoints."""


@dataclass(frozen=True)
class LowRank:
    """The change ``scaling * B A`` of one linear layer: A ``[r, in]``, B ``[out, r]``."""

    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True)
class AdapterCheckpoint:
    """A folder whose configuration and tensor headers were read; weights are read when asked for.

    Raises :class:`AdapterError` from :meth:`read` if the folder is no adapter.
    """

    folder: Path
    config: dict[str, Any]
    parameters: int
    fingerprint: str
    _names: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> AdapterCheckpoint:
        """Read configuration and headers. Costs milliseconds."""
        config_file, weights = folder / CONFIG, folder / WEIGHTS
        for file in (config_file, weights):
            if not file.is_file():
                raise AdapterError(
                    f"{folder} is no adapter: it has no {file.name}; a PEFT folder with "
                    f"{CONFIG} and {WEIGHTS} is needed"
                )
        try:
            config = json.loads(config_file.read_text(encoding="utf-8"))
            if not isinstance(config, dict) or "peft_type" not in config:
                raise ValueError("it names no peft_type")
        except (OSError, ValueError) as error:
            raise AdapterError(f"{config_file} cannot be read: {error}") from error
        digest = hashlib.sha256(config_file.read_bytes())
        try:
            with safe_open(weights, "pt") as tensors:
                names = tuple(tensors.keys())
                shapes = [tensors.get_slice(name).get_shape() for name in names]
            digest.update(weights.read_bytes())
        except (OSError, SafetensorError) as error:
            raise AdapterError(f"{weights} is damaged: {error}") from error
        return cls(folder, config, sum(map(math.prod, shapes)), digest.hexdigest(), names)

    @property
    def method(self) -> str:
        """PEFT's name of the method, for example ``LORA``."""
        return str(self.config["peft_type"])

    @property
    def rank(self) -> int | None:
        """The rank of a low-rank method."""
        return self.config.get("r")

    @cached_property
    def not_low_rank(self) -> str | None:
        """Why this is more than a low-rank product for each layer, or None if it is just that."""
        return why_not_low_rank(self.config, self._names)

    def low_rank(self) -> dict[str, LowRank]:
        """Module name -> its matrices. Raises :class:`AdapterError` if there is more to it."""
        with safe_open(self.folder / WEIGHTS, "pt") as tensors:
            return low_rank_layers(
                self.config, {n: tensors.get_tensor(n) for n in self._names}, str(self.folder)
            )


def why_not_low_rank(config: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """Why an adapter is more than a low-rank product for each layer, or None."""
    method = str(config["peft_type"])
    if method not in _FACTORS:
        return f"its method is {method}"
    for option in _CHANGES_THE_FORWARD:
        if config.get(option):
            return f"it uses {option}"
    for name in names:
        if not name.endswith(_FACTORS[method]):
            return f"it has the tensor {name}"
    return None


def low_rank_layers(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
) -> dict[str, LowRank]:
    """Module name -> matrices, from the tensors of a checkpoint by their names.

    Raises :class:`AdapterError`, which begins with ``where``, if there is more to the adapter.
    """
    reason = why_not_low_rank(config, tensors)
    if reason:
        raise AdapterError(f"{where} is not just low-rank products: {reason}")
    endings = _FACTORS[str(config["peft_type"])]
    layers = {}
    for name in tensors:
        if not name.endswith(endings[0]):
            continue
        stem = name.removesuffix(endings[0])
        try:
            a, b, *core = (tensors[stem + ending] for ending in endings)
        except KeyError as error:
            raise AdapterError(f"{where}: {stem} lacks a matrix") from error
        module = stem.removeprefix(PREFIX)
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise AdapterError(
                f"{where}: {module} has A {list(a.shape)} and B {list(b.shape)}; "
                f"a linear layer's are [r, in] and [out, r]"
            )
        layers[module] = LowRank(a, b @ core[0], 1.0) if core else _lora(config, module, a, b)
    return layers


def _lora(config: Mapping[str, Any], module: str, a: Tensor, b: Tensor) -> LowRank:
    rank = len(a)
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LowRank(a, b, scaling)
