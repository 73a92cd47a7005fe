"""Makes the swap space as the settings say, and measures what copying costs."""

from __future__ import annotations

import logging

import torch

from stallfree.core.blocks import BlockPool
from stallfree.core.budget import SloBudget, TokenBudget
from stallfree.core.step_time import BatchShape, StepTimeModel, chunk_context
from stallfree.core.swap import SwapCosts, SwapSpace
from stallfree.engine.memory import Neighbours, free_bytes
from stallfree.engine.settings import EngineSettings
from stallfree.errors import ConfigError
from stallfree.executor.distributed import DistributedPipeline
from stallfree.executor.swap_store import SwapStore
from stallfree.executor.torch_executor import TorchExecutor

_COPY_SHARE = 0.1  # of a target for the time between tokens that an iteration may copy for

logger = logging.getLogger(__name__)


class Swapping:
    """A swap space that was made and measured.

    Its speed is taken to stay what it was at the start. Where there is a target for the time
    between tokens, copies take at most a tenth of the tightest one of a tier; what does not fit is
    computed again. The targets that requests bring of their own do not count here: far below the
    server's, copying alone can miss them.

    Args:
        settings: of the engine.
        executor: whose KV cache is copied; none of it is in use yet.
        pool: the blocks of the cache.
        token_bytes: of a token in the cache.
        device: where the cache is.
        neighbours: engines that share this machine; together they ask for no more than there is.

    Attributes:
        store: the slots, if they are in this process.

    Raises:
        ConfigError: there is no room for it.
        CopyError: it cannot be written or read.
        WorkersLostError: a process of the model ended.
    """

    def __init__(
        self,
        settings: EngineSettings,
        executor: TorchExecutor | DistributedPipeline,
        pool: BlockPool,
        token_bytes: int,
        device: torch.device,
        neighbours: Neighbours,
    ) -> None:
        self._block_size = pool.block_size
        block_bytes = pool.block_size * token_bytes
        num_bytes = swap_bytes(settings, pool.num_blocks * block_bytes, device, neighbours)
        self._num_slots = num_bytes // block_bytes
        if self._num_slots < 1:
            raise ConfigError(
                f"swap_space is {num_bytes} bytes; one block of {pool.block_size} tokens takes "
                f"{block_bytes}: raise swap_space"
            )
        targets = [each.tbt_s for each in settings.tiers.values() if each.tbt_s is not None]
        self._most_s = _COPY_SHARE * min(targets) if targets else None
        self.store: SwapStore | None = None
        if isinstance(executor, DistributedPipeline):
            try:
                self._times = executor.make_swap(self._num_slots, settings.swap_dir)
            except MemoryError as error:
                raise ConfigError(str(error)) from error
        else:
            self.store = SwapStore(executor.cache, self._num_slots, settings.swap_dir)
            self._times = self.store.measure()

    def space(self, budget: TokenBudget, times: StepTimeModel) -> SwapSpace:
        """Its slots, for the scheduler.

        Args:
            budget: predicts how long it takes to compute what is not kept, if it predicts anything.
            times: says so else.
        """
        seconds = budget.predictor.seconds if isinstance(budget, SloBudget) else times.seconds

        def recompute_s(num_tokens: int) -> float:
            return seconds(BatchShape(num_tokens, chunk_context(0, num_tokens)))

        logger.info(
            "the swap space holds %d blocks; one is copied out in %.3f ms and in in %.3f ms, and "
            "computed in %.3f ms",
            self._num_slots,
            1e3 * self._times.out_s,
            1e3 * self._times.in_s,
            1e3 * recompute_s(self._block_size),
        )
        costs = SwapCosts(recompute_s, self._times.out_s, self._times.in_s, self._most_s)
        return SwapSpace(self._num_slots, self._block_size, costs)


def swap_bytes(
    settings: EngineSettings, kv_bytes: int, device: torch.device, neighbours: Neighbours
) -> int:
    """What the swap space takes, in all processes of this engine together.

    Raises:
        ConfigError: it is more host memory than there is.
    """
    asked = settings.swap_space_bytes
    if settings.swap_dir is not None:  # whether its disk has the room is known once it is made
        return asked or kv_bytes
    free = free_bytes(torch.device("cpu"))
    if device.type == "cpu":  # where caches were allocated, but not written to
        free = max(0, free - neighbours.num_starting * kv_bytes)
    limit = free // neighbours.num_starting
    if asked is not None and asked > limit:
        raise ConfigError(
            f"swap_space is {asked} bytes{neighbours.in_each}, but {free} are free beside the KV "
            f"cache: lower it to at most {limit}, or name a folder in swap_dir"
        )
    return asked or min(kv_bytes, free // 2 // neighbours.num_engines)
