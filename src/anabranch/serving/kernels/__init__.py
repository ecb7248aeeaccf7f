"""Operations of the fused runner: C++ where a compiler exists, the same in plain PyTorch elsewhere.

``load()`` returns the best set that works here. Both sets have the functions of
:mod:`~anabranch.serving.kernels.reference`, with the same arguments and layouts; the reference is
also what the C++ is tested against.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anabranch.models import cache
from anabranch.serving.kernels import reference

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fopenmp",
    "-std=c++20",
    "-shared",
    "-fPIC",
    "-DAT_PARALLEL_OPENMP=1",
)


@dataclass
class Operations:
    """One set of the operations, by the names and signatures of the reference."""

    add_rms_norm: Callable[..., Tensor]
    silu_mul: Callable[..., Tensor]
    linear_bfloat16: Callable[..., Tensor]
    linear_int8: Callable[..., Tensor]
    transposed_bfloat16: Callable[..., Tensor]
    transposed_int8: Callable[..., Tensor]
    add_lora: Callable[..., None]
    attention: Callable[..., Tensor]
    compiled: bool

    @classmethod
    def of(cls, source: Any, compiled: bool) -> Operations:
        """Take them from a module or namespace."""
        names = [item.name for item in fields(cls) if item.name != "compiled"]
        return cls(**{name: getattr(source, name) for name in names}, compiled=compiled)


@functools.cache
def load() -> Operations:
    """The C++ operations, built on first use (about 15 seconds), or the reference.

    Which one and why is said in the log.
    """
    plain = Operations.of(reference, compiled=False)
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        logger.warning("no C++ compiler: the fused runner would use plain PyTorch, which is slow")
        return plain
    try:
        torch.ops.load_library(build(compiler))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or error
        logger.warning("the fused runner's kernels do not build, so it is slow: %s", detail)
        return plain
    return Operations.of(torch.ops.anabranch, compiled=True)


def build(compiler: str) -> Path:
    """Compile the kernels for this processor, once for each source, torch and compiler.

    Raises :class:`subprocess.CalledProcessError` with the compiler's output.
    """
    torch_folder = Path(torch.__file__).parent
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True
    ).stdout
    key = hashlib.sha256(
        "\0".join([SOURCE.read_text(), *FLAGS, torch.__version__, version, _processor()]).encode()
    ).hexdigest()[:16]
    folder = cache.root() / "kernels"
    library = folder / f"cpu-{key}.so"
    if library.exists():
        return library
    logger.info("building the CPU kernels, once")
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".cpu-{key}-{os.getpid()}.so"
    try:
        subprocess.run(
            [
                compiler,
                *FLAGS,
                str(SOURCE),
                "-o",
                str(partial),
                *(f"-I{torch_folder / path}" for path in _INCLUDES),
                f"-L{torch_folder / 'lib'}",
                "-ltorch_cpu",
                "-lc10",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        partial.rename(library)
    finally:
        partial.unlink(missing_ok=True)
    return library


_INCLUDES = ("include", "include/torch/csrc/api/include")


def _processor() -> str:
    """What ``-march=native`` depends on: a cache may be shared by different machines."""
    return repr(sorted(torch.cpu.get_capabilities().items()))
