"""``/v1/jobs``: everything that runs for longer than a request."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from anabranch.api import openapi
from anabranch.api.body import read
from anabranch.api.downloads import download_response
from anabranch.api.fine_tuning.queries import read_query
from anabranch.api.job_events import event_stream
from anabranch.api.jobs import (
    ArtefactItems,
    JobRequest,
    JobsQuery,
    JobView,
    JobViews,
    artefact_view,
    event_view,
    job_view,
)
from anabranch.api.routes.common import json_response, owner_of, service_of
from anabranch.api.service import NO_JOBS
from anabranch.errors import InvalidRequest
from anabranch.jobs import Job
from anabranch.jobs.records import Wanted
from anabranch.jobs.service import Jobs

router = APIRouter()

JOBS = "/v1/jobs"

_STEERING = openapi.errors(401, 404, 409, 500, 503)


@router.post(
    JOBS,
    response_model=JobView,
    responses=openapi.errors(400, 401, 404, 413, 415, 500, 503),
    openapi_extra=openapi.request_body(JobRequest),
)
async def submit_job(request: Request) -> Response:
    """Queue a job. It runs as a process of the server's machine and may read what that can read."""
    service = service_of(request)
    if not service.options.run_jobs:
        raise InvalidRequest("kind", NO_JOBS)
    body = await read(request, JobRequest)
    job = await run_in_threadpool(
        lambda: _jobs(request).submit(
            body.kind, body.spec, priority=body.priority, owner=owner_of(request)
        )
    )
    service.poke_jobs()
    return _answer(request, job)


@router.get(
    JOBS,
    response_model=JobViews,
    responses=openapi.errors(400, 401, 500),
    openapi_extra=openapi.query(JobsQuery),
)
def list_jobs(request: Request) -> Response:
    """The caller's jobs of all kinds, newest first."""
    query = read_query(request, JobsQuery)
    store = _jobs(request).store
    page = store.find(
        query.kind or None,
        owner=owner_of(request),
        states=(query.state,) if query.state else (),
        after=query.after or None,
        limit=query.limit,
    )
    made = store.artefacts(*(job.id for job in page.items))
    data = [job_view(job, made[job.id]) for job in page.items]
    return json_response({"object": "list", "data": data, "has_more": page.has_more})


@router.get(JOBS + "/{job_id}", response_model=JobView, responses=openapi.errors(401, 404, 500))
def show_job(request: Request, job_id: str) -> Response:
    """One job."""
    return _answer(request, _jobs(request).store.get(job_id, owner_of(request)))


@router.post(JOBS + "/{job_id}/cancel", response_model=JobView, responses=_STEERING)
def cancel_job(request: Request, job_id: str) -> Response:
    """Give a job up; what it has made so far stays."""
    return _ask(request, job_id, "cancel")


@router.post(JOBS + "/{job_id}/pause", response_model=JobView, responses=_STEERING)
def pause_job(request: Request, job_id: str) -> Response:
    """Stop a job with a checkpoint."""
    return _ask(request, job_id, "pause")


@router.post(JOBS + "/{job_id}/resume", response_model=JobView, responses=_STEERING)
def resume_job(request: Request, job_id: str) -> Response:
    """Let a paused job go on."""
    return _ask(request, job_id, "run")


@router.get(
    JOBS + "/{job_id}/events",
    response_class=Response,
    responses={200: {"content": openapi.event_stream()}, **openapi.errors(401, 404, 500)},
)
def job_events(request: Request, job_id: str) -> Response:
    """What happened to a job and what happens, oldest first, as Server-Sent Events."""
    jobs = _jobs(request)
    job = jobs.store.get(job_id, owner_of(request))
    return event_stream(service_of(request), jobs.store, job.id, 0, event_view)


@router.get(
    JOBS + "/{job_id}/log",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}}, **openapi.errors(401, 404, 500)},
)
def job_log(request: Request, job_id: str) -> Response:
    """What the job's process said."""
    return PlainTextResponse(_jobs(request).log(job_id, owner_of(request)))


@router.get(
    JOBS + "/{job_id}/artifacts",
    response_model=ArtefactItems,
    responses=openapi.errors(401, 404, 500),
)
def list_artifacts(request: Request, job_id: str) -> Response:
    """The files and folders that a job has made."""
    made = _jobs(request).artefacts(job_id, owner_of(request))
    return json_response({"object": "list", "data": [artefact_view(one) for one in made]})


@router.get(
    JOBS + "/{job_id}/artifacts/{name:path}",
    response_class=Response,
    responses={**openapi.download(), **openapi.errors(401, 404, 409, 500)},
)
def job_artifact(request: Request, job_id: str, name: str) -> Response:
    """The bytes of an artefact, or of a file in one: NAME/PATH. A folder comes as a ZIP archive."""
    download = _jobs(request).download(job_id, name, owner_of(request))
    return download_response(request, download)


def _ask(request: Request, job_id: str, wanted: Wanted) -> Response:
    job = _jobs(request).ask(job_id, wanted, owner_of(request))
    service_of(request).poke_jobs()
    return _answer(request, job)


def _jobs(request: Request) -> Jobs:
    jobs = service_of(request).jobs
    assert jobs is not None  # or there would be no such route
    return jobs


def _answer(request: Request, job: Job) -> Response:
    return json_response(job_view(job, _jobs(request).store.artefacts(job.id)[job.id]))
