"""Is this folder a whole model? Every file is checked against what it says about itself.

Only headers are read, so the check of a model of any size takes milliseconds. It does not know
whether a bit flipped inside the weights.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anabranch.errors import ModelCorrupt, ModelError, ModelNotFound, ModelUnsupported

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt", "vocab.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_HEADER = 100_000_000
_WIDTH = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


@dataclass(frozen=True)
class Tensor:
    """One entry of a safetensors header. ``start`` and ``stop`` are bytes from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Contents:
    """A checked folder: its parsed config.json and the tensors of each weight file."""

    folder: Path
    config: dict[str, Any]
    weights: dict[Path, list[Tensor]]


def check_folder(folder: Path) -> Contents:
    """Read and check config.json, all weight files and the presence of a tokenizer.

    Raises :class:`ModelNotFound` if the folder holds no model, :class:`ModelCorrupt` if files are
    missing or damaged, :class:`ModelUnsupported` if it must not or cannot be loaded.
    """
    config = _config(folder)
    weights = {path: safetensors_header(path) for path in _weight_files(folder)}
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelCorrupt(
            f"{folder} has no tokenizer (looked for {', '.join(TOKENIZER_FILES)}); "
            f"copy the tokenizer's files from where the model came from"
        )
    return Contents(folder, config, weights)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; :class:`ModelCorrupt` names file, line and column."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ModelCorrupt(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}); "
            f"get the file again"
        ) from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise ModelCorrupt(f"{path} is not JSON text ({error}); get the file again") from error
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    if not isinstance(value, dict):
        raise ModelCorrupt(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def safetensors_header(path: Path) -> list[Tensor]:
    """The tensors of a safetensors file, after checking its header against the file's size."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if len(head) < 8 or (length <= _MAX_HEADER and size < 8 + length):
                raise truncated(path, 8 + length, size, at_least=True)
            if length > _MAX_HEADER:
                raise _not_safetensors(path, f"its header would have {length} bytes")
            raw = file.read(length)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = [_tensor(name, entry, 8 + length) for name, entry in header.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _not_safetensors(path, f"its header cannot be read: {error}") from error
    expected = max((t.stop for t in tensors), default=8 + length)
    if size < expected:
        raise truncated(path, expected, size)
    if size > expected:
        raise ModelCorrupt(f"{path} has {size} bytes, expected {expected}; get the file again")
    return tensors


def truncated(path: Path, expected: int, actual: int, at_least: bool = False) -> ModelCorrupt:
    """The error for a file that ends early; sizes in bytes."""
    return ModelCorrupt(
        f"{path} is incomplete: it has {actual} bytes, expected "
        f"{'at least ' if at_least else ''}{expected}; download or copy it again"
    )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if path.is_file():
        config = read_json(path)
        if not isinstance(config.get("model_type"), str):
            raise ModelCorrupt(f"{path} has no model_type, so its architecture is unknown")
        return config
    if (folder / "adapter_config.json").is_file():
        raise ModelUnsupported(f"{folder} is an adapter, not a base model: load its base first")
    if ggufs := sorted(folder.glob("*.gguf")):
        raise ModelNotFound(
            f"{folder} has no config.json; to load the GGUF file name it: {ggufs[0]}"
        )
    if any(folder.glob("*.safetensors")) or any((folder / f).is_file() for f in TOKENIZER_FILES):
        raise ModelCorrupt(f"{path} is missing; copy it from where the model came from")
    raise ModelNotFound(f"{folder} holds no model: there is no config.json in it")


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return _shards(folder)
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
    if pickles:
        raise ModelUnsupported(
            f"{folder} has only pickled weights ({pickles[0]}), and loading a pickle runs whatever "
            f"code is in it; convert them once, where you trust the file: load the model with "
            f"transformers, then save_pretrained(folder), which writes safetensors"
        )
    raise ModelCorrupt(f"{folder} has no weights: neither {WEIGHTS} nor {INDEX}")


def _shards(folder: Path) -> list[Path]:
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelCorrupt(f"{folder / INDEX} has no weight_map")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelCorrupt(f"{folder / INDEX} names {name!r}, which is not a shard beside it")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelCorrupt(
            f"{folder} lacks {len(missing)} of the {len(names)} shards that {INDEX} lists: "
            f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}; get them again"
        )
    return [folder / name for name in names]


def _tensor(name: str, entry: dict[str, Any], data_start: int) -> Tensor:
    start, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(isinstance(n, int) and n >= 0 for n in (start, stop, *shape)) or stop < start:
        raise ValueError(f"tensor {name!r} has an impossible place or shape")
    tensor = Tensor(name, entry["dtype"], shape, data_start + start, data_start + stop)
    width = _WIDTH.get(tensor.dtype)
    if width is not None and tensor.elements * width != stop - start:
        raise ValueError(f"tensor {name!r} {list(shape)} does not fill its {stop - start} bytes")
    return tensor


def _not_safetensors(path: Path, why: str) -> ModelCorrupt:
    return ModelCorrupt(f"{path} is not a safetensors file: {why}; get the file again")
