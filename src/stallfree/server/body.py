"""The body of a request: read up to a limit and parsed as strict JSON.

Knows nothing of what the fields mean.
"""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json
from starlette.requests import Request

from stallfree.errors import InvalidRequestError
from stallfree.server.errors import ApiError, shorten


async def read_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """The JSON object in the body of `request`, of at most `max_bytes`.

    Raises:
        ApiError: the body is too large (413; no more than the limit is ever held) or says that it
            is no JSON (415).
        InvalidRequestError: the body is not a JSON object in UTF-8.
        ClientDisconnect: the client left before all of it had come.
    """
    _check_content_type(request.headers.get("content-type", ""))
    return parse_object(await _read(request, max_bytes))


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object that `body` holds.

    Raises:
        InvalidRequestError: it is not JSON in UTF-8 (NaN, Infinity and half surrogate pairs are
            not), is nested too deeply, or is not an object.
    """
    try:
        value = from_json(body, allow_inf_nan=False, cache_strings=False)
    except ValueError as error:
        raise InvalidRequestError(f"the body is not JSON in UTF-8: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequestError("the body must be a JSON object")
    return value


def _check_content_type(header: str) -> None:
    media_type = header.partition(";")[0].strip().lower()
    if media_type and media_type != "application/json" and not media_type.endswith("+json"):
        raise ApiError(415, f"content-type is {shorten(media_type)}; send application/json")


async def _read(request: Request, max_bytes: int) -> bytes:
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(f"{announced} bytes", max_bytes)
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > max_bytes:
            raise _too_large("larger", max_bytes)
    return bytes(body)


def _too_large(size: str, limit: int) -> ApiError:
    return ApiError(413, f"the body is {size}; the limit is {limit} bytes")
