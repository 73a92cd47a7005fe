"""Settings of a scheduler, checked."""

from __future__ import annotations

from dataclasses import dataclass

from stallfree.core.policies import POLICIES
from stallfree.core.waiting import PREFILL_ORDERS
from stallfree.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Settings of a scheduler.

    Attributes:
        policy: a name in `POLICIES`.
        max_num_seqs: most requests admitted at once.
        max_model_len: longest context in tokens, prompt and output together.
        watermark: share of the blocks that admissions leave free for running requests to grow,
            where the policy does not reserve for that.
        growth_blocks: how many more they leave for each running request, while requests wait, once
            one was preempted because others grew. Else it would be admitted into the memory that
            they need next, and preempted again.
        prefix_caching: whether requests that begin alike share blocks. If not, completions of one
            prompt still do.
        copies_blocks: whether what runs the batches can copy blocks (see `partial_blocks`).
        num_stages: batches that are in flight at once; each takes its share of the decodes.
        sequence_pipelining: whether consecutive chunks of one prompt may be in flight at once.
        prefill_order: a name in `PREFILL_ORDERS`.
        is_fair: whether users take turns (see `fairness`).

    Raises:
        ConfigError: a value is unknown or out of range.
    """

    policy: str = "sarathi"
    max_num_seqs: int = 128
    max_model_len: int = 4096
    watermark: float = 0.01
    growth_blocks: int = 1
    prefix_caching: bool = False
    copies_blocks: bool = False
    num_stages: int = 1
    sequence_pipelining: bool = False
    prefill_order: str = "fcfs"
    is_fair: bool = False

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(f"scheduler is {self.policy!r}; it must be one of {list(POLICIES)}")
        if self.prefill_order not in PREFILL_ORDERS:
            raise ConfigError(
                f"prefill_order is {self.prefill_order!r}; it must be one of {list(PREFILL_ORDERS)}"
            )
        if self.num_stages < 1:
            raise ConfigError(f"num_stages is {self.num_stages}; it must be at least 1")
        if self.max_num_seqs < 1:
            raise ConfigError(f"max_num_seqs is {self.max_num_seqs}; it must be at least 1")
        if self.max_model_len < 2:
            raise ConfigError(f"max_model_len is {self.max_model_len}; it must be at least 2")
