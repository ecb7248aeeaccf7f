"""Answers with a file: streamed, with its length and digest, to go on where it broke off."""

from __future__ import annotations

import base64
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse

from anabranch.downloads import Download


def download_response(request: Request, download: Download) -> Response:
    """The bytes; 304 if the client has them already (``If-None-Match``).

    ``ETag`` is the SHA-256 in hexadecimal, ``Repr-Digest`` the same as RFC 9530 writes it. A file
    can be read in parts (``Range``), an archive only from its beginning.
    """
    etag = f'"{download.sha256}"'
    headers = {
        "etag": etag,
        "repr-digest": f"sha-256=:{base64.b64encode(bytes.fromhex(download.sha256)).decode()}:",
        "cache-control": "private, no-cache",
        "content-disposition": f"attachment; filename*=UTF-8''{quote(download.filename, safe='')}",
        # Whatever a job or a client wrote, no browser may run it.
        "x-content-type-options": "nosniff",
    }
    known = {each.strip() for each in request.headers.get("if-none-match", "").split(",")}
    if etag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    if download.path.is_file():
        return FileResponse(download.path, headers=headers, media_type="application/octet-stream")
    headers["content-length"] = str(download.size)
    return StreamingResponse(download.chunks(), headers=headers, media_type="application/zip")
