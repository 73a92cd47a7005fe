"""Running the prompts of one HTTP request together, and putting their output in order.

A choice is one completion of one prompt: choice `prompt_index * n + i` is completion i of it.
Knows nothing of JSON.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

from stallfree.core.sampling_params import SamplingParams
from stallfree.core.targets import DEFAULT_TARGETS, Targets
from stallfree.engine.outputs import Delta
from stallfree.engine.served import ServedEngine
from stallfree.errors import ReplicaLostError
from stallfree.executor.output import PositionLogprobs
from stallfree.server.request_note import GenerationNote, current_note
from stallfree.server.service import Prompt

_RERUNS = 2  # of an answer that is not streamed, after copies of the model were lost

PromptLogprobs = tuple[PositionLogprobs | None, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """One HTTP request that is ready to run.

    Attributes:
        arrived_at: the engine's clock when it came.
        cache_salt: it shares KV blocks only with requests that have the same.
    """

    request_id: str
    prompts: Sequence[Prompt]
    params: SamplingParams
    targets: Targets = DEFAULT_TARGETS
    arrived_at: float = 0.0
    cache_salt: str | None = None

    @property
    def num_choices(self) -> int:
        """Completions in all."""
        return len(self.prompts) * self.params.n

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompts, each counted once."""
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    def engine_id(self, prompt_index: int) -> str:
        """What the engine calls the completions of a prompt."""
        return f"{self.request_id}-{prompt_index}"

    def prompt_of(self, choice: int) -> Prompt:
        """The prompt that `choice` completes."""
        return self.prompts[choice // self.params.n]


class Usage:
    """What a job has taken so far."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._num_output_tokens = 0
        self._num_cached_tokens: dict[str, int] = {}  # of the first completion of each prompt
        self._scheduled_at = math.inf

    def add(self, delta: Delta) -> None:
        """Count a delta of any of its choices."""
        self._num_output_tokens += len(delta.token_ids)
        if delta.index == 0:
            self._num_cached_tokens[delta.request_id] = delta.num_cached_tokens
        if delta.scheduled_at is not None:
            self._scheduled_at = min(delta.scheduled_at, self._scheduled_at)

    def fields(self) -> dict[str, Any]:
        """OpenAI's count of tokens, and how long the first of its choices waited."""
        fields: dict[str, Any] = {
            "prompt_tokens": self._job.num_prompt_tokens,
            "completion_tokens": self._num_output_tokens,
            "total_tokens": self._job.num_prompt_tokens + self._num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._num_cached_tokens.values())},
        }
        if math.isfinite(self._scheduled_at):
            delay_s = self._scheduled_at - self._job.arrived_at
            fields["scheduling_delay_ms"] = round(delay_s * 1000, 3)
        return fields


@dataclass(slots=True)
class Choice:
    """A whole completion."""

    text: str = ""
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(slots=True)
class Outcome:
    """The whole output of a job; `prompt_logprobs` has an entry for each prompt, if asked for."""

    choices: list[Choice]
    usage: Usage
    prompt_logprobs: dict[int, PromptLogprobs] = field(default_factory=dict)


async def stream(engine: ServedEngine, job: Job) -> AsyncGenerator[tuple[int, Delta] | None, None]:
    """Run a job; yields None once all of it is accepted, then deltas as they come, with its choice.

    Closing the generator aborts all of it.

    Raises:
        InvalidRequestError: before anything is yielded, the engine refuses a prompt.
        OverloadedError: before anything is yielded, too much waits.
        EngineStoppedError: the engine takes no requests, or ended this one.
        ExecutorError: an iteration failed.
        NoReplicaError: before anything is yielded, no copy of the model is ready.
        ReplicaLostError: the copy of the model that ran it was lost.
    """
    queue: asyncio.Queue[tuple[int, Delta] | asyncio.Task[None] | None] = asyncio.Queue()
    note = _begin_note(job)

    async def run(index: int, prompt: Prompt) -> None:
        deltas = engine.generate(
            job.engine_id(index), prompt.token_ids, job.params, job.targets, job.cache_salt
        )
        async with aclosing(deltas):
            async for delta in deltas:
                if delta is None:
                    queue.put_nowait(None)
                    continue
                choice = index * job.params.n + delta.index
                note.add(choice, delta, engine.now())
                queue.put_nowait((choice, _checked(delta)))

    tasks = [asyncio.create_task(run(index, prompt)) for index, prompt in enumerate(job.prompts)]
    for task in tasks:
        task.add_done_callback(queue.put_nowait)
    try:
        num_running, num_accepted = len(tasks), 0
        held: list[tuple[int, Delta]] = []  # of prompts that were accepted before others
        while num_running:
            item = await queue.get()
            if item is None:
                num_accepted += 1
                if num_accepted == len(tasks):
                    note.is_accepted = True
                    yield None
                    for each in held:
                        yield each
            elif isinstance(item, asyncio.Task):
                item.result()
                num_running -= 1
            elif num_accepted < len(tasks):
                held.append(item)
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def collect(engine: ServedEngine, job: Job) -> Outcome:
    """Run a job to its end; raises as `stream` does.

    If a copy of the model is lost with it, it runs again: nothing of the answer was sent yet.
    """
    with engine.keeping(map(job.engine_id, range(len(job.prompts)))):
        for _ in range(_RERUNS):
            with suppress(ReplicaLostError):
                return await _collect(engine, job)
            await engine.recover()
        return await _collect(engine, job)


async def _collect(engine: ServedEngine, job: Job) -> Outcome:
    outcome = Outcome([Choice() for _ in range(job.num_choices)], Usage(job))
    texts: list[list[str]] = [[] for _ in outcome.choices]
    async with aclosing(stream(engine, job)) as deltas:
        async for item in deltas:
            if item is None:
                continue
            index, delta = item
            choice = outcome.choices[index]
            texts[index].append(delta.text)
            choice.logprobs += delta.logprobs or ()
            choice.finish_reason = delta.finish_reason
            outcome.usage.add(delta)
            if delta.prompt_logprobs is not None:
                outcome.prompt_logprobs[index // job.params.n] = delta.prompt_logprobs
    for choice, text in zip(outcome.choices, texts, strict=True):
        choice.text = "".join(text)
    return outcome


def _begin_note(job: Job) -> GenerationNote:
    """Note what a job asks for, in the note of the request that it answers."""
    request = current_note()
    request.generation = GenerationNote(
        job.request_id,
        job.targets.tier,
        job.params,
        job.num_choices,
        job.num_prompt_tokens,
        job.arrived_at,
    )
    if request.keeps_text:
        request.generation.prompts = [each.text or list(each.token_ids) for each in job.prompts]
    return request.generation


def _checked(delta: Delta) -> Delta:
    if delta.error is not None:
        raise delta.error
    return delta
