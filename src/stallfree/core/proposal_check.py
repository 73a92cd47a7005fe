"""Checks what a policy proposed: only what is legal becomes a batch.

A policy that oversteps is a bug, which is found before anything is allocated or changed. Nothing
here knows which policy it was, or why it chose so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stallfree.core.batch import Batch, Chunk
from stallfree.core.policies import Proposal
from stallfree.core.request import Request, RequestState


class PolicyError(Exception):
    """A policy proposed what it may not: a bug in the policy; nothing was scheduled."""


def checked_batch(
    proposals: Sequence[Proposal],
    limit: int | None,
    num_found: Callable[[Request], int],
    may_run: Callable[[Request], bool],
) -> Batch:
    """The batch that was proposed, once all of it is found legal.

    Args:
        proposals: of a policy.
        limit: most tokens of the iteration, or None; decodes may go beyond it.
        num_found: how many tokens of a request that waits are there already: it begins after them.
        may_run: whether a request that was admitted may be in the batch.

    Raises:
        PolicyError: a request cannot run, or not so many tokens; or there are too many together.
    """
    chunks = []
    for view, num_tokens in proposals:
        request = view
        if not isinstance(request, Request) or not may_run(request):
            raise PolicyError(f"{request} cannot be scheduled")
        start, state = request.num_computed_tokens, request.state
        size = request.num_prompt_tokens + len(request.output_token_ids)
        if state is RequestState.FINISHED:
            raise PolicyError(f"{request} has ended")
        if state is RequestState.WAITING:
            start = num_found(request)
        if not 1 <= num_tokens <= size - start:
            raise PolicyError(f"{num_tokens} tokens proposed of {request}")
        samples = start + num_tokens == size
        is_decode = start == size - 1 and size > request.num_prompt_tokens
        chunks.append(Chunk(request, start, num_tokens, samples, is_decode))
    if len({id(chunk.request) for chunk in chunks}) < len(chunks):
        raise PolicyError("a request was proposed twice")
    batch = Batch(chunks, limit)
    if limit is not None and batch.num_tokens > max(limit, batch.num_decodes):
        raise PolicyError(f"{batch.num_tokens} tokens proposed; the budget is {limit}")
    return batch
