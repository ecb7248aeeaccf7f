"""Operations of the fused runner: C++ where a compiler exists, the same in plain PyTorch elsewhere.

``load()`` returns the best set that works here. Both sets have the functions of
:mod:`~anabranch.serving.kernels.reference`, with the same arguments and layouts; the reference is
also what the C++ is tested against.
"""

from __future__ import annotations

import functools
import logging
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anabranch.compiled import build, compiler
from anabranch.serving.kernels import reference

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = ("-ffp-contract=fast", "-fopenmp", "-DAT_PARALLEL_OPENMP=1")


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
    found = compiler()
    if found is None:
        logger.warning("no C++ compiler: the fused runner would use plain PyTorch, which is slow")
        return plain
    try:
        torch.ops.load_library(_built(found))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or error
        logger.warning("the fused runner's kernels do not build, so it is slow: %s", detail)
        return plain
    return Operations.of(torch.ops.anabranch, compiled=True)


def _built(compiler: str) -> Path:
    """The kernels for this processor and this torch."""
    folder = Path(torch.__file__).parent
    after = (
        *(f"-I{folder / path}" for path in ("include", "include/torch/csrc/api/include")),
        f"-L{folder / 'lib'}",
        "-ltorch_cpu",
        "-lc10",
    )
    return build(compiler, "cpu", SOURCE, FLAGS, after=after, version=torch.__version__)
