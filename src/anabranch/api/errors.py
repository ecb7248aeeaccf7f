"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from anabranch.errors import AnabranchError, InvalidRequest, ModelNotFound

RETRY_AFTER_SECONDS = {429: "1", 503: "5"}

CUT_OFF = "the server shut down before the answer was finished"

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class BodyTooLarge(AnabranchError):
    """The request's body is larger than the server accepts."""

    status = 413
    code = "body_too_large"


class UnsupportedMediaType(AnabranchError):
    """The request's body is not declared to be JSON."""

    status = 415
    code = "unsupported_media_type"


def error_object(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The body of an error. Its ``type`` follows from the status."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A whole response, also usable as an ASGI application from a middleware."""
    headers = dict(headers or {})
    if status in RETRY_AFTER_SECONDS:
        headers.setdefault("retry-after", RETRY_AFTER_SECONDS[status])
    if status == 413:
        # What the client still sends would be read as the next request.
        headers.setdefault("connection", "close")
    body = json.dumps(error_object(status, message, param, code))
    return Response(body, status, headers, media_type="application/json")


def describe(error: AnabranchError) -> tuple[int, str, str | None, str | None]:
    """Status, message, param and code of one of our errors."""
    param = None
    if isinstance(error, InvalidRequest):
        param = error.field
    elif isinstance(error, ModelNotFound):
        param = "model"
    return error.status, str(error), param, error.code


async def handle_anabranch_error(request: Request, error: Exception) -> Response:
    """Exception handler for everything that this package raises on purpose."""
    assert isinstance(error, AnabranchError)
    return error_response(*describe(error))


async def handle_http_exception(request: Request, error: Exception) -> Response:
    """Exception handler for the router's own: unknown path, wrong method (with ``Allow``)."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        message, code = f"there is no {where}", "unknown_url"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message, code = f"{where} is not possible; allowed: {allowed}", "method_not_allowed"
    else:
        message = str(error.detail)
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    return error_response(error.status_code, message, code=code, headers=error.headers)
