"""Short texts with 15 to 20 human ratings each: polarity of tweets, films, products, newspapers.

The data are those of VADER (Hutto and Gilbert, ICWSM 2014), inside the source distribution of the
package ``vaderSentiment`` 3.3.2 (MIT). They are fetched once with pip, which checks the SHA-256,
and kept in the cache folder; nothing of the package is installed.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anabranch.evaluation.package_archive import package_archive
from anabranch.models.progress import Progress, silent
from anabranch.training.errors import DataError

LABELS = ("negative", "neutral", "positive")
DOMAINS = {
    "tweets": "tweets",
    "film": "movieReviewSnippets",
    "product": "amazonReviewSnippets",
    "newspaper": "nytEditorialSnippets",
}
_ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"


@dataclass(frozen=True)
class RatedText:
    """A text with its raters' scores, -4 to 4. ``label`` is that of the mean score."""

    text: str
    domain: str
    label: str
    ratings: tuple[str, ...]
    """Each rater's own label."""


def rated_texts(progress: Progress = silent) -> list[RatedText]:
    """All texts of the four domains, in the order of the files.

    Raises :class:`DataError` if the archive is not there and cannot be fetched, or is damaged.
    """
    path = package_archive("vaderSentiment==3.3.2", _ARCHIVE, _SHA256, progress)
    try:
        with tarfile.open(path) as outer:
            inner = outer.extractfile(_INNER)
            assert inner is not None
            with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
                return [text for domain in DOMAINS for text in _domain(archive, domain)]
    except (tarfile.TarError, KeyError, ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}; delete it to fetch it again") from error


def polarity(score: float) -> str:
    """Negative below -0.5, positive above 0.5, neutral between."""
    return LABELS[int(score >= -0.5) + int(score > 0.5)]


def stratified(texts: Sequence[RatedText], count: int, seed: int) -> list[RatedText]:
    """``count`` texts drawn at random, as many from every domain (one more from the first few)."""
    generator = np.random.default_rng(seed)
    queues = []
    for domain in sorted({text.domain for text in texts}):
        own = [text for text in texts if text.domain == domain]
        queues.append([own[i] for i in generator.permutation(len(own))])
    if count > sum(map(len, queues)):
        raise DataError(f"{count} texts are wanted, there are {sum(map(len, queues))}")
    drawn: list[RatedText] = []
    while len(drawn) < count:
        for queue in queues:
            if queue and len(drawn) < count:
                drawn.append(queue.pop())
    return drawn


def made_texts(count: int, seed: int) -> list[RatedText]:
    """Stand-ins where nothing can be fetched: sentences made of opinion words, with made raters."""
    generator = np.random.default_rng(seed)
    words = {
        "negative": ["awful", "boring", "broken", "dreadful", "useless", "disappointing"],
        "neutral": ["blue", "rectangular", "recent", "available", "metallic", "Norwegian"],
        "positive": ["brilliant", "charming", "excellent", "lovely", "superb", "delightful"],
    }
    things = ["film", "camera", "novel", "phone", "restaurant", "article", "concert", "printer"]
    found = []
    for _ in range(count):
        label = LABELS[generator.integers(3)]
        text = f"The {generator.choice(things)} was {generator.choice(words[label])}."
        ratings = [
            label if generator.random() < 0.8 else LABELS[generator.integers(3)] for _ in range(15)
        ]
        found.append(RatedText(text, "made", label, tuple(ratings)))
    return found


def _domain(archive: tarfile.TarFile, domain: str) -> list[RatedText]:
    texts = _table(archive, f"{DOMAINS[domain]}_GroundTruth.txt")
    ratings = _table(archive, f"{DOMAINS[domain]}_anonDataRatings.txt")
    found = []
    for key, (_, text) in texts.items():
        scores = json.loads(ratings[key][-1])
        own = tuple(polarity(score) for score in scores)
        found.append(RatedText(text, domain, polarity(float(np.mean(scores))), own))
    return found


def _table(archive: tarfile.TarFile, name: str) -> dict[str, list[str]]:
    """Id -> the other columns; the last column may hold tabs."""
    file = archive.extractfile(f"hutto_ICWSM_2014/{name}")
    assert file is not None
    columns = 2 if name.endswith("GroundTruth.txt") else 3
    lines = file.read().decode("utf-8-sig", errors="replace").splitlines()
    rows = (line.split("\t", columns) for line in lines if line.strip())
    return {key: rest for key, *rest in rows}
