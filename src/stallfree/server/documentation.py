"""What the server's OpenAPI document says of its routes: bodies, answers and errors.

The tests send what it allows, and more, and hold every answer against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stallfree.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from stallfree.server.validation import Body

Schema = dict[str, Any]

_SCHEMAS = "#/components/schemas/"
_INTEGER: Schema = {"type": "integer"}
_TEXT: Schema = {"type": "string"}


def _object(*optional: str, **properties: Schema) -> Schema:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "required": required, "properties": properties}


def _list_of(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


_ERROR = _object(
    error=_object(message=_TEXT, type=_TEXT, param=_nullable(_TEXT), code=_nullable(_TEXT))
)
_USAGE = _object(
    "scheduling_delay_ms",
    "prompt_tokens_details",
    prompt_tokens=_INTEGER,
    completion_tokens=_INTEGER,
    total_tokens=_INTEGER,
    scheduling_delay_ms={"type": "number"},
    prompt_tokens_details=_object(cached_tokens=_INTEGER),
)
_CHOICE: dict[str, Schema] = {
    "index": _INTEGER,
    "logprobs": _nullable({"type": "object"}),
    "finish_reason": {"enum": ["stop", "length"]},
}


def _answer(choice: Schema) -> Schema:
    return _object(
        "service_tier",
        id=_TEXT,
        object=_TEXT,
        created=_INTEGER,
        model=_TEXT,
        service_tier=_TEXT,
        choices=_list_of(choice),
        usage=_USAGE,
    )


_MODEL = _object(id=_TEXT, object=_TEXT, created=_INTEGER, owned_by=_TEXT, max_model_len=_INTEGER)
_HEALTH = _object(
    "replicas",
    "ready_replicas",
    status={"enum": ["ok", "draining", "dead", "starting"]},
    running=_INTEGER,
    waiting=_INTEGER,
    squeezed_iterations=_INTEGER,
    squeezed_s={"type": "number"},
    replicas=_INTEGER,
    ready_replicas=_INTEGER,
)
_ANSWERS: dict[str, tuple[str, Schema]] = {
    "/v1/completions": ("The completions.", _answer(_object(text=_TEXT, **_CHOICE))),
    "/v1/chat/completions": (
        "The next message of the chat.",
        _answer(_object(message=_object(role=_TEXT, content=_TEXT), **_CHOICE)),
    ),
    "/tokenize": (
        "The tokens of a text.",
        _object(
            "token_strs",
            count=_INTEGER,
            max_model_len=_INTEGER,
            tokens=_list_of(_INTEGER),
            token_strs=_list_of(_TEXT),
        ),
    ),
    "/detokenize": ("The text of tokens.", _object(prompt=_TEXT)),
    "/v1/models": ("The models served.", _object(object=_TEXT, data=_list_of(_MODEL))),
    "/v1/models/{model_id:path}": ("A model that is served.", _MODEL),
    "/health": ("Requests are taken.", _HEALTH),
    "/version": ("The version of the server.", _object(version=_TEXT)),
}
_BODIES: dict[str, type[Body]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
_STREAMED = ("/v1/completions", "/v1/chat/completions")
_ERRORS = {
    400: "The request is wrong; `param` is the field, if it is one.",
    401: "There is no API key, or it is wrong.",
    404: "There is no such model.",
    408: "The request took too long to come.",
    413: "The body is too large.",
    415: "The body is no JSON.",
    429: "Too much is under way, for this server or this key; `Retry-After` says when to return.",
    431: "The head of the request is too large.",
    500: "The server failed on this request; its log says more.",
    503: "The server is about to end.",
}
_OPEN = (400, 408, 431, 500)  # errors of routes that take no key: they tell nothing of requests
_PROTECTED = (*_OPEN, 401, 404, 429)


def documented(path: str) -> dict[str, Any]:
    """What `add_api_route` is to be told of the route at `path`."""
    description, schema = _ANSWERS[path]
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if path in _STREAMED:
        description += " With `stream`, an event for each part."
        content["text/event-stream"] = {"schema": _object(data=_TEXT)}  # of each event
    statuses: tuple[int, ...] = _OPEN if path in ("/health", "/version") else _PROTECTED
    if path in _BODIES:
        statuses = tuple(_ERRORS)
    responses: dict[int, Any] = {200: {"description": description, "content": content}}
    responses |= {status: _error(_ERRORS[status]) for status in sorted(statuses)}
    if path == "/health":
        responses[503] = {
            "description": "No requests are taken.",
            "content": {"application/json": {"schema": _HEALTH}},
        }
    extra: dict[str, Any] = {}
    if path in _BODIES:
        content = {"application/json": {"schema": _reference(_BODIES[path].__name__)}}
        extra["openapi_extra"] = {"requestBody": {"required": True, "content": content}}
    return {"responses": responses, **extra}


def complete(document: dict[str, Any]) -> None:
    """Add what the routes refer to, and take out what FastAPI says of errors, which are ours."""
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas["Error"] = _ERROR
    for body in _BODIES.values():
        schema = body.model_json_schema(ref_template=_SCHEMAS + "{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[body.__name__] = schema
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    paths: Mapping[str, Mapping[str, Any]] = document["paths"]
    for operations in paths.values():
        for operation in operations.values():
            operation["responses"].pop("422", None)


def _error(description: str) -> dict[str, Any]:
    return {
        "description": description,
        "content": {"application/json": {"schema": _reference("Error")}},
    }


def _reference(name: str) -> Schema:
    return {"$ref": _SCHEMAS + name}
