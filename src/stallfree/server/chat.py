"""`/v1/chat/completions`: from a request body to a response, whole or streamed."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stallfree.engine.outputs import Delta
from stallfree.server.access import owner_of
from stallfree.server.body import read_object
from stallfree.server.generation import Job, Outcome, Usage, collect, stream
from stallfree.server.logprobs import chat_logprobs
from stallfree.server.protocol import ChatRequest
from stallfree.server.service import Service
from stallfree.server.sse import DONE, EventStream, event, while_connected
from stallfree.server.validation import parse


async def create_chat_completion(request: Request) -> Response:
    """Answer the last message of a chat."""
    service: Service = request.app.state.service
    service.check_ready()
    body = parse(ChatRequest, await read_object(request, service.settings.max_body_bytes))
    arrived_at = service.engine.now()
    service.check_model(body.model)
    params = body.params()
    service.limits.check_params(params, logprobs_field="top_logprobs")
    prompt = await service.chat_prompt(body.messages, bool(body.add_special_tokens))
    request_id = f"chatcmpl-{uuid.uuid4().hex}"
    owner = owner_of(request)
    salt = body.salt(owner)
    job = Job(request_id, [prompt], params, body.targets(owner), arrived_at, salt)
    await service.check(job.prompts, params, job.targets, source="messages")
    if body.stream:
        events = _events(service, body, job)
        return EventStream(events, service.settings.max_unread_bytes)
    outcome = await while_connected(request.receive, collect(service.engine, job))
    return JSONResponse(_whole(service, body, job, outcome))


def _whole(service: Service, body: ChatRequest, job: Job, outcome: Outcome) -> dict[str, Any]:
    asked = job.params.logprobs is not None
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": choice.text},
            "logprobs": chat_logprobs(service.tokenizer, choice.logprobs if asked else None),
            "finish_reason": choice.finish_reason,
        }
        for index, choice in enumerate(outcome.choices)
    ]
    return {
        **_head(service, body, job, "chat.completion"),
        "choices": choices,
        "usage": outcome.usage.fields(),
    }


async def _events(service: Service, body: ChatRequest, job: Job) -> AsyncGenerator[bytes, None]:
    head = _head(service, body, job, "chat.completion.chunk")
    usage = Usage(job)
    no_usage: dict[str, None] = {"usage": None} if body.include_usage else {}
    begun: set[int] = set()
    async with aclosing(stream(service.engine, job)) as deltas:
        async for item in deltas:
            if item is None:
                yield b""
                continue
            index, delta = item
            usage.add(delta)
            entry = _entry(service, index, delta, is_first=index not in begun)
            begun.add(index)
            yield event({**head, "choices": [entry], **no_usage})
    if body.include_usage:
        yield event({**head, "choices": [], "usage": usage.fields()})
    yield DONE


def _entry(service: Service, index: int, delta: Delta, *, is_first: bool) -> dict[str, Any]:
    role = {"role": "assistant"} if is_first else {}
    return {
        "index": index,
        "delta": {**role, "content": delta.text},
        "logprobs": chat_logprobs(service.tokenizer, delta.logprobs),
        "finish_reason": delta.finish_reason,
    }


def _head(service: Service, body: ChatRequest, job: Job, kind: str) -> dict[str, Any]:
    return {
        "id": job.request_id,
        "object": kind,
        "created": int(time.time()),
        "model": service.model_name,
        **body.tier_shown,
    }
