"""The application: its routes, its key, its errors, and running it."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from stallfree.engine.served import ServedEngine
from stallfree.engine.settings import ServerSettings
from stallfree.errors import StallfreeError
from stallfree.server import endpoints
from stallfree.server.chat import create_chat_completion
from stallfree.server.completions import create_completion
from stallfree.server.errors import FAILED, ApiError, api_error, shorten
from stallfree.server.lifecycle import ApiServer, bind
from stallfree.server.protocol import (
    Body,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from stallfree.server.service import Service

_BEARER = HTTPBearer(auto_error=False)
_SCHEMAS = "#/components/schemas/"


def create_app(engine: ServedEngine, settings: ServerSettings) -> FastAPI:
    """The HTTP application for an engine; its lifespan starts and stops the engine.

    Raises:
        ConfigError: the chat template cannot be used.
    """
    service = Service(engine, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        engine.start()
        yield
        if not service.ends_at_once:
            await asyncio.to_thread(engine.stop)

    app = FastAPI(
        title="stallfree", version=version("stallfree"), lifespan=lifespan, redirect_slashes=False
    )
    app.state.service = service
    for kind in (StallfreeError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _answer_error)
    app.add_api_route("/health", endpoints.health, methods=["GET"])
    app.add_api_route("/version", endpoints.show_version, methods=["GET"])
    protected = APIRouter(dependencies=_key_check(settings.api_key))
    protected.add_api_route("/v1/models", endpoints.list_models, methods=["GET"])
    protected.add_api_route("/v1/models/{model_id:path}", endpoints.retrieve_model, methods=["GET"])
    schemas: dict[str, Any] = {}
    posts: dict[str, tuple[Callable[[Request], Awaitable[Response]], type[Body]]] = {
        "/v1/completions": (create_completion, CompletionRequest),
        "/v1/chat/completions": (create_chat_completion, ChatRequest),
        "/tokenize": (endpoints.tokenize, TokenizeRequest),
        "/detokenize": (endpoints.detokenize, DetokenizeRequest),
    }
    for path, (endpoint, body) in posts.items():
        protected.add_api_route(
            path, endpoint, methods=["POST"], openapi_extra=_body_schema(body, schemas)
        )
    app.include_router(protected)
    app.openapi().setdefault("components", {}).setdefault("schemas", {}).update(schemas)
    return app


def run_server(
    engine: ServedEngine, settings: ServerSettings, on_ready: Callable[[str], None]
) -> int:
    """Serve until a signal or the death of the engine; call it in the main thread.

    The first SIGINT or SIGTERM refuses new requests and lets the others finish within
    `drain_timeout_s`; the second ends at once.

    Args:
        engine: not started yet.
        settings: of the server.
        on_ready: called with the URL once requests are answered.

    Returns:
        The exit code: 0 after a drain, 1 if the engine died, 128 and the signal after a second.

    Raises:
        ConfigError: the port cannot be had, or the chat template cannot be used.
    """
    listener = bind(settings.host, settings.port)
    app = create_app(engine, settings)
    server = ApiServer(app, app.state.service, settings, on_ready)
    server.run(sockets=[listener])
    return server.exit_code


def _key_check(api_key: str | None) -> list[Any]:
    """Dependencies that refuse requests without the key; none if there is no key."""
    if api_key is None:
        return []
    expected = api_key.encode()

    async def check(
        given: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)],
    ) -> None:
        key = b"" if given is None else given.credentials.encode("latin-1")
        if not hmac.compare_digest(key, expected):
            raise ApiError(
                401,
                "the API key is wrong" if key else "an API key is required as a bearer token",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    return [Depends(check)]


async def _answer_error(request: Request, error: Exception) -> Response:
    match error:
        case ClientDisconnect():  # nobody reads this
            return Response(status_code=499)
        case HTTPException(status_code=404):
            answer = ApiError(404, f"there is nothing at {shorten(request.url.path)}")
        case HTTPException(status_code=405):
            answer = ApiError(405, f"{request.method} is not allowed here", headers=error.headers)
        case HTTPException():
            answer = ApiError(error.status_code, str(error.detail), headers=error.headers)
        case StallfreeError():
            answer = api_error(error)
        case _:  # raised again and logged by those who called
            answer = ApiError(500, FAILED)
    return JSONResponse(answer.body(), answer.status, answer.headers)


def _body_schema(body: type[Body], schemas: dict[str, Any]) -> dict[str, Any]:
    """What the documentation says of a body; the types it uses are added to `schemas`."""
    schema = body.model_json_schema(ref_template=_SCHEMAS + "{model}")
    schemas.update(schema.pop("$defs", {}))
    schemas[body.__name__] = schema
    reference = {"$ref": _SCHEMAS + body.__name__}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}
    }
