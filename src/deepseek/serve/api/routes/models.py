"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from deepseek.serve.api.schema.answers import Model, ModelList
from deepseek.serve.api.service import Service
from deepseek.serve.api.strict_json import StrictRoute


def models_router(service: Service) -> APIRouter:
    """Return the router of models and adapters."""
    router = APIRouter(route_class=StrictRoute, tags=["models"])

    def describe(name: str) -> Model:
        return Model(
            id=name,
            created=service.started,
            owned_by="deepseek",
            root=service.settings.model,
            max_model_len=service.generator.context,
        )

    @router.get("/v1/models")
    async def list_models() -> ModelList:
        """Return what can be asked for by name."""
        return ModelList(data=[describe(name) for name in service.reader.model_names()])

    @router.get("/v1/models/{model:path}")
    async def get_model(model: Annotated[str, Path(max_length=256)]) -> Model:
        """Return one of them; a name is looked up, never opened."""
        adapter = service.reader.adapter(model)
        return describe(adapter or service.settings.model)

    return router
