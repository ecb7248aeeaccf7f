"""Keeps transformers from writing progress bars and advice to the terminal."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

_lock = threading.Lock()
_inside = 0
_before: tuple[int, bool] = (0, False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers inside the block; afterwards its settings are as they were.

    What it would have warned about (missing or mismatched tensors) must be checked by the caller.
    """
    from transformers.utils import logging

    global _inside, _before
    with _lock:  # loads in several threads: the first one saves, the last one restores
        _inside += 1
        if _inside == 1:
            _before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
            logging.set_verbosity_error()
            logging.disable_progress_bar()
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                logging.set_verbosity(_before[0])
                if _before[1]:
                    logging.enable_progress_bar()
