"""What every HTTP request goes through: its head is checked, and what it takes is given back.

Knows nothing of routes, keys or bodies.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from stallfree.engine.limit_settings import LimitSettings
from stallfree.server.errors import ApiError

RETRY_AFTER_S = 1  # how soon one of many requests has probably ended
_SEPARATORS = 4  # bytes of a header beside its name and value

_AT_END = "stallfree.at_end"  # where a request's scope has what is to be done when it ends


class Guard:
    """ASGI middleware around the whole application, with the limits of `settings`."""

    def __init__(self, app: ASGIApp, settings: LimitSettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run a request, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        error = self._head_error(scope)
        if error is not None:
            await JSONResponse(error.body(), error.status)(scope, receive, send)
            return
        with ExitStack() as at_end:
            scope[_AT_END] = at_end
            await self._app(scope, receive, send)

    def _head_error(self, scope: Scope) -> ApiError | None:
        """Why the head is refused; one that came in a single piece was not measured before."""
        headers = scope["headers"]
        if len(headers) > self._settings.max_headers:
            return ApiError(
                431,
                f"the request has {len(headers)} headers; the limit is "
                f"{self._settings.max_headers}",
            )
        num_bytes = len(scope["raw_path"]) + len(scope["query_string"])
        num_bytes += sum(len(name) + len(value) + _SEPARATORS for name, value in headers)
        if num_bytes > self._settings.max_header_bytes:
            return head_too_large(num_bytes, self._settings.max_header_bytes)
        return None


class Places:
    """A number of requests that may be under way at once, as a dependency of their routes.

    A request leaves its place when its response has ended, however it does.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._num_taken = 0

    async def take(self, request: Request) -> None:
        """Give `request` a place; raises ApiError (429) if there is none."""
        if self._num_taken >= self._limit:
            raise busy(f"{self._num_taken} requests are under way; the limit is {self._limit}")
        self._num_taken += 1
        at_end(request, self._leave)

    def _leave(self) -> None:
        self._num_taken -= 1


def at_end(request: Request, action: Callable[[], None]) -> None:
    """Do `action` when the response to `request` has ended, however it does."""
    stack: ExitStack = request.scope[_AT_END]
    stack.callback(action)


def busy(message: str, retry_after_s: int = RETRY_AFTER_S) -> ApiError:
    """The answer to a request that is refused because of others."""
    return ApiError(
        429, message, code="rate_limit_exceeded", headers={"Retry-After": str(retry_after_s)}
    )


def head_too_large(num_bytes: int, limit: int) -> ApiError:
    """The answer to a request whose head has `num_bytes` so far."""
    return ApiError(431, f"the head of the request has {num_bytes} bytes; the limit is {limit}")
