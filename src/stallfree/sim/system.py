"""What is simulated: step times, memory and the settings of scheduling, made into replicas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stallfree.core.admission import Admission
from stallfree.core.batch import Batch, Chunk
from stallfree.core.blocks import BlockPool
from stallfree.core.budget import SloBudget, StaticBudget, TokenBudget
from stallfree.core.request import Request
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.scheduler import Scheduler, SchedulerConfig
from stallfree.core.step_time import BatchShape, StepTimeModel, StepTimePredictor, fit
from stallfree.engine.scheduling_settings import SchedulingSettings
from stallfree.errors import ConfigError
from stallfree.sim.replica import Replica
from stallfree.sim.times import StageTimes

DEFAULT_TOKEN_BUDGET = 512
BLOCK_TOKENS = 16
_MOST_TOKENS = 2048  # of an iteration, as in a server: larger ones gain nothing
_CHUNKS = (0, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_DECODES = (0, 1, 8, 32, 128)


@dataclass(frozen=True, slots=True)
class System:
    """A server that is not here.

    Attributes:
        times: of its pipeline, for a seed.
        settings: of scheduling.
        kv_cache_tokens: tokens that the KV cache of a replica holds.
        max_model_len: longest context in tokens.
        tile_tokens: what prefill chunks are cut to.
        known_times: what a budget with a target begins with; None: fitted to `times`.
        prefix_caching: whether a replica keeps what prompts begin with.

    Raises:
        ConfigError: a setting cannot be simulated.
    """

    times: Callable[[int], StageTimes]
    settings: SchedulingSettings
    kv_cache_tokens: int
    max_model_len: int
    tile_tokens: int = 1
    known_times: StepTimeModel | None = None
    prefix_caching: bool = False

    def __post_init__(self) -> None:
        if self.settings.fair or self.settings.tier:
            given = "fair" if self.settings.fair else "tier"
            raise ConfigError(f"{given} is set, but simulated requests have no users and no tiers")

    def replica(self, seed: int = 0) -> Replica:
        """A new replica, idle and empty.

        Args:
            seed: of what is random in its times.

        Raises:
            ConfigError: its memory is too small for what the policy reserves for one request.
        """
        own = self.settings
        times = self.times(seed)
        config = SchedulerConfig(
            own.scheduler,
            own.max_num_seqs,
            self.max_model_len,
            num_stages=times.num_stages,
            prefill_order=own.prefill_order,
            prefix_caching=self.prefix_caching,
        )
        pool = BlockPool(max(1, self.kv_cache_tokens // BLOCK_TOKENS), BLOCK_TOKENS)
        scheduler = Scheduler(config, pool, self._budget(times))
        admission = Admission(own.max_queued_requests, own.max_queued_tokens, own.admit_within_slo)
        return Replica(scheduler, times, admission, own.tiers["default"])

    def replicas(self, count: int, seed: int = 0) -> list[Replica]:
        """New replicas for one run; each, and those of each seed, have a scatter of their own.

        Raises:
            ConfigError: see `replica`.
        """
        return [self.replica(seed * count + place) for place in range(count)]

    def _budget(self, times: StageTimes) -> TokenBudget:
        target_s = self.settings.tbt_slo_s
        if target_s is None:
            tokens = self.settings.token_budget or DEFAULT_TOKEN_BUDGET
            return StaticBudget(tokens, self.tile_tokens)
        known = self.known_times or fitted(times, self.max_model_len)
        predictor = StepTimePredictor(known, relevant_s=target_s / 4)
        return SloBudget(
            target_s,
            predictor,
            tile_tokens=self.tile_tokens,
            max_tokens=_MOST_TOKENS,
            num_stages=times.num_stages,
        )


def fitted(times: StageTimes, max_model_len: int) -> StepTimeModel:
    """A step-time model of what a whole pipeline takes for a batch."""
    samples = []
    contexts = sorted({max_model_len // 16, max_model_len // 4, max_model_len - 1})
    for num_tokens in _CHUNKS:
        for num_decodes in _DECODES:
            for context in contexts:
                start = max(0, min(context, max_model_len - num_tokens))
                batch = _batch(num_tokens, start, num_decodes, context)
                if batch.chunks:
                    samples.append((BatchShape.of(batch), sum(times.seconds(batch))))
    return fit(samples)


def _batch(num_tokens: int, start: int, num_decodes: int, context: int) -> Batch:
    request = Request("sample", (0,), SamplingParams(), max_tokens=1)
    chunks = [Chunk(request, context, 1, samples=True, is_decode=True)] * num_decodes
    if num_tokens:
        chunks.append(Chunk(request, start, num_tokens, samples=True, is_decode=False))
    return Batch(chunks)
