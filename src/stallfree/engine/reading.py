"""What an engine did and what it holds at one moment, as values to send to another process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stallfree.core.bubbles import StageUse
from stallfree.core.budget import Squeezed
from stallfree.core.swap import SwapSpace
from stallfree.core.targets import RANKS
from stallfree.engine.engine import Engine
from stallfree.engine.meter import Counts
from stallfree.executor.distributed import DistributedPipeline


@dataclass(frozen=True, slots=True)
class SwapUse:
    """A swap space.

    Attributes:
        num_used, num_free: its slots, each for a block.
        num_out, num_in: blocks that were copied so far.
    """

    num_used: int = 0
    num_free: int = 0
    num_out: int = 0
    num_in: int = 0


@dataclass(frozen=True, slots=True)
class EngineReading:
    """An engine as it was read. It may share what still changes with an engine of this process.

    Attributes:
        counts: of what it did.
        num_running: requests that hold KV blocks, by tier.
        num_waiting: requests that wait for admission, by tier.
        preemptions: requests whose KV blocks were taken back, by cause.
        swapped: those of them that are kept in the swap space, by cause.
        swap: what is in it; all zero without one.
        num_cached_tokens: tokens of prompts whose KV was there.
        squeezed: what reading prompts cost against the latency target.
        num_used_blocks, num_free_blocks: of the KV cache.
        stages: what each stage of a pipeline did; none if the model runs in the engine's process.
    """

    counts: Counts
    num_running: Mapping[str, int]
    num_waiting: Mapping[str, int]
    preemptions: Mapping[str, int]
    swapped: Mapping[str, int]
    swap: SwapUse
    num_cached_tokens: int
    squeezed: Squeezed
    num_used_blocks: int
    num_free_blocks: int
    stages: Sequence[StageUse]


def read(engine: Engine, counts: Counts) -> EngineReading:
    """Read an engine, in any thread: figures may be an iteration apart.

    Args:
        engine: to be read.
        counts: of a meter that is one of its observers.
    """
    scheduler, executor = engine.scheduler, engine.executor
    running = Counter(request.targets.tier for request in list(scheduler.running))
    up_to = [0, *(scheduler.waiting.num_requests(rank) for rank in RANKS.values())]
    num_free = scheduler.pool.num_free
    return EngineReading(
        counts=counts,
        num_running={tier: running[tier] for tier in RANKS},
        num_waiting={tier: max(0, up_to[rank + 1] - up_to[rank]) for tier, rank in RANKS.items()},
        preemptions=dict(scheduler.preemptions),
        swapped=dict(scheduler.swapped),
        swap=_swap_use(scheduler.swap),
        num_cached_tokens=scheduler.prefix_hits,
        squeezed=scheduler.budget.squeezed,
        num_used_blocks=scheduler.pool.num_blocks - num_free,
        num_free_blocks=num_free,
        stages=executor.log.stages if isinstance(executor, DistributedPipeline) else (),
    )


def _swap_use(swap: SwapSpace | None) -> SwapUse:
    if swap is None:
        return SwapUse()
    num_used = swap.num_used
    return SwapUse(num_used, swap.num_slots - num_used, swap.num_out, swap.num_in)
