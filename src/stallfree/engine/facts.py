"""What an engine was built with, for people to read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """The engine's model, memory and scheduling.

    Attributes:
        vocab_size: token ids from 0 up to this are accepted.
        threads: of the CPU, in each process of the model.
        tensor_parallel_size: processes that share each layer's matrices.
        pipeline_parallel_size: processes that the layers are split over.
        weight_bytes, kv_cache_bytes: memory taken, in all processes.
        kv_cache_tokens: tokens that the KV cache holds.
        kv_cache_share: the share of the free memory that it was sized by, or None if it was told.
        token_budget: most tokens of an iteration, or None if the scheduler keeps no budget.
        tbt_slo_s: target for the time between tokens, or None.
        tile_tokens: what prefill chunks are cut to.
        max_model_len: longest context in tokens.
        load_s: seconds that loading took.
    """

    model_name: str
    architecture: str
    vocab_size: int
    num_parameters: int
    dtype: str
    device: str
    threads: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    weight_bytes: int
    kv_cache_bytes: int
    kv_cache_tokens: int
    kv_cache_share: float | None
    block_size: int
    scheduler: str
    token_budget: int | None
    tbt_slo_s: float | None
    tile_tokens: int
    max_model_len: int
    max_num_seqs: int
    load_s: float
