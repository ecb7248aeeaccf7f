"""A job's rows as tokens: rendered once when the job is created, and kept in the job's folder.

So a job does not change when its file is deleted or the tokenizer is updated, and one that is
taken up again trains on the very tokens that it began with.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from anabranch.api.fine_tuning.rows import BadRow, read_rows
from anabranch.errors import InvalidRequest
from anabranch.files import sync
from anabranch.training.errors import DataError
from anabranch.training.example import Example, Item
from anabranch.training.filtering import RowPolicy, filter_rows
from anabranch.training.objective import Prepared
from anabranch.training.tasks.chat import Chat
from anabranch.training.template import Template


def render(
    path: Path, name: str, template: Template, policy: RowPolicy, field: str
) -> Prepared[Item]:
    """Tokens and marks of every row of a checked file, five bytes a token.

    ``name`` is the file's name for messages. Raises :class:`InvalidRequest` for ``field`` with the
    lines that the chat template refuses, that are too long, or that leave nothing to train on.
    """
    try:
        prepared = filter_rows(list(_items(path, name, template)), policy)
    except (DataError, BadRow) as error:
        raise InvalidRequest(field, str(error)) from None
    if not prepared.items:
        raise InvalidRequest(field, f"{name} has no row left to train on: {prepared.dropped}")
    return Prepared([tuple(map(_compact, item)) for item in prepared.items], prepared.dropped)


def save(path: Path, items: Sequence[Item]) -> None:
    """Write items of one example each. It is on the disk when this returns."""
    from safetensors.numpy import save_file

    examples = [example for (example,) in items]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.tmp")
    save_file(
        {
            "tokens": _joined([e.tokens for e in examples], np.int32),
            "trained": _joined([e.trained for e in examples], np.int8),
            "lengths": np.array([len(e) for e in examples], dtype=np.int64),
            "sources": np.frombuffer("\n".join(e.source for e in examples).encode(), np.uint8),
        },
        draft,
    )
    sync(draft)
    draft.replace(path)
    sync(path.parent)


def load(path: Path) -> list[Item]:
    """What :func:`save` wrote."""
    from safetensors.numpy import load_file

    tensors = load_file(path)
    sources = tensors["sources"].tobytes().decode().split("\n")
    ends = np.cumsum(tensors["lengths"])
    items: list[Item] = []
    for source, start, end in zip(sources, ends - tensors["lengths"], ends, strict=True):
        tokens = array("i", tensors["tokens"][start:end].tobytes())
        trained = _marks(tensors["trained"][start:end].tobytes())
        items.append((Example(tokens, trained, source=source),))
    return items


def _items(path: Path, name: str, template: Template) -> Iterator[Item]:
    task = Chat()
    for line, row in read_rows(path):
        (rendered,) = task.render(row)
        yield (_compact(template.example(rendered, source=f"{name}:{line}")),)


def _compact(example: Example) -> Example:
    """The same as arrays: a list of Python numbers takes seven times as much."""
    if isinstance(example.tokens, array) and isinstance(example.trained, array):
        return example
    return Example(
        array("i", example.tokens), _marks(bytes(example.trained)), example.task, example.source
    )


def _marks(ones: bytes) -> Sequence[bool]:
    """0 and 1, a byte each, as truth values; unlike bytes, NumPy and torch read an array well."""
    return cast("Sequence[bool]", array("b", ones))


def _joined(parts: Sequence[Sequence[int]], dtype: type) -> np.ndarray:
    joined: np.ndarray = np.empty(sum(map(len, parts)), dtype)
    start = 0
    for part in parts:
        joined[start : start + len(part)] = part
        start += len(part)
    return joined
