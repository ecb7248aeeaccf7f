"""Reading rows from files, folders, built-in sets and generators."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import json
import lzma
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from anabranch.errors import MissingExtra, UnknownName
from anabranch.models.cache import file_sha256
from anabranch.training.data.generators import generate
from anabranch.training.errors import DataError
from anabranch.training.recipe import Data

DATA_FOLDER = "ANABRANCH_DATA"
"""Environment variable: the folder of built-in sets."""

SPLIT_OF_FILE = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
}
"""First word of a file name in a data set's folder -> split."""

_FORMAT_OF_SUFFIX = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
_PACKED = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A row as it was read. ``split`` is set if the row's file is named after one."""

    row: Mapping[str, Any]
    where: str
    split: str | None = None


@dataclass(frozen=True)
class Source:
    """All rows of a source, and what identifies its content."""

    rows: list[SourceRow]
    fingerprint: str
    note: str = ""


def read(data: Data, seed: int) -> Source:
    """The rows of one source of a recipe, columns already mapped.

    Raises :class:`DataError` naming file and line, or how to get what is missing.
    """
    source, options, note = data.source, data.options, ""
    if source.startswith("builtin:") and data.fallback is not None and not _builtin_root():
        note = (
            f"{DATA_FOLDER} is not set: rows of {data.fallback} stand in for {source}; "
            f"figures are about generated text"
        )
        source, options = data.fallback, data.fallback_options
    if source.startswith("generator:"):
        rows = [
            SourceRow(row, f"{source}:{number}")
            for number, row in enumerate(generate(source.partition(":")[2], seed, options), 1)
        ]
        content = json.dumps([row.row for row in rows], sort_keys=True)
        found = Source(rows, hashlib.sha256(content.encode()).hexdigest(), note)
    elif source.startswith("builtin:"):
        found = _read_files([(_builtin(source.partition(":")[2]), None)], data)
    else:
        assert data.path is not None
        found = _read_files(_files(data.path, source), data)
    return Source([_mapped(row, data.map) for row in found.rows], found.fingerprint, note)


def open_text(path: Path) -> IO[str]:
    """A text file, unpacked on the way if its name ends in .xz, .gz or .bz2."""
    opener: Any = _PACKED.get(path.suffix, open)
    return cast("IO[str]", opener(path, "rt", encoding="utf-8-sig", newline=""))


def _files(path: Path, source: str) -> list[tuple[Path, str | None]]:
    """The files of a source, each with its split if it is named after one."""
    if not path.exists():
        siblings = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        there = f"; there are {', '.join(siblings[:8])}" if siblings else ""
        raise DataError(f"there is no {path}{there}")
    if source != "hf-dir":
        if path.is_dir():
            raise DataError(f"{path} is a folder; source: hf-dir reads one")
        return [(path, None)]
    if (path / "dataset_info.json").is_file() and list(path.glob("*.arrow")):
        raise DataError(f"{path} was written by save_to_disk; export it with to_parquet or to_json")
    found = sorted(
        file
        for folder in (path, path / "data")
        if folder.is_dir()
        for file in folder.iterdir()
        if file.is_file() and _format(file) in ("jsonl", "csv", "parquet")
    )
    if not found:
        raise DataError(
            f"{path} holds no .jsonl, .csv or .parquet file, nor does a folder data in it"
        )
    return [(file, SPLIT_OF_FILE.get(re.split(r"[^a-z]", file.name.lower())[0])) for file in found]


def _read_files(files: list[tuple[Path, str | None]], data: Data) -> Source:
    rows: list[SourceRow] = []
    for path, split in files:
        kind = data.source if data.source in _READERS else _format(path)
        if kind not in _READERS:
            raise DataError(f"{path}: rows are read from {', '.join(_FORMAT_OF_SUFFIX)} files")
        try:
            rows += [SourceRow(row, where, split) for row, where in _READERS[kind](path, data)]
        except (OSError, UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
            raise DataError(f"{path} cannot be read: {error}") from error
    digests = [file_sha256(path) for path, _ in files]
    if len(digests) == 1:
        return Source(rows, digests[0])
    return Source(rows, hashlib.sha256("".join(digests).encode()).hexdigest())


def _format(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix not in _PACKED]
    return _FORMAT_OF_SUFFIX.get(suffixes[-1]) if suffixes else None


def _jsonl(path: Path, data: Data) -> Iterator[tuple[Mapping[str, Any], str]]:
    with open_text(path) as file:
        if path.suffix == ".json":
            yield from _json_array(file.read(), path)
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number} is not JSON: {error}") from error
            yield _object(value, f"{path}:{number}"), f"{path.name}:{number}"


def _json_array(text: str, path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}; one object a line is .jsonl") from error
    if not isinstance(values, list):
        raise DataError(f"{path} must hold a list of objects, not {type(values).__name__}")
    for number, value in enumerate(values, 1):
        yield _object(value, f"{path}, entry {number}"), f"{path.name}[{number}]"


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where} must be an object with columns, not {type(value).__name__}")
    return value


def _csv(path: Path, data: Data) -> Iterator[tuple[Mapping[str, Any], str]]:
    with open_text(path) as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    wanted = len(reader.fieldnames or ())
                    raise DataError(f"{path}:{reader.line_num} does not have {wanted} columns")
                yield row, f"{path.name}:{reader.line_num}"
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num} is not CSV: {error}") from error


def _parquet(path: Path, data: Data) -> Iterator[tuple[Mapping[str, Any], str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra("pyarrow", "parquet") from error
    try:
        table = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield row, f"{path.name}:{number}"
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a Parquet file: {error}") from error


def _text(path: Path, data: Data) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Files, paragraphs or lines, joined until each row has ``unit_chars`` characters."""
    with open_text(path) as file:
        joined: list[str] = []
        first = 1
        for number, unit in _units(file, data.unit):
            first = first if joined else number
            joined.append(unit)
            if sum(map(len, joined)) >= data.unit_chars:
                yield {"text": _join(joined, data.unit)}, f"{path.name}:{first}"
                joined = []
        if joined:
            yield {"text": _join(joined, data.unit)}, f"{path.name}:{first}"


def _units(lines: Iterable[str], unit: str) -> Iterator[tuple[int, str]]:
    """First line number and text of each unit that is not blank."""
    if unit == "line":
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, line.rstrip("\r\n")
        return
    held: list[str] = []
    first = 1
    for number, line in enumerate(lines, 1):
        if unit == "paragraph" and not line.strip():
            if held:
                yield first, "".join(held).strip("\r\n")
            held = []
        else:
            first = first if held else number
            held.append(line)
    if held:
        yield first, "".join(held).strip("\r\n")


def _join(units: list[str], unit: str) -> str:
    return ("\n" if unit == "line" else "\n\n").join(units)


_READERS = {"jsonl": _jsonl, "csv": _csv, "parquet": _parquet, "text": _text}


def _builtin_root() -> str | None:
    return os.environ.get(DATA_FOLDER)


def _builtin(identifier: str) -> Path:
    """``gsm8k/train`` -> the file below ANABRANCH_DATA, whatever its suffixes."""
    root = _builtin_root()
    if not root:
        raise DataError(
            f"builtin:{identifier} needs the environment variable {DATA_FOLDER}, a folder with one "
            f"folder for each set; without it use another source, or add a fallback: generator:..."
        )
    name, _, file = identifier.partition("/")
    folder = Path(root).expanduser() / name
    if not folder.is_dir():
        known = [p.name for p in Path(root).expanduser().glob("*") if p.is_dir()]
        raise UnknownName(f"built-in set below {root}", name, known)
    files = {
        path.name.removesuffix(_suffixes(path)): path
        for path in folder.iterdir()
        if _format(path) is not None and path.name != "SOURCE.txt"
    }
    if not file and len(files) == 1:
        return next(iter(files.values()))
    if file not in files:
        raise UnknownName(f"file of the built-in set {name}", file or "(none)", files)
    return files[file]


def _suffixes(path: Path) -> str:
    """``.jsonl.xz`` of ``arc.train.jsonl.xz``."""
    packed = path.suffix if path.suffix in _PACKED else ""
    return Path(path.name.removesuffix(packed)).suffix + packed


def _mapped(row: SourceRow, columns: Mapping[str, str]) -> SourceRow:
    if not columns:
        return row
    for wanted, given in columns.items():
        if given not in row.row:
            raise DataError(
                f"{row.where}: map: {{{wanted}: {given}}} names a column that is not there; the "
                f"row has {', '.join(map(str, row.row)) or '(none)'}"
            )
    used = set(columns.values())
    kept = {key: value for key, value in row.row.items() if key not in used}
    mapped = {wanted: row.row[given] for wanted, given in columns.items()}
    return SourceRow({**kept, **mapped}, row.where, row.split)
