"""Random numbers that belong to what they are for, not to the order in which they are drawn.

Nothing here has a state: whoever asks with the same words gets the same numbers, so that results do
not depend on which client happens to run first, and a resumed run needs no generator from before.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*words: int | str) -> int:
    """A number below 2**63 from a run's seed and what it is for."""
    text = "\0".join(f"{type(word).__name__}:{word}" for word in words)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*words: int | str) -> np.random.Generator:
    """A generator of its own for one purpose."""
    return np.random.default_rng(derive_seed(*words))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and torch's own generators begin at this seed, and are put back after.

    Quick enough for every task of a thousand clients.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # torch.manual_seed would keep a stack trace for a GPU that is not there.
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if gpus is not None:
        torch.cuda.manual_seed_all(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
        if gpus is not None:
            torch.cuda.set_rng_state_all(gpus)
