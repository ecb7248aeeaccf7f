"""What all requests of one server share: its models, options, metrics and whether it drains."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from anabranch.api.fine_tuning import FineTuningService
from anabranch.api.metrics import Metrics
from anabranch.errors import ConfigurationError, InvalidRequest, ModelNotFound, did_you_mean
from anabranch.jobs import Workspace
from anabranch.models import cache
from anabranch.models.protocol import Model


@dataclass(frozen=True)
class ServerOptions:
    """How the HTTP side behaves.

    With ``api_keys`` every path except ``/health`` and ``/metrics`` needs one of them as a bearer
    token. ``ping_seconds``: how long a stream may be silent before a comment keeps it alive.
    ``adapters`` is the folder whose subfolders clients may load as adapters.

    ``workspace`` is where uploaded files and fine-tuning jobs are kept; without one the server
    offers neither. Whoever opened it closes it. At most ``max_finetune_jobs`` train at a time.
    """

    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 8 * 1024 * 1024
    ping_seconds: float = 15.0
    adapters: Path = field(default_factory=lambda: cache.root() / "adapters")
    workspace: Workspace | None = None
    max_finetune_jobs: int = 4


class Service:
    """The state of one server. ``active`` counts requests that are being answered."""

    def __init__(self, models: Sequence[Model], options: ServerOptions) -> None:
        self.models = {model.name: model for model in models}
        if len(self.models) != len(models):
            names = [model.name for model in models]
            raise ConfigurationError(f"two models are served under one name: {', '.join(names)}")
        if not self.models:
            raise ConfigurationError("a server needs at least one model")
        self.options = options
        self.fine_tuning = (
            FineTuningService(options.workspace, models, options.max_finetune_jobs)
            if options.workspace is not None
            else None
        )
        self.metrics = Metrics(list(models))
        self.created = int(time.time())
        self.draining = False
        self.active = 0
        self.startup_error: BaseException | None = None

    def model(self, name: str) -> Model:
        """The model served under exactly this name; :class:`ModelNotFound` otherwise.

        ``model:adapter`` is a model with one of its adapters.
        """
        if name in self.models:
            return self.models[name]
        base, _, adapter = name.rpartition(":")
        if base in self.models:
            return self.models[base].variant(adapter)
        served = [model.name for model in self.listed()]
        hint = did_you_mean(name, served)
        shown = name if len(name) <= 100 else name[:97] + "..."
        raise ModelNotFound(f"model: {shown!r} is not served here{hint}; served: {shorten(served)}")

    def listed(self) -> list[Model]:
        """All models, each followed by its variants."""
        return [m for model in self.models.values() for m in (model, *model.variants())]

    def adapter_folder(self, name: str) -> Path:
        """Where the adapter of this name lies; a client cannot name other folders."""
        if not name or name != Path(name).name or name.startswith("."):
            raise InvalidRequest("adapter", f"{name[:100]!r} is no name of a folder")
        return self.options.adapters / name


def shorten(names: Sequence[str], most: int = 20) -> str:
    """The names for a message, not all if they are very many."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def read_api_keys(path: Path) -> tuple[str, ...]:
    """The keys in a file, one a line; blank lines and ``#`` comments are skipped.

    Raises :class:`ConfigurationError` if the file cannot be read or holds no key.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read the API keys in {path}: {error}") from error
    keys = []
    for number, line in enumerate(lines, start=1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if not key.isascii() or any(character.isspace() for character in key):
            raise ConfigurationError(
                f"{path}, line {number}: a key is one word of ASCII characters on its own line"
            )
        keys.append(key)
    if not keys:
        raise ConfigurationError(f"{path} holds no API key; put one on each line")
    return tuple(keys)
