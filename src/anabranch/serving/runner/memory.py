"""Memory for caches."""

from __future__ import annotations

import ctypes
import math
import sys

import numpy as np
import torch
from torch import Tensor


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that on a CPU take physical memory only where they are written.

    ``torch.zeros`` writes every page at once, which takes seconds for gigabytes.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)


def return_free_memory() -> None:
    """Give memory that was freed in small pieces, such as repacked weights, back to the system.

    The allocator of Linux keeps it otherwise: hundreds of megabytes after a model was packed.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
        if trim is not None:
            trim(0)
