"""What pages offer for download: the same bytes as over HTTP, for who has signed in."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import quote

from nicegui import core
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from anabranch.api.downloads import download_response
from anabranch.api.errors import describe, error_response
from anabranch.console.console import Console
from anabranch.console.pages.access import root_path
from anabranch.console.sessions import Visitor
from anabranch.downloads import Download
from anabranch.errors import AnabranchError

ARTEFACTS = "/downloads/jobs/{job_id}/{name:path}"
ADAPTERS = "/downloads/adapters/{model:path}"

_SIGN_IN = "sign in on the console's page first"


def register(console: Console) -> None:
    """:data:`ARTEFACTS` and :data:`ADAPTERS`."""
    service = console.service

    def offer(path: str, find: Callable[[Request, Visitor], Download]) -> None:
        core.app.remove_route(path)

        @core.app.get(path, include_in_schema=False)
        async def route(request: Request) -> Response:
            visitor = console.sessions.visitor(request)
            if visitor is None:
                return error_response(401, _SIGN_IN)
            try:
                found = await run_in_threadpool(find, request, visitor)
            except AnabranchError as error:
                return error_response(*describe(error))
            return download_response(request, found)

    def artefact(request: Request, visitor: Visitor) -> Download:
        assert service.jobs is not None  # or no page would link to it
        asked = request.path_params
        return service.jobs.download(asked["job_id"], asked["name"], visitor.owner)

    def adapter(request: Request, visitor: Visitor) -> Download:
        return service.adapter_files(request.path_params["model"], visitor.owner)

    if service.jobs is not None:
        offer(ARTEFACTS, artefact)
    offer(ADAPTERS, adapter)


def artefact_address(job_id: str, name: str) -> str:
    """Where an artefact is, for a link."""
    return f"{root_path()}/downloads/jobs/{quote(job_id, safe='')}/{quote(name)}"


def adapter_address(model: str) -> str:
    """Where the archive of an adapter's files is, for a link. ``model`` is ``base:adapter``."""
    return f"{root_path()}/downloads/adapters/{quote(model)}"
