"""Slots of the swap space in memory and in a file: blocks come back as they were."""

from __future__ import annotations

import gc
import os
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from stallfree.errors import ConfigError, CopyError
from stallfree.executor.swap_store import CopyTimes, SwapStore
from stallfree.model.config import ModelConfig
from stallfree.model.int8_decoder import Int8KVCache
from stallfree.model.kv_cache import KVCache

NUM_BLOCKS, BLOCK_SIZE, NUM_SLOTS = 80, 32, 70
CONFIG = ModelConfig.from_hf(
    {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 32,
        "hidden_size": 48,
        "head_dim": 24,  # int8 pads that
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
    }
)


def tensors(cache: KVCache | Int8KVCache) -> list[torch.Tensor]:
    if isinstance(cache, Int8KVCache):
        return [cache.keys, cache.values]
    return [*cache.keys, *cache.values]


def make_cache(dtype: torch.dtype, *, is_int8: bool) -> KVCache | Int8KVCache:
    """With other numbers everywhere."""
    cache: KVCache | Int8KVCache
    if is_int8:
        cache = Int8KVCache(CONFIG, NUM_BLOCKS, BLOCK_SIZE, dtype)
    else:
        cache = KVCache(CONFIG, NUM_BLOCKS, BLOCK_SIZE, dtype)
    for seed, tensor in enumerate(tensors(cache)):
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)))
    return cache


def tokens_of(cache: KVCache | Int8KVCache, block: int) -> list[torch.Tensor]:
    """What a block holds, as a decoder finds it: by slot, or by group of 16 tokens."""
    if isinstance(cache, KVCache):
        slots = torch.arange(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
        parts = [cache.read(layer, slots) for layer in range(CONFIG.num_layers)]
        return [part for each in parts for part in each]
    groups = BLOCK_SIZE // 16
    own = [each.view(CONFIG.num_layers, NUM_BLOCKS * groups, -1) for each in tensors(cache)]
    return [each[:, block * groups : (block + 1) * groups].clone() for each in own]


@pytest.fixture(params=[False, True], ids=["host", "disk"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path if request.param else None


@pytest.mark.parametrize(
    ("dtype", "is_int8"),
    [
        (torch.float32, False),
        (torch.bfloat16, False),
        (torch.float32, True),
        (torch.bfloat16, True),
    ],
)
def test_blocks_come_back_as_they_were(
    dtype: torch.dtype, is_int8: bool, folder: Path | None
) -> None:
    cache = make_cache(dtype, is_int8=is_int8)
    store = SwapStore(cache, NUM_SLOTS, folder)
    rng = random.Random(0)
    blocks, slots = rng.sample(range(NUM_BLOCKS), NUM_SLOTS), rng.sample(range(NUM_SLOTS), 70)
    before = [tokens_of(cache, block) for block in range(NUM_BLOCKS)]
    store.copy(list(zip(blocks, slots, strict=True)), ())
    for tensor in tensors(cache):
        tensor.zero_()
    back = rng.sample(range(NUM_BLOCKS), 40)  # other blocks than they were in
    store.copy((), list(zip(slots[:40], back, strict=True)))
    for block, held in zip(back, blocks, strict=False):
        for one, other in zip(tokens_of(cache, block), before[held], strict=True):
            assert torch.equal(one, other)
    for block in set(range(NUM_BLOCKS)) - set(back):
        assert not any(each.any() for each in tokens_of(cache, block))


def test_what_goes_out_goes_before_what_comes_in(folder: Path | None) -> None:
    cache = make_cache(torch.float32, is_int8=False)
    store = SwapStore(cache, NUM_SLOTS, folder)
    first, second = tokens_of(cache, 0), tokens_of(cache, 1)
    store.copy([(0, 5)], ())
    store.copy([(1, 6)], [(5, 1), (6, 0)])
    assert all(map(torch.equal, tokens_of(cache, 1), first))
    assert all(map(torch.equal, tokens_of(cache, 0), second))


def test_measuring_changes_no_block(folder: Path | None) -> None:
    cache = make_cache(torch.bfloat16, is_int8=True)
    before = [tensor.clone() for tensor in tensors(cache)]
    times = SwapStore(cache, NUM_SLOTS, folder).measure()
    assert times.out_s > 0
    assert times.in_s > 0
    assert all(map(torch.equal, tensors(cache), before))
    assert CopyTimes(1, 4).slower_of(CopyTimes(2, 3)) == CopyTimes(2, 4)


def test_the_file_has_no_name_and_ends_with_the_store(tmp_path: Path) -> None:
    cache = make_cache(torch.float32, is_int8=False)
    gc.collect()  # whatever tests before this one have left open
    before = os.listdir("/proc/self/fd")
    store = SwapStore(cache, NUM_SLOTS, tmp_path)
    assert not list(tmp_path.iterdir())
    assert len(os.listdir("/proc/self/fd")) == len(before) + 1
    del store
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == len(before)


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """No file can grow beyond this meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_room_that_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    cache = make_cache(torch.float32, is_int8=False)
    with largest_file(10_000), pytest.raises(ConfigError, match=r"swap space of \d+ bytes.*lower"):
        SwapStore(cache, NUM_SLOTS, tmp_path)
    with pytest.raises(ConfigError, match="No such file or directory"):
        SwapStore(cache, NUM_SLOTS, tmp_path / "missing")
    with pytest.raises(ConfigError, match="cannot be allocated"):
        SwapStore(cache, 1 << 50, None)


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    store = SwapStore(make_cache(torch.float32, is_int8=False), NUM_SLOTS, tmp_path)
    [name] = [
        each
        for each in os.listdir("/proc/self/fd")
        if str(tmp_path) in os.path.realpath(f"/proc/self/fd/{each}")
    ]
    os.ftruncate(int(name), 100)
    with pytest.raises(CopyError, match="the swap file ends at"):
        store.copy((), [(0, 0)])
