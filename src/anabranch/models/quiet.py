"""The one door to transformers' loaders: one thread at a time, and nothing on the terminal."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers inside the block; afterwards its settings are as they were.

    What it would have warned about (missing or mismatched tensors) must be checked by the caller.
    The block also excludes other threads: ``from_pretrained`` swaps methods of shared classes
    while it runs, and two at once leave them swapped (tied embeddings then count as missing).
    """
    from transformers.utils import logging

    with _one_at_a_time:
        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
