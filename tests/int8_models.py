"""Models for the int8 decoder, of every shape that its kernels tell apart, and ways to run it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tiny import disturb_vectors, save_tiny_model

from stallfree.kernels.attention import SPLIT
from stallfree.kernels.attention_tiles import STRETCH, factor_dtype
from stallfree.kernels.int8_matmul import padded
from stallfree.kernels.ir import LANES
from stallfree.model.config import ModelConfig
from stallfree.model.decoder import Decoder
from stallfree.model.int8_cache import int8_weights
from stallfree.model.int8_decoder import Int8Decoder
from stallfree.model.model_input import ModelInput, Rows
from stallfree.model.weights import SafetensorsWeights, WeightSource, read_json

BLOCK = 16
VOCABULARY = 320
STOPS = [1, 5, 16, 133, 1000, 1030, 2047, 2048, 2049, 2050, 2100]
MODELS = {  # name: architecture and what differs from the tiny model's shape
    "one head a key": ("llama", {"num_key_value_heads": 4}),
    "heads of 8": ("llama", {"head_dim": 8}),
    "heads of 20": ("qwen3", {"head_dim": 20}),
    "heads of 80": ("llama", {"head_dim": 80}),
    "heads of 128": ("llama", {"head_dim": 128, "num_hidden_layers": 1}),
    "groups of 4, biases": (
        "llama",
        {
            "num_attention_heads": 8,
            "head_dim": 64,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "groups of 7": ("qwen2", {"num_attention_heads": 14, "hidden_size": 112}),
    "groups of 8": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 1}),
    "odd sizes": ("llama", {"hidden_size": 72, "intermediate_size": 100, "head_dim": 18}),
    "sliding window": ("mistral", {"sliding_window": 40}),
    "window in one layer": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 150, "max_window_layers": 1},
    ),
    "gemma": (
        "gemma3_text",
        {
            "head_dim": 32,
            "num_hidden_layers": 4,
            "sliding_window": 40,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 48,
        },
    ),
}


def save_model(folder: Path, name: str) -> Path:
    """Save one of `MODELS`, with random norms and biases."""
    architecture, shape = MODELS[name]
    save_tiny_model(folder, architecture, vocab_size=VOCABULARY, initializer_range=0.2, **shape)
    disturb_vectors(folder)
    return folder


def open_weights(folder: Path) -> tuple[ModelConfig, WeightSource]:
    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    return config, int8_weights(folder, SafetensorsWeights(folder))


def make_decoder(folder: Path, threads: int = 2, dtype: str = "bfloat16") -> Int8Decoder:
    config, weights = open_weights(folder)
    kv_dtype: torch.dtype = getattr(torch, dtype)
    return Int8Decoder(config, weights, max_positions=4096, threads=threads, kv_dtype=kv_dtype)


def make_tokens(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCABULARY) for _ in range(count)]


def make_blocks(count: int, seed: int = 0) -> list[int]:
    """Scattered blocks for `count` tokens."""
    needed = -(-count // BLOCK)
    return random.Random(seed).sample(range(2 * needed), needed)


def run(decoder: Decoder | Int8Decoder, tokens: Sequence[int], cuts: Sequence[int]) -> torch.Tensor:
    """Logits (T, V) of a prompt run in chunks that end at `cuts`."""
    blocks = make_blocks(len(tokens))
    cache = decoder.make_cache(2 * len(blocks), BLOCK)
    logits = []
    for start, stop in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        batch = ModelInput(tokens[start:stop], [Rows(0, start, stop, blocks)])
        with torch.inference_mode():
            hidden = decoder.forward(batch, cache)  # type: ignore[arg-type]
            logits.append(decoder.logits(hidden).clone())
    return torch.cat(logits)


def relative_errors(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Of each row, against its length; a misplaced head, key or column gives errors near 1."""
    return (actual - expected).norm(dim=1) / expected.norm(dim=1)


def attention_errors(
    decoder: Int8Decoder, tokens: Sequence[int], block_size: int, stops: Sequence[int]
) -> Iterator[float]:
    """What is wrong with the last layer's attention in each of the chunks that end at `stops`.

    From the kernels' own queries, keys and values, in float64, with queries and weights rounded as
    the kernels do. Memory that holds no keys or values yet is NaN: it must not count.
    """
    config, num_blocks = decoder.config, -(-len(tokens) // block_size)
    heads, kv_heads, depth = config.num_heads, config.num_kv_heads, config.head_dim
    blocks = random.Random(0).sample(range(2 * num_blocks), num_blocks)
    cache = decoder.make_cache(2 * num_blocks, block_size)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    for start, stop in itertools.pairwise([0, *stops]):
        chunk = Rows(0, start, stop, blocks)
        count = len(decoder.forward(ModelInput(tokens[start:stop], [chunk]), cache))
        rows = torch.linspace(0, count - 1, min(count, 50)).long()
        scratch = decoder._scratch
        queries = torch.from_numpy(scratch.queries)[: count * heads * depth].double()
        factors = factor_dtype(decoder.kv_dtype)
        queries = queries.view(count, kv_heads, -1, depth)[rows].to(factors).double()
        attended = torch.from_numpy(scratch.attended).view(-1, padded(heads * depth, LANES))
        groups, lanes = (chunk.slots(block_size) // LANES, chunk.slots(block_size) % LANES)
        keys = matrices(cache.keys[-1], kv_heads, depth, LANES)[groups, :, :, lanes]
        values = matrices(cache.values[-1], kv_heads, LANES, padded(depth, LANES))
        values = values[groups, :, lanes, :depth]
        scores = torch.einsum("tkgd,skd->kgts", queries, keys)
        places, at = torch.arange(stop), (start + rows)[:, None]
        seen = (places <= at) & (places > at - (config.sliding_windows[-1] or stop))
        weights = _weights(scores.masked_fill(~seen, -torch.inf), factors)
        expected = torch.einsum("kgts,skd->tkgd", weights, values).flatten(1)
        error = (attended[rows, : heads * depth] - expected).abs().max() / values.abs().max()
        yield float(error)


def matrices(floats: torch.Tensor, heads: int, rows: int, columns: int) -> torch.Tensor:
    """Keys or values as float64 (groups, K, rows, columns): see `kernels.kv_layout`."""
    beside = 4 // floats.itemsize
    interleaved = floats.double().view(-1, heads, rows // beside, columns, beside)
    return interleaved.transpose(3, 4).reshape(-1, heads, rows, columns)


def _weights(scores: torch.Tensor, factors: torch.dtype) -> torch.Tensor:
    """Weights from the logarithms of powers of 2 (..., keys), as stretches are met in order.

    Powers are rounded to `factors`; what they are divided by is not.
    """
    shares, sums, tops = [], [], []
    for split in scores.split(SPLIT, dim=-1):
        top = torch.full(scores.shape[:-1], -torch.inf, dtype=scores.dtype)
        for stretch in split.split(STRETCH, dim=-1):
            top = torch.maximum(top, stretch.amax(dim=-1))
            powers = (stretch - top[..., None]).exp2().nan_to_num(0)
            tops.append(top)
            sums.append(powers.sum(dim=-1))
            shares.append(powers.to(factors).double())
    scales = (torch.stack(tops) - torch.stack(tops).amax(dim=0)).exp2()
    total = (torch.stack(sums) * scales).sum(dim=0)
    scaled = [share * scale[..., None] for share, scale in zip(shares, scales, strict=True)]
    return torch.cat(scaled, dim=-1) / total[..., None]
