"""``/v1/models``: what is served."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from anabranch.api import openapi
from anabranch.api.responses import DeletedModel, ModelItem, ModelList
from anabranch.api.routes.common import json_response, service_of
from anabranch.models.protocol import Model

router = APIRouter()


@router.get("/v1/models", response_model=ModelList, responses=openapi.errors(401, 500))
async def list_models(request: Request) -> Response:
    """What is served."""
    service = service_of(request)
    data = [model_item(model, service.created) for model in service.listed()]
    return json_response({"object": "list", "data": data})


# A name may contain slashes, as on the Hugging Face hub.
@router.get(
    "/v1/models/{model:path}", response_model=ModelItem, responses=openapi.errors(401, 404, 500)
)
async def show_model(request: Request, model: str) -> Response:
    """One model, with its card."""
    service = service_of(request)
    return json_response(model_item(service.model(model), service.created))


@router.delete(
    "/v1/models/{model:path}",
    response_model=DeletedModel,
    responses=openapi.errors(400, 401, 404, 500, 503),
)
async def delete_model(request: Request, model: str) -> Response:
    """Stop serving an adapter, named ``model:adapter``. Its files stay."""
    name = await service_of(request).unload_adapter(model)
    return json_response({"id": name, "object": "model", "deleted": True})


def model_item(model: Model, created: int) -> dict[str, Any]:
    """A model as OpenAI shows one, with its card."""
    return {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": "anabranch",
        "card": model.card.to_dict(),
    }
