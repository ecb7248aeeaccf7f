"""Puts the server together: models, routes, middlewares and error handlers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from anabranch import __version__
from anabranch.api import openapi
from anabranch.api.errors import handle_anabranch_error, handle_http_exception
from anabranch.api.middleware import (
    AllowedHosts,
    ApiKeys,
    BodyLimit,
    RefuseWhileDraining,
    RequestContext,
)
from anabranch.api.middleware.api_keys import CONSOLE
from anabranch.api.routes import (
    adapters,
    chat,
    completions,
    embeddings,
    files,
    fine_tuning,
    jobs,
    models,
    operations,
)
from anabranch.api.service import ServerOptions, Service
from anabranch.api.streaming import ClientGone
from anabranch.errors import AnabranchError
from anabranch.models.protocol import Model


def create_app(models_: Sequence[Model], options: ServerOptions | None = None) -> FastAPI:
    """An ASGI application that serves ``models_`` under their names.

    The models are started and closed with it. ``app.state.service`` is its shared state.
    """
    options = options or ServerOptions()
    service = Service(models_, options)
    app = FastAPI(
        title="Anabranch",
        version=__version__,
        description="Language models behind OpenAI's HTTP interface.",
        # The interactive pages load scripts from another host.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
        middleware=[  # the first is the outermost
            Middleware(RequestContext, service=service),
            Middleware(
                AllowedHosts, allowed=options.allowed_hosts, has_keys=bool(options.api_keys)
            ),
            Middleware(ApiKeys, keys=options.api_keys),
            Middleware(RefuseWhileDraining, service=service),
            Middleware(BodyLimit, max_bytes=options.max_body_bytes, uploads=_uploads(options)),
        ],
        exception_handlers={
            AnabranchError: handle_anabranch_error,
            HTTPException: handle_http_exception,
            ClientGone: _handle_client_gone,
            ClientDisconnect: _handle_client_gone,
        },
    )
    app.state.service = service
    for module in (models, adapters, chat, completions, embeddings, operations):
        app.include_router(module.router)
    if service.fine_tuning is not None:
        app.include_router(files.router)
        app.include_router(fine_tuning.router)
        app.include_router(jobs.router)
    openapi.install(app, has_keys=bool(options.api_keys))
    return app


def _uploads(options: ServerOptions) -> Mapping[str, int]:
    if options.workspace is None:
        return {}
    # The form around the file has a few hundred bytes; what is too much for the file it says.
    most = options.workspace.files.max_bytes + 2 * 1024 * 1024
    return {files.PATH: most, f"{CONSOLE}/_nicegui/client/": most}


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    async with AsyncExitStack() as stack:
        fine_tuning = service.fine_tuning
        if fine_tuning is not None:
            # Called last: what the models reported while they closed is written too.
            stack.push_async_callback(asyncio.to_thread, fine_tuning.runner.stop)
        for model in service.models.values():
            stack.push_async_callback(model.close)
            try:
                await model.start()
            except BaseException as error:
                service.startup_error = error
                raise
        if fine_tuning is not None:
            await fine_tuning.start()
            stack.callback(fine_tuning.runner.close)
        if service.job_runner is not None:
            service.job_runner.start()
            stack.push_async_callback(asyncio.to_thread, service.job_runner.stop)
        sampler = asyncio.create_task(_sample(service))
        stack.callback(sampler.cancel)
        yield


async def _sample(service: Service) -> None:
    """Tokens per second need samples at a steady pace, however often Prometheus asks."""
    while True:
        service.metrics.sample()
        await asyncio.sleep(1.0)


async def _handle_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # counted, read by nobody
