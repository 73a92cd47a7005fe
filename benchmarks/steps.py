"""Batches of a chosen composition: how long a model takes for each, and how long it must at least.

For the benchmarks of the engine and of single kernels; nothing to run here.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from machine import int8_rate, read_bandwidth

from stallfree.model.config import ModelConfig
from stallfree.model.model_input import ModelInput, Rows

BLOCK = 16  # tokens
SCALE_BYTES = 4  # of each output of an int8 matrix


@dataclass(frozen=True, slots=True)
class Case:
    """A batch.

    Attributes:
        requests: of each, the tokens of context that are in the cache, and the new tokens.
        repeats: how often it runs in each round.
    """

    requests: tuple[tuple[int, int], ...]
    repeats: int = 3

    @property
    def name(self) -> str:
        """For people."""
        parts = []
        for (context, tokens), some in groupby(self.requests):
            count = len(list(some))
            if tokens == 1:
                what = "1 decode" if count == 1 else f"{count} decodes"
            elif context == 0:
                parts.append(f"prompt of {tokens:,}")
                continue
            else:
                what = f"chunk of {tokens}"
            parts.append(f"{what} at {context:,}")
        return " + ".join(parts)

    @property
    def rows(self) -> int:
        """Tokens of the batch."""
        return sum(tokens for _, tokens in self.requests)

    @property
    def num_blocks(self) -> int:
        """KV blocks of all requests."""
        return sum(-(-(context + tokens) // BLOCK) for context, tokens in self.requests)


def decodes(count: int, context: int) -> Case:
    """So many requests, each with one new token."""
    return Case(((context, 1),) * count)


class Bounds:
    """The best that the machine was seen to do.

    Attributes:
        read: bytes per second from memory.
        int8: operations per second of int8 matrix products.
    """

    def __init__(self) -> None:
        self.read = self.int8 = 0.0

    def measure(self) -> None:
        """Measure once more, and keep what is better than before."""
        self.read = max(self.read, read_bandwidth())
        self.int8 = max(self.int8, int8_rate())

    def floor_s(self, num_bytes: float, operations: float) -> float:
        """Seconds that reading and computing take at least."""
        return max(num_bytes / self.read, operations / self.int8)

    def __str__(self) -> str:
        return f"{self.read / 1e9:.1f} GB/s read, {self.int8 / 1e9:.0f} GOP/s int8"


def matrices_of(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the matrices of a layer and of the output layer, the `head`."""
    heads, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "qkv": (heads + 2 * keys, config.hidden_size),
        "output": (config.hidden_size, heads),
        "gate_up": (2 * config.intermediate_size, config.hidden_size),
        "down": (config.hidden_size, config.intermediate_size),
        "head": (config.vocab_size, config.hidden_size),
    }


class Costs:
    """What batches of a model must read and compute.

    Args:
        config: of the model.
        weight_size: bytes of a weight; with 1, each output has a scale beside.
        kv_bytes_per_token: of all layers.
    """

    def __init__(self, config: ModelConfig, weight_size: int, kv_bytes_per_token: int) -> None:
        self._config = config
        self._weight_size = weight_size
        self._scale_size = SCALE_BYTES if weight_size == 1 else 0
        self._kv_bytes_per_layer = kv_bytes_per_token / config.num_layers
        shapes = matrices_of(config)
        self._head = shapes.pop("head")
        self._layer = list(shapes.values())

    def bytes(self, case: Case) -> float:
        """Of the layers' matrices, the output layer, the rows of the embedding, and the KV."""
        layer = sum(self._matrix_bytes(*shape) for shape in self._layer)
        embedded = self._matrix_bytes(case.rows, self._config.hidden_size)
        matrices = layer * self._config.num_layers + self._matrix_bytes(*self._head)
        return matrices + embedded + self.kv_bytes(case)

    def kv_bytes(self, case: Case) -> float:
        """Of the keys and values that its rows see, each read once."""
        seen = 0
        for context, tokens in case.requests:
            for window in self._config.sliding_windows:
                most = context + tokens if window is None else window + tokens - 1
                seen += min(context + tokens, most)
        return seen * self._kv_bytes_per_layer

    def operations(self, case: Case) -> float:
        """Of the linear layers (the output layer for one row a request) and of attention."""
        layer = sum(outputs * inputs for outputs, inputs in self._layer)
        linear = layer * self._config.num_layers * case.rows
        linear += self._head[0] * self._head[1] * len(case.requests)
        return 2 * linear + self.attention_operations(case)

    def attention_operations(self, case: Case) -> float:
        """Of scores and weighted sums, masked ones left out."""
        seen = 0
        for context, tokens in case.requests:
            for window in self._config.sliding_windows:
                contexts = range(context + 1, context + tokens + 1)
                seen += sum(contexts if window is None else (min(n, window) for n in contexts))
        return 4 * self._config.num_heads * self._config.head_dim * seen

    def _matrix_bytes(self, outputs: int, inputs: int) -> int:
        return outputs * (inputs * self._weight_size + self._scale_size)


class Steps:
    """A decoder, and a KV cache full of random numbers, that run cases.

    Args:
        decoder: a `Decoder` or an `Int8Decoder`.
        cases: those that will be run; the largest sizes the cache.
    """

    def __init__(self, decoder: Any, cases: Sequence[Case]) -> None:
        self._decoder = decoder
        num_blocks = max(case.num_blocks for case in cases)
        self._cache = decoder.make_cache(num_blocks, BLOCK)
        fill(self._cache)
        vocab_size = decoder.config.vocab_size
        self._inputs = {case: make_input(case, num_blocks, vocab_size) for case in cases}

    def run(self, case: Case) -> float:
        """Run the layers, and the output layer for the last row of each request; gives seconds."""
        batch = self._inputs[case]
        last = [chunk.first_row + chunk.stop - chunk.start - 1 for chunk in batch.chunks]

        def step() -> None:
            with torch.inference_mode():
                self._decoder.logits(self._decoder.forward(batch, self._cache)[last])

        return seconds(step)


def make_input(case: Case, num_blocks: int, vocab_size: int) -> ModelInput:
    """The batch with random tokens; requests have blocks of their own, scattered in the cache."""
    rng = random.Random(0)
    free = rng.sample(range(num_blocks), num_blocks)
    chunks, rows = [], 0
    for context, tokens in case.requests:
        needed = -(-(context + tokens) // BLOCK)
        blocks, free = free[:needed], free[needed:]
        chunks.append(Rows(rows, context, context + tokens, blocks))
        rows += tokens
    return ModelInput([rng.randrange(vocab_size) for _ in range(rows)], chunks)


def fill(cache: Any) -> None:
    """Random keys and values everywhere, the same in each layer."""
    for side in (cache.keys, cache.values):
        side[0].normal_()
        for layer in range(1, len(side)):
            side[layer].copy_(side[0])


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
