"""Iterations that hold what the last one held, taken at once: for simulations, where nobody waits.

While all that runs are decodes and nobody arrives or leaves, every iteration changes the same
counters by the same amounts. Nothing here knows how long they take.
"""

from __future__ import annotations

from stallfree.core.batch import Batch
from stallfree.core.blocks import BlockPool
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler


def num_repeats(scheduler: Scheduler, batch: Batch) -> int:
    """How many more iterations hold what a completed batch held, if nobody arrives or leaves.

    Zero unless all that runs are decodes, nobody waits, and only their lengths end them.
    """
    running = scheduler.running
    if len(scheduler.waiting) or len(running) != batch.num_decodes or not running:
        return 0
    if len(batch.chunks) != len(running) or not all(r.is_decode for r in running):
        return 0
    if any(not r.params.ignore_eos or r.params.stop_token_ids for r in running):
        return 0
    count = min([request.max_tokens - len(request.output_token_ids) for request in running]) - 1
    missing = sum([_missing_blocks(scheduler.pool, request, count) for request in running])
    return count if missing <= scheduler.pool.num_free else 0


def repeat(scheduler: Scheduler, batch: Batch, token_id: int, count: int) -> None:
    """Take the results of `count` more iterations like `batch`, at most `num_repeats` of it.

    As if each had been scheduled and completed with `token_id` for every request.
    """
    for chunk in batch.chunks:
        request = chunk.request
        missing = _missing_blocks(scheduler.pool, request, count)
        request.block_table += scheduler.pool.allocate(missing)
        request.num_computed_tokens += count
        request.num_confirmed_tokens += count
        request.output_token_ids += [token_id] * count
        if scheduler.counters is not None:
            for _ in range(count):
                scheduler.counters.charge(request.targets.user, 0, True)


def _missing_blocks(pool: BlockPool, request: Request, count: int) -> int:
    """Blocks that a request lacks for `count` more decodes."""
    last = request.num_tokens + count - 1
    return max(0, pool.blocks_for(last) - len(request.block_table))
