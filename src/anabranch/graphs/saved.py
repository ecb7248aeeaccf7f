"""Estimators as one file: arrays, and what they mean beside them as JSON. Loading runs no code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.files import replacing
from anabranch.graphs.errors import GraphError


def save(path: str | os.PathLike[str], facts: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Write both, or neither."""
    with replacing(Path(path)) as draft, draft.open("wb") as file:
        np.savez(file, facts=json.dumps(facts, default=list), **arrays)


def load(
    path: str | os.PathLike[str], what: str, version: int, error: type[GraphError] = GraphError
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Facts and arrays of a saved ``what`` whose facts name this version of the format."""
    try:
        with np.load(path, allow_pickle=False) as file:
            facts = json.loads(str(file["facts"]))
            arrays = {name: file[name] for name in file if name != "facts"}
    except FileNotFoundError:
        raise error(f"there is no file {path}") from None
    except Exception as reason:  # zip, json and numpy each raise their own
        raise error(f"{path} is no saved {what}: {reason}") from None
    if facts.get("format") != version:
        raise error(f"{path} has the format {facts.get('format')}, not {version}")
    return facts, arrays
