"""C++ that is compiled on first use: for this processor, once, below Anabranch's cache.

Knows nothing of what is compiled. Callers keep the same operations in plain Python, for machines
without a compiler and as the reference of their tests.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from anabranch.models import cache

logger = logging.getLogger(__name__)

FLAGS = ("-O3", "-march=native", "-std=c++20", "-shared", "-fPIC")
"""Of every library, before its own."""


def compiler() -> str | None:
    """``$CXX``, else g++ or clang++, else None."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def build(
    compiler: str,
    name: str,
    source: Path,
    flags: Sequence[str] = (),
    *,
    after: Sequence[str] = (),
    version: str = "",
) -> Path:
    """The shared library of one source file, compiled unless the cache has it.

    It is compiled again for another source, other ``flags``, compiler or processor, or another
    ``version`` of what it is linked with. ``after`` are flags that name places on this machine
    (``-I``, ``-L``, ``-l``), which decide nothing. Raises :class:`subprocess.CalledProcessError`
    with the compiler's output in ``stderr``.
    """
    made_by = _output([compiler, "--version"])
    parts = [source.read_text(), *FLAGS, *flags, version, made_by, _processor()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = cache.root() / "kernels"
    library = folder / f"{name}-{key}.so"
    if library.exists():
        return library
    logger.info("compiling %s, once", source.name)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{name}-{key}-{os.getpid()}.so"
    try:
        _output([compiler, *FLAGS, *flags, str(source), "-o", str(partial), *after])
        partial.rename(library)
    finally:
        partial.unlink(missing_ok=True)
    return library


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _processor() -> str:
    """What ``-march=native`` depends on: a cache may be shared by different machines."""
    import torch

    return repr(sorted(torch.cpu.get_capabilities().items()))
