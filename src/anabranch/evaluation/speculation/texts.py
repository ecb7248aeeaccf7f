"""Texts that a language model finds neither trivial nor foreign."""

from __future__ import annotations

import inspect
import json
import lzma
import os
from importlib import import_module
from pathlib import Path
from typing import Any

MODULES = (
    *("abc", "argparse", "ast", "base64", "bisect", "calendar", "cmd", "codecs", "colorsys"),
    *("configparser", "contextlib", "copy", "csv", "dataclasses", "difflib", "dis", "doctest"),
    *("enum", "filecmp", "fileinput", "fnmatch", "fractions", "ftplib", "functools", "getopt"),
    *("glob", "graphlib", "gzip", "heapq", "hmac", "inspect", "ipaddress", "keyword", "locale"),
    *("mailbox", "mimetypes", "numbers", "operator", "optparse", "pickle", "platform", "pprint"),
    *("queue", "random", "sched", "shlex", "shutil", "statistics", "string", "tarfile"),
    *("tempfile", "textwrap", "timeit", "tokenize", "trace", "typing", "uuid", "zipfile"),
)


def prompts(tokenizer: Any, count: int, tokens: int) -> list[list[int]]:
    """The first ``tokens`` tokens of ``count`` texts, none shorter.

    Questions of Spec-Bench from the folder that ANABRANCH_DATA names, spread over its tasks; where
    it is not at hand, modules of Python's standard library.
    """
    folder = os.environ.get("ANABRANCH_DATA")
    file = Path(folder or ".") / "spec-bench" / "question.jsonl.xz"
    if folder and file.exists():
        with lzma.open(file, "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["turns"][0] for line in lines]
    else:
        texts = [inspect.getsource(import_module(name)) for name in MODULES]
    rows = [tokenizer(text[: 16 * tokens])["input_ids"][:tokens] for text in texts]
    rows = [row for row in rows if len(row) == tokens]
    return rows[:: max(1, len(rows) // count)][:count]
