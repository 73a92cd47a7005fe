"""A scheduler, requests for it, and running them to their end, with nothing behind it."""

from __future__ import annotations

from typing import Any

from stallfree.core.batch import Batch
from stallfree.core.blocks import BlockPool
from stallfree.core.budget import StaticBudget
from stallfree.core.request import Request
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.scheduler import Scheduler, SchedulerConfig


def scheduler(
    num_blocks: int = 8,
    block_size: int = 4,
    policy: str = "sarathi",
    budget: int = 16,
    **settings: Any,
) -> Scheduler:
    config = SchedulerConfig(policy, max_num_seqs=8, max_model_len=64, **settings)
    return Scheduler(config, BlockPool(num_blocks, block_size), StaticBudget(budget))


def request(name: str, num_prompt: int = 4, max_tokens: int = 8, at: float = 0.0) -> Request:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Request(name, range(num_prompt), params, max_tokens=max_tokens, arrived_at=at)


def run_to_end(scheduler: Scheduler) -> list[Batch]:
    batches = []
    while (batch := scheduler.schedule()) is not None:
        batches.append(batch)
        scheduler.complete(batch, [1] * len(batch.sampling))
        scheduler.check_integrity()
    return batches
