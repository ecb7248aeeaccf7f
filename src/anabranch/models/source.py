"""From a name to the place where the model is. Nothing is loaded, converted or fetched here."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from anabranch.errors import ConfigurationError, ModelNotFound, UnknownName, did_you_mean
from anabranch.models import cache, hub, packaged


@dataclass(frozen=True)
class Folder:
    """A Hugging Face folder that is used where it is."""

    name: str
    path: Path
    provenance: str


@dataclass(frozen=True)
class Gguf:
    """A GGUF file, converted once to ``entry``."""

    name: str
    path: Path
    provenance: str
    entry: cache.Entry


@dataclass(frozen=True)
class Cached:
    """A model in the cache whose source is not at hand, or that was downloaded."""

    name: str
    entry: cache.Entry


@dataclass(frozen=True)
class Hub:
    """A hub id that is not here yet."""

    name: str
    entry: cache.Entry


Source = Folder | Gguf | Cached | Hub


def resolve(name: str) -> Source:
    """Find a model by packaged name, path, name in the cache, or hub id - in this order.

    To load a folder whose name is also a packaged model's, write ``./folder``. Raises
    :class:`ModelNotFound` if the name can be none of these.
    """
    if not name or not name.strip() or "\0" in name:
        raise ConfigurationError(f"{name!r} is not a model's name")
    if package := packaged.find(name):
        return _packaged(package)
    if (path := _existing(name)) is not None:
        return _local(path)
    if found := cache.named(name):
        return _cached(name, found)
    if not hub.is_id(name) or _looks_like_path(name):
        raise not_found(name, "not a hub id (org/name)")
    if folder := hub.downloaded(name):
        return Folder(name, folder, f"hub {name.partition('@')[0]} @{folder.name}")
    return Hub(name, cache.Entry(cache.slug(name)))


def absolute(name: str) -> str:
    """The name of the same model in any working directory."""
    path = None if packaged.find(name) else _existing(name)
    return name if path is None else str(path.resolve())


def not_found(name: str, why: str) -> ModelNotFound:
    """No such model: where it was looked for, and the nearest names that exist."""
    path = Path(name).expanduser()
    siblings: Iterable[str] = ()
    if path.parent.is_dir() and path.name != name:
        siblings = (str(path.parent / p.name) for p in path.parent.iterdir())
    hint = did_you_mean(name, [*local_names(), *siblings])
    return ModelNotFound(
        f"there is no model {name!r}{hint}: not a file or folder here, not in the cache, "
        f"and {why}; models here: {', '.join(local_names()) or 'none'}"
    )


def local_names() -> list[str]:
    """Names that load without a network: packaged models that are installed, and the cache."""
    names = {p.name for p in packaged.PACKAGED if p.path() is not None}
    for entry in cache.entries():
        record = entry.record()
        names.add(record.card.name if record else entry.slug)
    return sorted(names)


def _packaged(package: packaged.Packaged) -> Source:
    path = package.path()
    entry = cache.Entry(cache.slug(package.name))
    if path is None:
        if entry.record() is None:
            raise package.missing()
        return Cached(package.name, entry)
    if path.is_dir():
        return Folder(package.name, path, package.provenance())
    return Gguf(package.name, path, package.provenance(), entry)


def _local(path: Path) -> Source:
    path = path.resolve()
    if path.is_dir():
        return Folder(path.name, path, f"directory {path}")
    if path.suffix.lower() == ".gguf":
        # Two files of one name in two folders are two models.
        where = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
        entry = cache.Entry(cache.slug(f"{path.stem}-{where}"))
        return Gguf(path.stem, path, f"file {path}", entry)
    raise ModelNotFound(
        f"{path} is neither a folder in Hugging Face's format nor a GGUF file (.gguf); "
        f"if it is part of a model's folder, name the folder"
    )


def _cached(name: str, found: list[cache.Entry]) -> Source:
    if len(found) > 1:
        raise UnknownName("model (several have this name, use one of these)", name, _slugs(found))
    entry = found[0]
    record = entry.record()
    if record is None or record.source is None or not Path(record.source.path).is_file():
        return Cached(name, entry)
    # Through its source, so that a changed file or a damaged copy is converted again.
    source = _local(Path(record.source.path))
    return source if isinstance(source, Gguf) and source.entry == entry else Cached(name, entry)


def _existing(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):
        return None  # too long for a path, or a home folder of nobody


def _slugs(found: list[cache.Entry]) -> list[str]:
    return [entry.slug for entry in found]


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "~", "/")) or name.endswith(".gguf") or name.count("/") > 1
