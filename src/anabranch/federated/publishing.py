"""Serving every version as soon as it is made: its adapter, hot-swapped on a running server."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import httpx

from anabranch import adapters
from anabranch.errors import ConfigurationError
from anabranch.federated.coordinator import Coordinator
from anabranch.federated.job import FederateJob
from anabranch.federated.shared import lent
from anabranch.files import write_json
from anabranch.models import cache
from anabranch.training.run_record import read_json
from anabranch.training.setup import Setup


class Publisher:
    """Saves a version where the server finds it, and tells the server (``POST /v1/adapters``).

    Requests that run keep the version that they began with. A server that cannot be reached during
    the run is an incident, and the next version is tried again; at the beginning it is an error.
    Raises :class:`ConfigurationError` if the server has another base.
    """

    def __init__(self, job: FederateJob, setup: Setup, folder: Path) -> None:
        assert job.publish is not None
        options = job.publish
        self._url = options.url.rstrip("/")
        self._model = setup.model
        self._adapter = options.adapter or job.federate
        self._folder = options.folder or cache.root() / "adapters"
        self._record = folder / "published.json"
        key = options.key_file.read_text().split() if options.key_file else []
        self._headers = {"authorization": f"Bearer {key[0]}"} if key else {}
        self._base = self._find_base(options.model, setup.base.card.fingerprint)

    def __call__(self, coordinator: Coordinator) -> None:
        """Publish the present version, unless it or a later one was before a crash."""
        version = coordinator.version
        last = read_json(self._record)["version"] if self._record.exists() else 0
        if version <= last:
            return
        source = self._folder / self._source(version)
        shutil.rmtree(source, ignore_errors=True)  # of a run before
        tensors: Any = coordinator.server.tensors  # type: ignore[attr-defined]
        with lent(self._model, tensors):
            adapters.save(self._model, source)
        form = {"model": self._base, "adapter": self._adapter, "source": source.name}
        try:
            self._ask("POST", "/v1/adapters", json=form)
        except (httpx.HTTPError, _Refused) as error:
            shutil.rmtree(source, ignore_errors=True)
            message = f"version {version} is not served at {self._url}: {error}"
            coordinator.state.incidents.record("not published", "", message)
            return
        write_json(self._record, {"version": version, "served": f"{self._base}:{self._adapter}"})
        if last:
            shutil.rmtree(self._folder / self._source(last), ignore_errors=True)

    def _source(self, version: int) -> str:
        """A new folder for each version: the server may still read the one before."""
        return f"{self._adapter}.version-{version}"

    def _find_base(self, wanted: str | None, fingerprint: str) -> str:
        try:
            listed = self._ask("GET", "/v1/models")["data"]
        except (httpx.HTTPError, _Refused) as error:
            raise ConfigurationError(
                f"publish: {self._url} does not answer: {error}; start it with: anabranch up"
            ) from None
        bases = {
            item["id"]: item["card"]["fingerprint"] for item in listed if ":" not in item["id"]
        }
        fitting = [name for name, found in bases.items() if found == fingerprint]
        if wanted is not None and wanted in fitting:
            return wanted
        if wanted is None and len(fitting) == 1:
            return str(fitting[0])
        what = "none of them is" if not fitting else f"these are: {', '.join(fitting)}"
        raise ConfigurationError(
            f"publish: {self._url} serves {', '.join(bases) or 'nothing'}; {what} this job's base. "
            f"Serve it with anabranch up --model, and name it with publish.model"
        )

    def _ask(self, method: str, path: str, **options: Any) -> Any:
        answer = httpx.request(
            method, self._url + path, headers=self._headers, timeout=60.0, **options
        )
        if answer.is_error:
            raise _Refused(answer.text[:500])
        return answer.json()


class _Refused(Exception):
    """The server answered, but not with what was asked for."""
