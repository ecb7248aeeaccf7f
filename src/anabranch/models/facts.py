"""Model cards: what can be known about a model from its headers alone."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

from anabranch.errors import ModelUnsupported
from anabranch.models.card import ModelCard
from anabranch.models.checks import Contents, Tensor, read_json
from anabranch.models.gguf import GgufHeader

_CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_ctx",
)
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SAMPLE = 4096


def folder_card(contents: Contents, name: str, provenance: str) -> ModelCard:
    """The card of a checked Hugging Face folder."""
    tensors = [t for file in contents.weights.values() for t in file]
    return ModelCard(
        name=name,
        architecture=contents.config["model_type"],
        parameters=_parameters(tensors, contents.config),
        context_length=context_length(contents),
        dtype=_dtype(tensors),
        licence=_licence(contents.folder),
        provenance=provenance,
        fingerprint=fingerprint(contents),
        size_bytes=sum(path.stat().st_size for path in contents.weights),
    )


def gguf_card(header: GgufHeader, name: str, provenance: str, sha256: str) -> ModelCard:
    """The card of a GGUF file, the same before and after its conversion except ``size_bytes``.

    The fingerprint is made from the file's hash and the type it is converted to, so that every
    machine that converts the same file agrees on it, whatever library version converts.
    """
    if header.context_length is None:
        raise ModelUnsupported(f"{header.path} does not say how long its context is")
    how = f"{header.encoding}, dequantised to {header.dtype}" if header.packed else header.encoding
    return ModelCard(
        name=name,
        architecture=header.architecture,
        parameters=header.parameters,
        context_length=header.context_length,
        dtype=header.dtype,
        licence=str(header.metadata.get("general.license", "unknown")),
        provenance=f"{provenance} ({how})",
        fingerprint=hashlib.sha256(f"gguf {sha256} {header.dtype}".encode()).hexdigest(),
        size_bytes=header.size,
    )


def context_length(contents: Contents) -> int:
    """The most tokens a sequence may have; a sentence encoder's own limit comes first."""
    folder, config = contents.folder, contents.config
    sentence = folder / "sentence_bert_config.json"
    candidates = [read_json(sentence).get("max_seq_length")] if sentence.is_file() else []
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            candidates += [part.get(key) for key in _CONTEXT_KEYS]
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file():
        candidates.append(read_json(tokenizer).get("model_max_length"))
    for value in candidates:
        # A tokenizer without a limit writes 1e30.
        if isinstance(value, int) and 0 < value < 10**9:
            return value
    raise ModelUnsupported(
        f"{folder} does not say how long its context is: none of {', '.join(_CONTEXT_KEYS)} in "
        f"config.json, no model_max_length in tokenizer_config.json; add one of them"
    )


def fingerprint(contents: Contents) -> str:
    """SHA-256 over config.json, all safetensors headers and a sample of every tensor.

    The sample is the first, middle and last 4 KiB of each tensor (the whole of small ones): it
    costs milliseconds for any size, and a trained, merged or requantised tensor differs in it.
    """
    digest = hashlib.sha256((contents.folder / "config.json").read_bytes())
    for path, tensors in sorted(contents.weights.items()):
        with path.open("rb") as file:
            digest.update(file.read(min((t.start for t in tensors), default=8)))
            for tensor in sorted(tensors, key=lambda t: t.start):
                for start in _sample_starts(tensor):
                    file.seek(start)
                    digest.update(file.read(min(_SAMPLE, tensor.stop - start)))
    return digest.hexdigest()


def _sample_starts(tensor: Tensor) -> list[int]:
    last = max(tensor.start, tensor.stop - _SAMPLE)
    return sorted({tensor.start, (tensor.start + last) // 2, last})


def _parameters(tensors: list[Tensor], config: dict[str, Any]) -> int:
    tied = config.get("tie_word_embeddings") is True
    return sum(
        t.elements
        for t in tensors
        # Integers are positions and the like; tied embeddings are one matrix saved twice.
        if t.dtype in _DTYPES and not (tied and t.name == "lm_head.weight")
    )


def _dtype(tensors: list[Tensor]) -> str:
    values: Counter[str] = Counter()
    for tensor in tensors:
        values[tensor.dtype] += tensor.elements
    most = values.most_common(1)[0][0] if values else "F32"
    return _DTYPES.get(most, most.lower())


def _licence(folder: Path) -> str:
    """The ``license:`` line of the README's front matter, if it has one."""
    readme = folder / "README.md"
    if not readme.is_file():
        return "unknown"
    text = readme.read_text("utf-8", errors="replace")
    if not text.startswith("---"):
        return "unknown"
    for line in text[3:].split("\n---", 1)[0].splitlines():
        key, _, value = line.partition(":")
        if key == "license" and value.strip():
            return value.strip().strip("\"'")
    return "unknown"
