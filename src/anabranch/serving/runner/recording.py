"""Which rows of a packed batch are recorded for training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from anabranch.serving.sequence import Recorder, Segment


class Recording(NamedTuple):
    """Rows of the batch, and the position in its sequence of the first of them."""

    recorder: Recorder
    start: int
    rows: slice


def recordings(segments: Sequence[Segment], query_start: np.ndarray) -> Iterator[Recording]:
    """The recorded segments of a batch."""
    for number, segment in enumerate(segments):
        recorder = segment.sequence.recorder
        if recorder is not None:
            rows = slice(int(query_start[number]), int(query_start[number + 1]))
            yield Recording(recorder, segment.start, rows)
