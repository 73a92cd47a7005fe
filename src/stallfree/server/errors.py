"""How errors look on the wire: the body, type, code and status that OpenAI clients expect.

No body ever carries a traceback, a path or the text of an unexpected exception: those go to the
log. Knows nothing of requests or responses beyond their status.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from stallfree.errors import (
    ContextLengthError,
    EngineStoppedError,
    ExecutorError,
    InvalidRequestError,
    NoReplicaError,
    OutOfMemoryError,
    OverloadedError,
    ReplicaLostError,
    StallfreeError,
    TokenizerError,
)

MAX_MESSAGE_CHARS = 400
RETRY_AFTER_S = 5
FAILED = "the server failed on this request; its log says more"

_TYPES = {429: "rate_limit_error"}  # of errors, by status, where it is not that of all others

logger = logging.getLogger("stallfree.server")


class ApiError(StallfreeError):
    """An answer that is an error.

    Attributes:
        status: HTTP status.
        type: OpenAI's coarse class of error.
        param: the offending field as the client sent it, or None.
        code: OpenAI's fine class of error, or None.
        headers: extra response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """The JSON object of the response."""
        message = shorten(str(self))
        return {
            "error": {
                "message": message,
                "type": self.type,
                "param": self.param if self.param is None else shorten(self.param),
                "code": self.code,
            }
        }


def api_error(error: Exception) -> ApiError:
    """What a client is told of `error`; an unexpected one is logged and told of in general."""
    match error:
        case ApiError():
            return error
        case ContextLengthError():
            code = "context_length_exceeded"
            return ApiError(400, str(error), param=error.param, code=code)
        case InvalidRequestError():
            return ApiError(400, str(error), param=error.param)
        case TokenizerError():
            return ApiError(400, str(error))
        case OverloadedError():
            retry_after = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
            return ApiError(429, str(error), code="rate_limit_exceeded", headers=retry_after)
        case EngineStoppedError():
            message = "the server is stopping and cannot take or finish this request"
            return ApiError(503, message, headers={"Retry-After": str(RETRY_AFTER_S)})
        case OutOfMemoryError():
            message = "the server has no memory to run this request; a shorter one may run"
            return ApiError(503, message, headers={"Retry-After": str(RETRY_AFTER_S)})
        case ReplicaLostError() | NoReplicaError():
            return ApiError(503, str(error), headers={"Retry-After": str(RETRY_AFTER_S)})
        case ExecutorError():
            return ApiError(500, "the iteration that held this request failed; the log says why")
    logger.error("a request failed", exc_info=error)
    return ApiError(500, FAILED)


def shorten(text: str) -> str:
    """`text` without its middle, if it is too long to be read."""
    if len(text) <= MAX_MESSAGE_CHARS:
        return text
    half = MAX_MESSAGE_CHARS // 2
    return f"{text[:half]} ... {text[-half:]}"
