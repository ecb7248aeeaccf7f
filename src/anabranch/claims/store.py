"""Results of claims on this machine: one file each, added and never changed.

::

    <cache root>/claims/<id>/<finished>-<random>.json
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path

from anabranch.claims.base import ClaimResult
from anabranch.errors import AnabranchError
from anabranch.models.cache import root, slug


@dataclass(frozen=True)
class Unreadable:
    """A file among the results that holds none, and why."""

    path: Path
    reason: str


def folder() -> Path:
    """Where results are kept."""
    return root() / "claims"


def save(result: ClaimResult) -> Path:
    """Keep a result beside the earlier ones; the file appears complete or not at all."""
    moment = result.finished.replace(":", "").replace("+0000", "Z")
    home = folder() / slug(result.id)
    path = home / f"{slug(moment)}-{secrets.token_hex(4)}.json"
    text = json.dumps(result.to_dict(), indent=2) + "\n"
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=home, suffix=".partial", encoding="utf-8"
        ) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            # A link, unlike a rename, never replaces what is there.
            path.hardlink_to(file.name)
    except OSError as error:
        raise AnabranchError(
            f"cannot keep the result of {result.id} below {home}: {error}; "
            f"set ANABRANCH_CACHE to a folder that can be written"
        ) from error
    return path


def history() -> tuple[dict[str, list[ClaimResult]], list[Unreadable]]:
    """All results by claim id, oldest first, and the files that hold none."""
    found: dict[str, list[ClaimResult]] = {}
    unreadable = []
    for path in sorted(folder().glob("*/*.json")):
        try:
            result = ClaimResult.from_dict(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            unreadable.append(Unreadable(path, f"{type(error).__name__}: {error}"))
            continue
        found.setdefault(result.id, []).append(result)
    for results in found.values():
        results.sort(key=lambda result: result.finished)
    return dict(sorted(found.items())), unreadable
