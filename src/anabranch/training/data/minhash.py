"""Near-duplicates in one pass: MinHash signatures, banded, and every candidate checked exactly.

Broder, "On the resemblance and containment of documents", 1997; banding as in Leskovec, Rajaraman
and Ullman, "Mining of Massive Datasets", section 3.4.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter, defaultdict

import numpy as np
from numpy.typing import NDArray

SHINGLE = 5
BANDS, ROWS = 25, 5
"""Texts of similarity s become candidates with probability 1 - (1 - s^ROWS)^BANDS: 0.99995 at 0.8,
0.55 at 0.5."""
BUCKET = 64
"""Texts remembered for one band value, the first ones. It bounds the work for data whose rows all
share their wording; a duplicate has several other bands in which to be found."""
CANDIDATES = 32
"""Candidates checked for a text: those that share most bands, so most likely the closest."""

Shingles = NDArray[np.uint64]


def normalise(text: str) -> str:
    """Compatibility-composed, case-folded, white space as single blanks. Punctuation counts."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def shingles(text: str) -> Shingles:
    """Sorted distinct hashes of the runs of five words; a shorter text is one shingle."""
    words = normalise(text).split(" ")
    runs = {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}
    hashes = (hashlib.blake2b(run.encode(), digest_size=8).digest() for run in runs)
    return np.sort(np.frombuffer(b"".join(hashes), dtype=np.uint64))


def jaccard(a: Shingles, b: Shingles) -> float:
    """Size of the intersection over size of the union."""
    common = np.intersect1d(a, b, assume_unique=True).size
    return float(common / (a.size + b.size - common))


class NearDuplicates:
    """Finds, for each text in turn, an earlier one that is more similar than ``threshold``."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        generator = np.random.default_rng(0x5EED)
        # Multiply-shift hashing (Dietzfelbinger et al. 1997): odd factors modulo 2^64.
        count = BANDS * ROWS
        self._factors = generator.integers(0, 2**64, count, dtype=np.uint64) | np.uint64(1)
        self._offsets = generator.integers(0, 2**64, count, dtype=np.uint64)
        self._kept: list[Shingles] = []
        self._names: list[str] = []
        self._buckets: list[dict[bytes, list[int]]] = [defaultdict(list) for _ in range(BANDS)]

    def add(self, text: str, name: str) -> str | None:
        """The name of an earlier text like this one; None if it is new, and it is remembered."""
        mine = shingles(text)
        keys = self._bands(mine)
        shared: Counter[int] = Counter()
        for bucket, key in zip(self._buckets, keys, strict=True):
            shared.update(bucket.get(key, ()))
        for candidate, _ in shared.most_common(CANDIDATES):
            if jaccard(mine, self._kept[candidate]) > self._threshold:
                return self._names[candidate]
        for bucket, key in zip(self._buckets, keys, strict=True):
            if len(members := bucket[key]) < BUCKET:
                members.append(len(self._kept))
        self._kept.append(mine)
        self._names.append(name)
        return None

    @property
    def largest_bucket(self) -> int:
        """Most texts that one band value remembers, which bounds the work for the next text."""
        return max((len(m) for bucket in self._buckets for m in bucket.values()), default=0)

    def _bands(self, mine: Shingles) -> list[bytes]:
        """The signature cut into bands. Hashes are taken in blocks: a book has many shingles."""
        signature = np.full(BANDS * ROWS, np.iinfo(np.uint64).max, dtype=np.uint64)
        for start in range(0, mine.size, 4096):
            block = mine[start : start + 4096, None]  # [shingles, 1]
            hashed = (block * self._factors + self._offsets) >> np.uint64(16)
            np.minimum(signature, hashed.min(axis=0), out=signature)
        return [band.tobytes() for band in signature.reshape(BANDS, ROWS)]
