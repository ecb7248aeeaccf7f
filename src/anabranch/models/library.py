"""The models on this machine: describe, list, fetch, remove, and make ready to load."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from anabranch.errors import AnabranchError, ModelCorrupt, ModelError, ModelNotFound
from anabranch.models import cache, facts, gguf, packaged
from anabranch.models.card import ModelCard
from anabranch.models.checks import Contents, check_folder
from anabranch.models.progress import Progress, silent
from anabranch.models.source import Cached, Folder, Gguf, Hub, Source, not_found, resolve

log = logging.getLogger("anabranch.models")


def card(name: str) -> ModelCard:
    """The facts about a model, from headers only: no weights are loaded, nothing is converted.

    ``size_bytes`` is what the weights take on disk now, so it grows when a GGUF file is converted.
    Raises the same errors as loading; a hub id must have been pulled before.
    """
    source = resolve(name)
    if isinstance(source, Hub):
        raise not_found(
            name, f"a hub model has a card once it is here: anabranch models pull {name}"
        )
    return _card(source)


def available() -> list[ModelCard]:
    """Cards of all models in the cache and of the packaged ones that are installed, by name.

    Damaged ones are left out with a warning in the log.
    """
    names = [p.name for p in packaged.PACKAGED if p.path() is not None]
    slugs = [e.slug for e in cache.entries() if e.slug not in names]
    cards = []
    for name in [*names, *slugs]:
        try:
            cards.append(card(name))
        except AnabranchError as error:
            log.warning("left out of the list of models: %s", error)
    return sorted(cards, key=lambda c: c.name)


def pull(name: str, progress: Progress | None = None) -> ModelCard:
    """Make a model ready to load: download a hub model, convert a GGUF file. Returns its card.

    What is already here is not fetched again; remove it first to get a newer revision.
    """
    with ready(name, progress or silent) as model:
        return model.card


def remove(name: str) -> int:
    """Delete a model from the cache; returns the bytes freed.

    Only ever deletes in the cache: a name that means a folder, a file or a package is refused.
    """
    package = packaged.find(name)
    found = [cache.Entry(package.name)] if package else cache.named(name)
    found = [entry for entry in found if entry.path.is_dir()]
    if len(found) == 1:
        cache.sweep()
        return found[0].delete()
    if found:
        slugs = ", ".join(entry.slug for entry in found)
        raise ModelError(f"several models are named {name!r}; remove one of these: {slugs}")
    if package is not None and package.path() is not None:
        raise ModelError(
            f"{package.name!r} has no copy in the cache; it belongs to a package, which is removed "
            f"with: pip uninstall {package.distribution}"
        )
    if Path(name).expanduser().exists():
        raise ModelError(
            f"{name!r} is not removed: it is outside the cache {cache.root()}, and only models "
            f"that were converted or downloaded into the cache are"
        )
    raise not_found(name, "only models in the cache can be removed")


@dataclass(frozen=True)
class Ready:
    """A complete model on disk."""

    card: ModelCard
    contents: Contents


@contextlib.contextmanager
def ready(name: str, progress: Progress) -> Iterator[Ready]:
    """Find, convert or download a model, check it, and hold it in place while it is read."""
    source = resolve(name)
    if isinstance(source, Folder):
        contents = check_folder(source.path)
        yield Ready(facts.folder_card(contents, source.name, source.provenance), contents)
        return
    if isinstance(source, Gguf):
        _convert_if_needed(source, progress)
    elif isinstance(source, Hub):
        _download(source, progress)
    with source.entry.reading():
        yield _checked(source.entry, source.name)


def _checked(entry: cache.Entry, name: str) -> Ready:
    """The cached model; :class:`ModelCorrupt` says how to repair it."""
    record = entry.record()
    problem = entry.damage()
    try:
        if problem is None and record is not None:
            return Ready(record.card, check_folder(entry.path))
    except ModelError as error:
        problem = str(error)
    raise ModelCorrupt(
        f"the copy of {name!r} in the cache is damaged: {problem}; remove it with "
        f"'anabranch models remove {name}' and load it again"
    )


def _card(source: Folder | Gguf | Cached) -> ModelCard:
    if isinstance(source, Folder):
        return facts.folder_card(check_folder(source.path), source.name, source.provenance)
    if isinstance(source, Gguf):
        record = source.entry.record()
        if record is not None and record.source is not None and record.source.matches(source.path):
            return record.card
        header = gguf.read_header(source.path)
        sha256 = cache.file_sha256(source.path)
        return facts.gguf_card(header, source.name, source.provenance, sha256)
    return _checked(source.entry, source.name).card


def _convert_if_needed(source: Gguf, progress: Progress) -> None:
    if _why_convert(source) is None:
        return
    cache.sweep()
    with source.entry.changing(progress):
        why = _why_convert(source)  # another process may have been faster
        if why is None:
            return
        if source.entry.path.exists():
            log.warning("%s is converted again: %s", source.name, why)
        _convert(source, progress)


def _why_convert(source: Gguf) -> str | None:
    record = source.entry.record()
    if record is None:
        return "there is no complete copy in the cache"
    if record.source is None or not record.source.matches(source.path):
        return f"{source.path} has changed"
    try:
        _checked(source.entry, source.name)
    except ModelCorrupt as error:
        return str(error)
    return None


def _convert(source: Gguf, progress: Progress) -> None:
    from anabranch.models.conversion import convert

    header = gguf.read_header(source.path)
    stamp = cache.Stamp.of(source.path)
    described = facts.gguf_card(header, source.name, source.provenance, stamp.sha256)
    started = time.monotonic()
    with source.entry.filling() as folder:
        convert(header, folder, progress)
        written = check_folder(folder)
        size = sum(path.stat().st_size for path in written.weights)
        if not stamp.matches(source.path):
            raise ModelError(f"{source.path} changed while it was converted; load it again")
        record = cache.Record("conversion", replace(described, size_bytes=size), {}, stamp)
        cache.write_record(folder, record)
    progress(f"converted {source.name}", 1.0)
    log.info("converted %s in %.1f s", source.path, time.monotonic() - started)


def _download(source: Hub, progress: Progress) -> None:
    from anabranch.models import hub

    try:
        hub.describe(source.name)  # fails in seconds, before anything is locked or written
    except ModelNotFound as error:
        raise not_found(source.name, str(error)) from error
    cache.sweep()
    with source.entry.changing(progress):
        if source.entry.record() is not None:
            return
        with source.entry.filling() as folder:
            revision = hub.fetch(source.name, folder, progress)
            contents = check_folder(folder)
            repository = source.name.partition("@")[0]
            described = facts.folder_card(contents, source.name, f"hub {repository} @{revision}")
            cache.write_record(folder, cache.Record("download", described, {}))


__all__ = ["Ready", "Source", "available", "card", "pull", "ready", "remove"]
