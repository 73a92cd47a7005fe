"""The application: its routes, its key, its errors, and running it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import APIRouter, FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from stallfree.engine.served import ServedEngine
from stallfree.engine.settings import ServerSettings
from stallfree.errors import StallfreeError
from stallfree.server import endpoints
from stallfree.server.access import key_check, places
from stallfree.server.chat import create_chat_completion
from stallfree.server.completions import create_completion
from stallfree.server.dashboard import add_dashboard
from stallfree.server.documentation import complete, documented
from stallfree.server.errors import FAILED, ApiError, api_error, shorten
from stallfree.server.guard import Guard
from stallfree.server.lifecycle import ApiServer, bind
from stallfree.server.observability import Observability
from stallfree.server.request_id import HEADER as REQUEST_ID
from stallfree.server.request_note import current_note
from stallfree.server.service import Service


def create_app(engine: ServedEngine, settings: ServerSettings) -> FastAPI:
    """The HTTP application for an engine; its lifespan starts and stops the engine.

    Raises:
        ConfigError: the chat template or the API keys cannot be used, or traces cannot be sent.
    """
    service = Service(engine, settings)
    observability = Observability(service, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        engine.start()
        yield
        service.templates.close()
        if not service.ends_at_once:
            await asyncio.to_thread(engine.stop)
            await asyncio.to_thread(observability.close)

    app = FastAPI(
        title="stallfree", version=version("stallfree"), lifespan=lifespan, redirect_slashes=False
    )
    app.state.service = service
    app.state.notes = observability.notes
    app.add_middleware(Guard, settings=settings)
    if settings.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origin,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After", REQUEST_ID],
        )
    for kind in (StallfreeError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _answer_error)
    app.add_api_route("/health", endpoints.health, **documented("/health"))
    app.add_api_route("/version", endpoints.show_version, **documented("/version"))
    protected = APIRouter(dependencies=key_check(service.keys))
    limited = APIRouter(dependencies=places(settings.max_concurrent_requests))
    gets: dict[str, Callable[..., Awaitable[Response]]] = {
        "/v1/models": endpoints.list_models,
        "/v1/models/{model_id:path}": endpoints.retrieve_model,
    }
    posts: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "/v1/completions": create_completion,
        "/v1/chat/completions": create_chat_completion,
        "/tokenize": endpoints.tokenize,
        "/detokenize": endpoints.detokenize,
    }
    for method, routes in (("GET", gets), ("POST", posts)):
        for path, endpoint in routes.items():
            limited.add_api_route(path, endpoint, methods=[method], **documented(path))
    protected.include_router(limited)
    watching = APIRouter(dependencies=key_check(service.keys, watches=True))
    add_dashboard(app, watching)
    observability.add_to(app, watching)
    for router in (protected, watching):
        app.include_router(router)
    complete(app.openapi())
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
        ConfigError: the port cannot be had, or a file of the settings cannot be used.
    """
    listener = bind(settings.host, settings.port)
    app = create_app(engine, settings)
    server = ApiServer(app, app.state.service, app.state.notes, settings, on_ready)
    app.state.service.templates.start()
    server.run(sockets=[listener])
    return server.exit_code


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
        case _:  # raised again, logged, and the connection closed, by those who called
            answer = ApiError(500, FAILED, headers={"Connection": "close"})
    headers = {**(answer.headers or {}), REQUEST_ID: current_note().request_id}
    return JSONResponse(answer.body(), answer.status, headers)
