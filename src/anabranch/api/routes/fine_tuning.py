"""``/v1/fine_tuning/jobs``: adapters trained by the server that serves them."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from anabranch.api import openapi
from anabranch.api.body import read
from anabranch.api.fine_tuning.objects import (
    checkpoint_object,
    event_object,
    job_object,
    sequence_of,
)
from anabranch.api.fine_tuning.queries import (
    METADATA,
    CheckpointQuery,
    EventQuery,
    JobQuery,
    read_labels,
    read_query,
)
from anabranch.api.fine_tuning.responses import CheckpointList, JobEventList, JobItem, JobList
from anabranch.api.fine_tuning.schemas import FineTuningRequest
from anabranch.api.fine_tuning.service import FineTuningService
from anabranch.api.fine_tuning.spec import KIND, Spec
from anabranch.api.job_events import event_stream
from anabranch.api.routes.common import json_response, owner_of, service_of
from anabranch.jobs import Job

router = APIRouter()

JOBS = "/v1/fine_tuning/jobs"


@router.post(
    JOBS,
    response_model=JobItem,
    responses=openapi.errors(400, 401, 404, 409, 413, 415, 500, 503),
    openapi_extra=openapi.request_body(FineTuningRequest),
)
async def create_job(request: Request) -> Response:
    """Train an adapter on an uploaded file, beside what is served."""
    body = await read(request, FineTuningRequest)
    job = await run_in_threadpool(_jobs(request).create, body, owner_of(request))
    return await run_in_threadpool(_answer, request, job)


@router.get(
    JOBS,
    response_model=JobList,
    responses=openapi.errors(400, 401, 500),
    openapi_extra=openapi.query(JobQuery, METADATA),
)
def list_jobs(request: Request) -> Response:
    """The caller's jobs, newest first."""
    query = read_query(request, JobQuery)
    store = _jobs(request).store
    page = store.find(
        KIND,
        owner=owner_of(request),
        labels=read_labels(request),
        after=query.after or None,
        limit=query.limit,
    )
    made = store.artefacts(*(job.id for job in page.items))
    data = [job_object(job, made[job.id]) for job in page.items]
    return json_response({"object": "list", "data": data, "has_more": page.has_more})


@router.get(JOBS + "/{job_id}", response_model=JobItem, responses=openapi.errors(401, 404, 500))
def show_job(request: Request, job_id: str) -> Response:
    """One job."""
    return _answer(request, _jobs(request).get(job_id, owner_of(request)))


_STEERING = openapi.errors(401, 404, 409, 500, 503)


@router.post(JOBS + "/{job_id}/cancel", response_model=JobItem, responses=_STEERING)
def cancel_job(request: Request, job_id: str) -> Response:
    """Give a job up."""
    return _answer(request, _jobs(request).cancel(job_id, owner_of(request)))


@router.post(JOBS + "/{job_id}/pause", response_model=JobItem, responses=_STEERING)
def pause_job(request: Request, job_id: str) -> Response:
    """Let a job wait, with what it has computed."""
    return _answer(request, _jobs(request).pause(job_id, owner_of(request)))


@router.post(JOBS + "/{job_id}/resume", response_model=JobItem, responses=_STEERING)
def resume_job(request: Request, job_id: str) -> Response:
    """Queue a paused job again; it goes on where it was."""
    return _answer(request, _jobs(request).resume(job_id, owner_of(request)))


@router.get(
    JOBS + "/{job_id}/events",
    response_model=JobEventList,
    responses={
        200: {"content": openapi.event_stream()},
        **openapi.errors(400, 401, 404, 500),
    },
    openapi_extra=openapi.query(EventQuery),
)
def job_events(request: Request, job_id: str) -> Response:
    """What happened to a job, newest first; or oldest first and as it happens, as a stream."""
    query = read_query(request, EventQuery)
    jobs = _jobs(request)
    job = jobs.get(job_id, owner_of(request))
    after = sequence_of(query.after, job.id, "ftevent") if query.after else None
    if query.stream:
        return event_stream(service_of(request), jobs.store, job.id, after or 0, event_object)
    page = jobs.store.events(job.id, after=after, limit=query.limit, descending=True)
    data = [event_object(event) for event in page.items]
    return json_response({"object": "list", "data": data, "has_more": page.has_more})


@router.get(
    JOBS + "/{job_id}/checkpoints",
    response_model=CheckpointList,
    responses=openapi.errors(400, 401, 404, 500),
    openapi_extra=openapi.query(CheckpointQuery),
)
def job_checkpoints(request: Request, job_id: str) -> Response:
    """The versions that a job has published, newest first. Their name answers as the newest."""
    query = read_query(request, CheckpointQuery)
    jobs = _jobs(request)
    job = jobs.get(job_id, owner_of(request))
    after = sequence_of(query.after, job.id, "ftckpt") if query.after else None
    page = jobs.store.events(
        job.id, kind="published", after=after, limit=query.limit, descending=True
    )
    model = Spec.model_validate(job.spec).served_name
    data = [checkpoint_object(event, model) for event in page.items]
    return json_response(
        {
            "object": "list",
            "data": data,
            "has_more": page.has_more,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
        }
    )


def _jobs(request: Request) -> FineTuningService:
    jobs = service_of(request).fine_tuning
    assert jobs is not None  # or there would be no such route
    return jobs


def _answer(request: Request, job: Job) -> Response:
    return json_response(job_object(job, _jobs(request).store.artefacts(job.id)[job.id]))
