"""The small endpoints: models, tokens, health and version."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stallfree.server.body import read_object
from stallfree.server.protocol import DetokenizeRequest, TokenizeRequest
from stallfree.server.service import Service
from stallfree.server.validation import parse


async def list_models(request: Request) -> Response:
    """The one model served."""
    service: Service = request.app.state.service
    return JSONResponse({"object": "list", "data": [_model(service)]})


async def retrieve_model(request: Request, model_id: str) -> Response:
    """The model of that name, if it is the one served."""
    service: Service = request.app.state.service
    service.check_model(model_id)
    return JSONResponse(_model(service))


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "stallfree",
        "max_model_len": service.max_model_len,
    }


async def tokenize(request: Request) -> Response:
    """Token ids of a prompt, or of messages in the chat template."""
    service: Service = request.app.state.service
    body = parse(TokenizeRequest, await read_object(request, service.settings.max_body_bytes))
    service.check_model(body.model)
    if body.messages:
        prompt = await service.chat_prompt(body.messages, bool(body.add_special_tokens))
        token_ids = list(prompt.token_ids)
    else:
        token_ids = await service.encode(body.prompt or "", body.add_special_tokens is not False)
    answer: dict[str, Any] = {
        "count": len(token_ids),
        "max_model_len": service.max_model_len,
        "tokens": token_ids,
    }
    if body.return_token_strs:
        answer["token_strs"] = await service.in_thread(
            len(token_ids), lambda: [service.tokenizer.token_text(i) for i in token_ids]
        )
    return JSONResponse(answer)


async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    service: Service = request.app.state.service
    body = parse(DetokenizeRequest, await read_object(request, service.settings.max_body_bytes))
    service.check_model(body.model)
    service.check_token_ids(body.tokens, "tokens")
    return JSONResponse({"prompt": await service.decode(body.tokens)})


async def health(request: Request) -> Response:
    """Whether requests are taken (200) or not (503), and how many completions there are.

    With them, how many iterations were over the latency target because prompts must go on, and by
    how many seconds in all; with copies of the model, how many are ready.
    """
    service: Service = request.app.state.service
    answer: dict[str, object] = {
        "status": service.status,
        "running": service.engine.num_running,
        "waiting": service.engine.num_waiting,
        "squeezed_iterations": service.engine.squeezed.iterations,
        "squeezed_s": round(service.engine.squeezed.over_s, 3),
    }
    answer |= service.engine.health
    return JSONResponse(answer, 200 if service.status == "ok" else 503)


async def show_version() -> Response:
    """The version of this server."""
    return JSONResponse({"version": version("stallfree")})
