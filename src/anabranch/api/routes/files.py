"""``/v1/files``: what clients upload to train on, and what jobs leave for them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, BinaryIO, get_args

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from anabranch.api import openapi
from anabranch.api.errors import UnsupportedMediaType
from anabranch.api.fine_tuning.objects import file_object
from anabranch.api.fine_tuning.queries import FileQuery, read_query
from anabranch.api.fine_tuning.responses import DeletedFile, FileItem, FileList
from anabranch.api.fine_tuning.schemas import Upload
from anabranch.api.fine_tuning.service import check_upload
from anabranch.api.routes.common import json_response, owner_of, service_of
from anabranch.errors import InvalidRequest, did_you_mean
from anabranch.jobs import FileStore, UnknownFile

router = APIRouter()

PATH = "/v1/files"
PURPOSES: tuple[str, ...] = get_args(Upload.model_fields["purpose"].annotation)

_CHUNK = 1 << 20


@router.post(
    PATH,
    response_model=FileItem,
    responses=openapi.errors(400, 401, 413, 415, 500, 503),
    openapi_extra=openapi.upload(Upload),
)
async def upload_file(request: Request) -> Response:
    """Keep a file. One to train on is checked line by line; a bad one is not kept."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "multipart/form-data":
        raise UnsupportedMediaType(
            f"the content-type must be multipart/form-data, not {media_type or 'absent'!r}"
        )
    async with request.form(max_files=2, max_fields=20) as form:
        given = form.multi_items()
        purpose = _purpose([value for name, value in given if name == "purpose"])
        _refuse_unknown([name for name, _ in given])
        file = _file([value for name, value in given if name == "file"])
        stored = await run_in_threadpool(
            _store(request).save,
            file.file,
            plain_name(file.filename or ""),
            purpose,
            owner=owner_of(request),
            check=check_upload(purpose),
        )
    return json_response(file_object(stored))


@router.get(
    PATH,
    response_model=FileList,
    responses=openapi.errors(400, 401, 500),
    openapi_extra=openapi.query(FileQuery),
)
def list_files(request: Request) -> Response:
    """The caller's files, by age."""
    query = read_query(request, FileQuery)
    page = _store(request).find(
        owner=owner_of(request),
        purpose=query.purpose or None,
        after=query.after or None,
        limit=query.limit,
        descending=query.order == "desc",
    )
    data = [file_object(file) for file in page.items]
    return json_response({"object": "list", "data": data, "has_more": page.has_more})


@router.get("/v1/files/{file_id}", response_model=FileItem, responses=openapi.errors(401, 404, 500))
def show_file(request: Request, file_id: str) -> Response:
    """One file's facts."""
    return json_response(file_object(_store(request).get(file_id, owner_of(request))))


@router.get(
    "/v1/files/{file_id}/content",
    response_class=Response,
    responses={
        200: {"content": {"application/octet-stream": {"schema": {"type": "string"}}}},
        **openapi.errors(401, 404, 500),
    },
)
def file_content(request: Request, file_id: str) -> Response:
    """One file's bytes, as they came."""
    store = _store(request)
    stored = store.get(file_id, owner_of(request))
    try:
        file = store.path(stored).open("rb")
    except FileNotFoundError:  # deleted meanwhile
        raise UnknownFile(f"there is no file {file_id[:100]!r}") from None
    headers = {
        "content-length": str(stored.size),
        # Whatever a client uploaded, no browser may run it.
        "content-disposition": "attachment",
        "x-content-type-options": "nosniff",
    }
    return StreamingResponse(_chunks(file), headers=headers, media_type="application/octet-stream")


@router.delete(
    "/v1/files/{file_id}",
    response_model=DeletedFile,
    responses=openapi.errors(401, 404, 500, 503),
)
def delete_file(request: Request, file_id: str) -> Response:
    """Forget a file. Jobs made from it go on: they have its rows."""
    _store(request).delete(file_id, owner_of(request))
    return json_response({"id": file_id, "object": "file", "deleted": True})


def _store(request: Request) -> FileStore:
    jobs = service_of(request).fine_tuning
    assert jobs is not None  # or there would be no such route
    return jobs.workspace.files


def _purpose(values: list[Any]) -> str:
    if len(values) != 1 or values[0] not in PURPOSES:
        given = f"not {values[0]!r:.60}" if len(values) == 1 else f"given {len(values)} times"
        raise InvalidRequest("purpose", f"must be one of {', '.join(PURPOSES)}, {given}")
    return str(values[0])


def _file(values: list[Any]) -> UploadFile:
    if len(values) != 1 or not isinstance(values[0], UploadFile):
        raise InvalidRequest("file", "must be one file with a filename")
    return values[0]


def _refuse_unknown(names: list[str]) -> None:
    for name in names:
        if name.partition("[")[0] == "expires_after":
            raise InvalidRequest(
                "expires_after", "is not supported by this server: files stay until deleted"
            )
        if name not in Upload.model_fields:
            raise InvalidRequest(
                name[:100], f"unknown field{did_you_mean(name, Upload.model_fields)}"
            )


def plain_name(filename: str) -> str:
    """The last part of a path from any system, as text without control characters."""
    text = filename.encode("utf-8", "replace").decode()
    last = re.split(r"[/\\]", text)[-1]
    return "".join(c for c in last if c.isprintable())[-255:].strip() or "file"


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while chunk := file.read(_CHUNK):
            yield chunk
