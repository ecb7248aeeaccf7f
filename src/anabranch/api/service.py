"""What all requests of one server share: its models, options, metrics and whether it drains."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from anabranch.api.fine_tuning import FineTuningService
from anabranch.api.metrics import Metrics
from anabranch.downloads import Download
from anabranch.errors import ConfigurationError, InvalidRequest, ModelNotFound, did_you_mean
from anabranch.jobs import Job, Workspace
from anabranch.jobs.service import Jobs
from anabranch.models import cache
from anabranch.models.protocol import Model

NO_JOBS = "this server takes no jobs from clients; start it with --run-jobs to allow that"


@dataclass(frozen=True)
class ServerOptions:
    """How the HTTP side behaves.

    With ``api_keys`` every path except ``/health`` and ``/metrics`` needs one of them as a bearer
    token. ``ping_seconds``: how long a stream may be silent before a comment keeps it alive.
    ``adapters`` is the folder whose subfolders clients may load as adapters.

    ``workspace`` is where uploaded files and fine-tuning jobs are kept; without one the server
    offers neither. Whoever opened it closes it. At most ``max_finetune_jobs`` train at a time.
    With ``run_jobs`` clients may start jobs that run as processes of this machine.
    ``allowed_hosts`` are names beside loopback ones that requests may call the server by.
    """

    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 8 * 1024 * 1024
    ping_seconds: float = 15.0
    adapters: Path = field(default_factory=lambda: cache.root() / "adapters")
    workspace: Workspace | None = None
    max_finetune_jobs: int = 4
    run_jobs: bool = False
    allowed_hosts: tuple[str, ...] = ()


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
        self.jobs = Jobs(options.workspace) if options.workspace is not None else None
        self.job_runner = self.jobs.runner() if self.jobs is not None else None
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

    def poke_jobs(self) -> None:
        """Something was asked of a job."""
        if self.fine_tuning is not None:
            self.fine_tuning.runner.poke()
        if self.job_runner is not None:
            self.job_runner.poke()

    async def load_adapter(self, base: str, adapter: str, source: str | None = None) -> Model:
        """Serve ``base:adapter`` from a subfolder of the folder of adapters, named alike if None.

        Requests that run keep the version that they started with.
        """
        if base not in self.models:
            raise ModelNotFound(f"model: {base[:100]!r} is no base model that is served here")
        return await self.models[base].add_adapter(adapter, self.adapter_folder(source or adapter))

    async def unload_adapter(self, name: str) -> str:
        """Stop serving ``model:adapter``, now and at the next start; returns its whole name.

        Requests that run on it finish, and its files stay.
        """
        if name in self.models:
            raise InvalidRequest("model", f"{name!r} is a base model; only adapters can be deleted")
        found = self.model(name)
        base, _, adapter = found.name.rpartition(":")
        await self.models[base].remove_adapter(adapter)
        if self.fine_tuning is not None:
            await asyncio.to_thread(self.fine_tuning.forget_model, base, adapter)
        return found.name

    def adapter_files(self, name: str, owner: str | None) -> Download:
        """The archive of the files of ``model:adapter``, which PEFT loads. Reads them all.

        Those of another key's job are not found.
        """
        folder = self._adapter_files(name, owner)
        return Download.of(folder, name.rpartition(":")[2])

    def merge_adapter(self, name: str, merged: str, owner: str | None) -> Job:
        """Queue a job that puts ``model:adapter`` into a copy of its base, called ``merged``."""
        folder = self._adapter_files(name, owner)
        source = self.models[name.rpartition(":")[0]].source
        if self.jobs is None or not self.options.run_jobs:
            raise InvalidRequest("model", f"cannot be merged here: {NO_JOBS}")
        if source is None:
            raise InvalidRequest("model", f"the base of {name!r} cannot be loaded a second time")
        spec = {"base": source, "adapter": str(folder.absolute()), "model": merged}
        job = self.jobs.submit("merge", spec, owner=owner)
        self.poke_jobs()
        return job

    def may_read_adapter(self, variant: Model, owner: str | None) -> bool:
        """Whether its adapter has files, and they are not those of another key's job."""
        folder = variant.adapter_folder
        return folder is not None and (self.jobs is None or self.jobs.may_read(folder, owner))

    def _adapter_files(self, name: str, owner: str | None) -> Path:
        if name in self.models:
            raise InvalidRequest("model", f"{name!r} is a base model and no adapter")
        folder = self.model(name).adapter_folder
        if folder is None:
            raise InvalidRequest("model", f"{name!r} has no files of an adapter")
        if not self.may_read_adapter(self.model(name), owner):
            raise ModelNotFound(f"model: the files of {name!r} belong to the job of another key")
        return folder

    def loadable_adapters(self, base: str) -> list[str]:
        """Names in the folder of adapters that are not served on this model yet."""
        served = {variant.name for variant in self.models[base].variants()}
        folder = self.options.adapters
        found = [path.parent.name for path in folder.glob("*/adapter_config.json")]
        return sorted(name for name in found if f"{base}:{name}" not in served)

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
