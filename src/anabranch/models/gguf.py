"""GGUF files: read the header and check the file against it, before anything is converted.

::

    | GGUF | version | counts | metadata ... | tensor table ... | padding | tensor data ... |

The reader here exists because the check must be fast (0.2 s, where reading every string into an
array takes 3 s) and must say how many bytes a half-downloaded file lacks. It understands versions
2 and 3, little-endian; it does not read tensor data.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anabranch.errors import ModelCorrupt, ModelError, ModelUnsupported
from anabranch.models.checks import truncated

VERSIONS = (2, 3)
_FIXED = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class GgufTensor:
    """One row of the tensor table. ``offset`` counts bytes from the start of the data."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    size: int

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """A checked file. Arrays in ``metadata`` are represented by their length only."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]
    size: int

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, such as ``llama`` or ``qwen2``."""
        return str(self.metadata["general.architecture"])

    @property
    def parameters(self) -> int:
        """Values in all tensors; tables that can be recomputed do not count."""
        return sum(t.elements for t in self.tensors if not t.name.startswith("rope_"))

    @property
    def encoding(self) -> str:
        """The tensor type that most values are stored in, such as ``Q4_1``."""
        return self._values_by_type().most_common(1)[0][0]

    @property
    def packed(self) -> bool:
        """Whether some tensor is stored in blocks of small integers, not in floats."""
        return not set(self._values_by_type()) <= set(_STORED)

    @property
    def dtype(self) -> str:
        """The type to convert to: the stored one if it is a float, else bfloat16."""
        if self.packed:
            return "bfloat16"
        types = self._values_by_type()
        # Norms are float32 beside half-precision matrices: the half type is the model's.
        return _STORED[next((t for t in ("BF16", "F16") if t in types), "F32")]

    @property
    def context_length(self) -> int | None:
        """Tokens, if the file says so."""
        value = self.metadata.get(f"{self.architecture}.context_length")
        return int(value) if isinstance(value, int) else None

    def _values_by_type(self) -> Counter[str]:
        count: Counter[str] = Counter()
        for tensor in self.tensors:
            count[tensor.type] += tensor.elements
        return count


def read_header(path: Path) -> GgufHeader:
    """Read and check a GGUF file's header against the file's size.

    Raises :class:`ModelCorrupt` for a wrong magic or a file that ends early (with expected and
    actual bytes), :class:`ModelUnsupported` for versions and tensor types that are not known.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            magic = file.read(4)
            if magic != b"GGUF"[: len(magic)] or not magic:
                raise ModelCorrupt(f"{path} is not a GGUF file: it starts with {magic!r}")
            if size < 24:
                raise truncated(path, 24, size, at_least=True)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data, size).header()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error


class _Reader:
    """A position in the file that may not run past its end."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self._path, self._data, self._size, self._position = path, data, size, 4

    def header(self) -> GgufHeader:
        version = self._one("I")
        if version not in VERSIONS:
            raise ModelUnsupported(
                f"{self._path} has GGUF version {version}; versions {VERSIONS} are understood"
            )
        tensor_count, metadata_count = self._one("Q"), self._one("Q")
        metadata: dict[str, Any] = {}
        for _ in range(metadata_count):
            key = self._string()
            metadata[key] = self._value(self._one("I"))
        if not isinstance(metadata.get("general.architecture"), str):
            raise ModelCorrupt(f"{self._path} does not name its architecture")
        tensors = tuple(self._tensor() for _ in range(tensor_count))
        if not tensors:
            raise ModelCorrupt(f"{self._path} holds no tensors (a vocabulary alone is no model)")
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ModelCorrupt(f"{self._path} has the impossible alignment {alignment!r}")
        data_start = -(-self._position // alignment) * alignment
        expected = data_start + max(t.offset + t.size for t in tensors)
        if self._size < expected:
            raise truncated(self._path, expected, self._size)
        return GgufHeader(self._path, metadata, tensors, self._size)

    def _tensor(self) -> GgufTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self._string()
        rank = self._one("I")
        if rank > 8:
            raise ModelCorrupt(f"{self._path}: tensor {name!r} claims to have {rank} dimensions")
        # GGUF writes the fastest dimension first.
        shape = tuple(reversed([self._one("Q") for _ in range(rank)]))
        number, offset = self._one("I"), self._one("Q")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError as error:
            raise ModelUnsupported(
                f"{self._path}: tensor {name!r} has type {number}, which the installed gguf "
                f"package does not know"
            ) from error
        block, block_bytes = GGML_QUANT_SIZES[kind]
        return GgufTensor(name, shape, kind.name, offset, math.prod(shape) // block * block_bytes)

    def _value(self, kind: int) -> Any:
        if kind in _FIXED:
            return self._one(_FIXED[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise ModelCorrupt(f"{self._path}: metadata of unknown type {kind}")
        kind, count = self._one("I"), self._one("Q")
        if kind in _FIXED:
            self._skip(count * struct.calcsize("<" + _FIXED[kind]))
        elif kind == _STRING:
            for _ in range(count):
                self._skip(self._one("Q"))
        else:
            raise ModelUnsupported(f"{self._path}: a metadata array of type {kind}")
        return count

    def _string(self) -> str:
        length = self._one("Q")
        start = self._position
        self._skip(length)
        return self._data[start : start + length].decode("utf-8", errors="replace")

    def _one(self, code: str) -> Any:
        start = self._position
        self._skip(struct.calcsize("<" + code))
        return struct.unpack_from("<" + code, self._data, start)[0]

    def _skip(self, size: int) -> None:
        if size > self._size - self._position:
            raise truncated(self._path, self._position + size, self._size, at_least=True)
        self._position += size
