"""The adapters of one served model, by name: on disk all of them, in memory those used lately."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from anabranch.errors import ConfigurationError, ModelNotFound, did_you_mean
from anabranch.serving.adapters.checkpoint import AdapterCheckpoint
from anabranch.serving.adapters.served import ServedAdapter

MEMORY = 1 << 30
"""Bytes of adapters that are kept in memory."""

Attach = Callable[[str, int, AdapterCheckpoint], Awaitable[ServedAdapter]]
Detach = Callable[[ServedAdapter], None]


@dataclass(frozen=True)
class AdapterCard:
    """What a client sees of an adapter. ``loaded``: it is in memory now."""

    name: str
    version: int
    method: str
    rank: int | None
    parameters: int
    fingerprint: str
    loaded: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def require_adapter_name(name: str) -> None:
    """Raise :class:`ConfigurationError` for what cannot follow ``model:``."""
    if not name or not name.isprintable() or any(c in name for c in ":/ "):
        raise ConfigurationError(
            f"{name!r} cannot name an adapter: no colon, slash, space or control character"
        )


@dataclass
class _Entry:
    checkpoint: AdapterCheckpoint
    version: int
    served: ServedAdapter | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class AdapterBank:
    """Loads an adapter when a request first needs it and drops the least recently used.

    ``attach`` makes a runner ready for an adapter, ``detach`` takes it back once no request runs
    on it any more. One event loop uses a bank.
    """

    def __init__(self, attach: Attach, detach: Detach, memory: int = MEMORY) -> None:
        self._attach = attach
        self._detach = detach
        self._memory = memory
        self._entries: dict[str, _Entry] = {}  # least recently used first
        self._versions: dict[str, int] = {}

    async def load(self, name: str, folder: Path) -> AdapterCard:
        """Name a folder, or publish a new version under a name that exists.

        Requests that run keep their version. Raises :class:`AdapterError` for a folder that is no
        adapter of this model; what was there before is still there.
        """
        require_adapter_name(name)
        checkpoint = AdapterCheckpoint.read(folder)
        version = self._versions[name] = self._versions.get(name, 0) + 1
        entry = _Entry(checkpoint, version, await self._attach(name, version, checkpoint))
        replaced = self._entries.pop(name, None)
        self._entries[name] = entry
        if replaced is not None and replaced.served is not None:
            self._detach(replaced.served)
        self._make_room(keep=entry)
        return self.card(name)

    def unregister(self, name: str) -> None:
        """Forget an adapter; requests that run on it finish."""
        entry = self._entry(name)
        del self._entries[name]
        if entry.served is not None:
            self._detach(entry.served)

    async def acquire(self, name: str) -> ServedAdapter:
        """The newest version, loaded if it was not.

        A caller hands its request to the engine before it awaits anything else, or the adapter may
        be gone again. Raises :class:`ModelNotFound` for an unknown name.
        """
        entry = self._entry(name)
        async with entry.lock:
            if entry.served is None:
                entry.served = await self._attach(name, entry.version, entry.checkpoint)
        if self._entries.get(name) is not entry:  # replaced or removed while it was loading
            self._detach(entry.served)
            return await self.acquire(name)
        self._entries[name] = self._entries.pop(name)  # the most recently used is last
        self._make_room(keep=entry)
        return entry.served

    def card(self, name: str) -> AdapterCard:
        """The facts about one adapter; :class:`ModelNotFound` if there is none."""
        entry = self._entry(name)
        checkpoint = entry.checkpoint
        return AdapterCard(
            name,
            entry.version,
            checkpoint.method,
            checkpoint.rank,
            checkpoint.parameters,
            checkpoint.fingerprint,
            entry.served is not None,
        )

    def folder(self, name: str) -> Path:
        """Where the newest version of an adapter lies; :class:`ModelNotFound` without one."""
        return self._entry(name).checkpoint.folder

    def cards(self) -> list[AdapterCard]:
        """All adapters by name."""
        return [self.card(name) for name in sorted(self._entries)]

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            hint = did_you_mean(name, self._entries)
            known = ", ".join(sorted(self._entries)) or "none"
            raise ModelNotFound(f"model: no adapter {name[:100]!r}{hint}; loaded: {known}")
        return self._entries[name]

    def _make_room(self, keep: _Entry) -> None:
        used = sum(e.served.memory for e in self._entries.values() if e.served is not None)
        for entry in list(self._entries.values()):
            if used <= self._memory:
                return
            if entry.served is not None and entry is not keep:
                used -= entry.served.memory
                self._detach(entry.served)
                entry.served = None
