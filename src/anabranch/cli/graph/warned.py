"""Warnings of the library as lines on standard error."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from anabranch.cli.output import errors


@contextmanager
def shown_warnings() -> Iterator[None]:
    """What is warned of inside is printed afterwards, each once, without its place in the code."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for message in dict.fromkeys(str(w.message) for w in caught if w.category is UserWarning):
        errors.print(f"warning: {message}", style="yellow")
