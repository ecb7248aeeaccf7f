"""``/v1/adapters``: adapters come while their base answers, and leave as files or as new models."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from anabranch.api import openapi
from anabranch.api.body import read
from anabranch.api.downloads import download_response
from anabranch.api.jobs import JobView, job_view
from anabranch.api.responses import ModelItem
from anabranch.api.routes.common import json_response, owner_of, service_of
from anabranch.api.routes.models import model_item
from anabranch.api.schemas import AdapterRequest, MergeRequest

router = APIRouter()


@router.post(
    "/v1/adapters",
    response_model=ModelItem,
    responses=openapi.errors(400, 401, 404, 413, 415, 500, 503),
    openapi_extra=openapi.request_body(AdapterRequest),
)
async def load_adapter(request: Request) -> Response:
    """Serve an adapter from the server's folder of adapters, or a newer version of one.

    Requests that run keep the version that they started with.
    """
    service = service_of(request)
    body = await read(request, AdapterRequest)
    model = await service.load_adapter(body.model, body.adapter, body.source)
    return json_response(model_item(model, service.created))


@router.post(
    "/v1/adapters/merge",
    response_model=JobView,
    responses=openapi.errors(400, 401, 404, 413, 415, 500, 503),
    openapi_extra=openapi.request_body(MergeRequest),
)
async def merge_adapter(request: Request) -> Response:
    """Queue a job that makes a model of an adapter and its base, for ``anabranch up``."""
    service = service_of(request)
    body = await read(request, MergeRequest)
    owner = owner_of(request)
    job = await run_in_threadpool(service.merge_adapter, body.model, body.name, owner)
    return json_response(job_view(job, {}))


# A name may contain slashes, as on the Hugging Face hub.
@router.get(
    "/v1/adapters/{model:path}",
    response_class=Response,
    responses={**openapi.download(), **openapi.errors(400, 401, 404, 409, 500)},
)
def download_adapter(request: Request, model: str) -> Response:
    """The files of ``model:adapter`` as a ZIP archive, which PEFT loads once it is unpacked."""
    download = service_of(request).adapter_files(model, owner_of(request))
    return download_response(request, download)
