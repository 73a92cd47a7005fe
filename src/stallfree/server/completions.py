"""`/v1/completions`: from a request body to a response, whole or streamed."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stallfree.engine.outputs import Delta
from stallfree.executor.output import PositionLogprobs
from stallfree.server.access import owner_of
from stallfree.server.body import read_object
from stallfree.server.generation import Job, Outcome, PromptLogprobs, Usage, collect, stream
from stallfree.server.logprobs import CompletionLogprobs, joined, prompt_logprobs
from stallfree.server.protocol import CompletionRequest
from stallfree.server.service import Service
from stallfree.server.sse import DONE, EventStream, event, while_connected
from stallfree.server.validation import parse


async def create_completion(request: Request) -> Response:
    """Complete one prompt or several."""
    service: Service = request.app.state.service
    service.check_ready()
    body = parse(CompletionRequest, await read_object(request, service.settings.max_body_bytes))
    arrived_at = service.engine.now()
    service.check_model(body.model)
    job = await _job(service, body, owner_of(request), arrived_at)
    completion = _Completion(service, body, job)
    if body.stream:
        return EventStream(completion.events(), service.settings.max_unread_bytes)
    outcome = await while_connected(request.receive, collect(service.engine, job))
    answer = await service.in_thread(job.num_prompt_tokens, lambda: completion.whole(outcome))
    return JSONResponse(answer)


async def _job(service: Service, body: CompletionRequest, owner: str, arrived_at: float) -> Job:
    params = body.params()
    service.limits.check_params(params)
    service.limits.check_num_prompts(len(body.prompt), params.n)
    special_tokens = body.add_special_tokens is not False
    prompts = [
        await service.prompt(prompt, special_tokens, bool(body.echo)) for prompt in body.prompt
    ]
    request_id = f"cmpl-{uuid.uuid4().hex}"
    job = Job(request_id, prompts, params, body.targets(owner), arrived_at, body.salt(owner))
    await service.check(prompts, params, job.targets)
    return job


class _Completion:
    """The JSON of one response, whole or in chunks."""

    def __init__(self, service: Service, body: CompletionRequest, job: Job) -> None:
        self._service = service
        self._body = body
        self._job = job
        self._logprobs = [CompletionLogprobs(service.tokenizer) for _ in range(job.num_choices)]
        self._prompt_logprobs: dict[int, PromptLogprobs] = {}  # by prompt
        self._begun: set[int] = set()  # choices of which an entry was made
        self._head = {
            "id": job.request_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.model_name,
            **body.tier_shown,
        }

    def whole(self, outcome: Outcome) -> dict[str, Any]:
        """The response that is not streamed."""
        self._prompt_logprobs = outcome.prompt_logprobs
        choices = []
        for index, choice in enumerate(outcome.choices):
            entry = self._entry(index, choice.text, choice.logprobs, choice.finish_reason)
            if self._body.prompt_logprobs is not None:
                of_prompt = self._prompt_logprobs[index // self._job.params.n]
                entry["prompt_logprobs"] = prompt_logprobs(self._service.tokenizer, of_prompt)
            choices.append(entry)
        return {**self._head, "choices": choices, "usage": outcome.usage.fields()}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The events of the response that is streamed."""
        usage = Usage(self._job)
        no_usage: dict[str, None] = {"usage": None} if self._body.include_usage else {}
        held: list[tuple[int, Delta]] = []
        async with aclosing(stream(self._service.engine, self._job)) as deltas:
            async for item in deltas:
                if item is None:
                    yield b""
                    continue
                index, delta = item
                usage.add(delta)
                if delta.prompt_logprobs is not None:
                    self._prompt_logprobs[index // self._job.params.n] = delta.prompt_logprobs
                held.append(item)
                shown = [each for each in held if not self._awaits_prompt(each[0])]
                held = [each for each in held if self._awaits_prompt(each[0])]
                for own, part in shown:
                    entry = await self._entry_of(own, part)
                    yield event({**self._head, "choices": [entry], **no_usage})
        if self._body.include_usage:
            yield event({**self._head, "choices": [], "usage": usage.fields()})
        yield DONE

    def _awaits_prompt(self, index: int) -> bool:
        """Whether a choice echoes logprobs of a prompt that are still to come.

        They come with the first choice of a prompt, which others may overtake.
        """
        echoes = self._body.echo and self._body.logprobs is not None
        return bool(echoes) and index // self._job.params.n not in self._prompt_logprobs

    async def _entry_of(self, index: int, delta: Delta) -> dict[str, Any]:
        """The next part of a choice; in a thread if it is as long as the prompt."""
        make = partial(self._entry, index, delta.text, delta.logprobs or (), delta.finish_reason)
        if self._body.echo and index not in self._begun:
            return await self._service.in_thread(self._job.num_prompt_tokens, make)
        return make()

    def _entry(
        self,
        index: int,
        text: str,
        positions: Sequence[PositionLogprobs],
        finish_reason: str | None,
    ) -> dict[str, Any]:
        """The next part of a choice; the first begins with the prompt, if it is echoed."""
        echoes = bool(self._body.echo) and index not in self._begun
        self._begun.add(index)
        prompt = self._job.prompt_of(index)
        logprobs = None
        if self._body.logprobs is not None:
            pieces = []
            if echoes:
                of_prompt = self._prompt_logprobs[index // self._job.params.n]
                pieces.append(
                    self._logprobs[index].prompt(prompt.token_ids, prompt.text, of_prompt)
                )
            logprobs = joined(*pieces, self._logprobs[index].output(positions))
        return {
            "index": index,
            "text": prompt.text + text if echoes else text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
