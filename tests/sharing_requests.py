"""Requests that begin alike, a scheduler that caches prefixes, and single steps of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from schedulers import run_to_end, scheduler

from stallfree.core.batch import Batch
from stallfree.core.request import Request
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.scheduler import Scheduler
from stallfree.core.targets import Targets


def caching(num_blocks: int = 40, **settings: Any) -> Scheduler:
    """A scheduler whose blocks have 4 tokens, and whose iterations 16."""
    return scheduler(num_blocks, prefix_caching=True, **settings)


def ask(
    name: str, prompt: Sequence[int], max_tokens: int = 2, tier: str = "default", **fields: Any
) -> Request:
    scored = fields.pop("prompt_logprobs", None)
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, prompt_logprobs=scored)
    targets = Targets(tier)
    return Request(name, prompt, params, max_tokens=max_tokens, targets=targets, **fields)


def serve(own: Scheduler, *requests: Request) -> list[Batch]:
    for each in requests:
        own.add(each)
    return run_to_end(own)


def step(own: Scheduler) -> dict[str, tuple[int, int]]:
    """Run an iteration; where each request's chunk starts, and where it stops."""
    batch = own.schedule()
    assert batch is not None
    own.complete(batch, [1] * len(batch.sampling))
    own.check_integrity()
    return spans(batch)


def spans(batch: Batch) -> dict[str, tuple[int, int]]:
    return {chunk.request.request_id: (chunk.start, chunk.stop) for chunk in batch.chunks}
