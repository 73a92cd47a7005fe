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
from machine import float_rate, int8_rate, read_bandwidth

from stallfree.core.batch import Batch, Chunk
from stallfree.core.request import Request
from stallfree.core.sampling_params import SamplingParams
from stallfree.executor.torch_executor import TorchExecutor
from stallfree.model.config import ModelConfig
from stallfree.model.model_input import ModelInput, Rows
from stallfree.model.peers import Exchange

BLOCK = 16  # tokens
SCALE_BYTES = 4  # of each output of an int8 matrix
GREEDY = SamplingParams(temperature=0, max_tokens=2)


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
    """The best that was seen of reading memory, and of matrix products by a well-known kernel.

    Args:
        dtype: of the weights; it decides whether the products are of int8 or of float32.

    Attributes:
        reference: the kernel. It is no limit of the machine: others may be faster.
        read: bytes per second from memory.
        rate: operations per second of the kernel.
    """

    def __init__(self, dtype: str = "int8") -> None:
        is_int8 = dtype == "int8"
        self.reference = "FBGEMM int8" if is_int8 else "oneDNN float32"
        self._measure_rate = int8_rate if is_int8 else float_rate
        self.read = self.rate = 0.0

    def measure(self) -> None:
        """Measure once more, and keep what is better than before."""
        self.read = max(self.read, read_bandwidth())
        self.rate = max(self.rate, self._measure_rate())

    def floor_s(self, num_bytes: float, operations: float) -> float:
        """Seconds of reading at the bandwidth or of computing at the reference, the longer."""
        return max(num_bytes / self.read, operations / self.rate)

    @property
    def facts(self) -> dict[str, object]:
        """For a result, beside those of the machine."""
        return {
            "read_gb_per_s": self.read / 1e9,
            "reference": self.reference,
            "reference_gop_per_s": self.rate / 1e9,
        }

    def __str__(self) -> str:
        read, rate = self.read / 1e9, self.rate / 1e9
        return f"{read:.1f} GB/s read, {rate:.0f} GOP/s {self.reference} (reference)"


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


class _TimedDecoder:
    """Another decoder, and how long it took since `seconds` was last set to 0."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.part = inner, inner.part
        self.seconds = 0.0

    def forward(
        self, batch: ModelInput, cache: Any, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._timed(lambda: self._inner.forward(batch, cache, hidden))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._timed(lambda: self._inner.logits(hidden))

    def exchanges(self, rows: int, logits: Sequence[int]) -> list[Exchange]:
        return list(self._inner.exchanges(rows, logits))

    def _timed(self, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        made: list[torch.Tensor] = []
        self.seconds += seconds(lambda: made.append(call()))
        return made[0]


class Steps:
    """An executor, and a KV cache full of random numbers, that run cases.

    Args:
        decoder: a `Decoder` or an `Int8Decoder`.
        cases: those that will be run; the largest sizes the cache.
    """

    def __init__(self, decoder: Any, cases: Sequence[Case]) -> None:
        self._decoder = _TimedDecoder(decoder)
        num_blocks = max(case.num_blocks for case in cases)
        cache = decoder.make_cache(num_blocks, BLOCK)
        fill(cache)
        self._executor = TorchExecutor(self._decoder, cache)
        vocab_size = decoder.config.vocab_size
        self._batches = {case: make_batch(case, num_blocks, vocab_size) for case in cases}

    def run(self, case: Case) -> tuple[float, float]:
        """Execute the batch, which samples a token for each request.

        Returns:
            Seconds, and those of them outside the model, its layers and its output layer.
        """
        self._decoder.seconds = 0.0
        total_s = seconds(lambda: self._executor.execute(self._batches[case]))
        return total_s, total_s - self._decoder.seconds


def make_batch(case: Case, num_blocks: int, vocab_size: int) -> Batch:
    """The batch as a scheduler gives it: of greedy requests, with the blocks of `make_input`."""
    rng = random.Random(1)
    chunks: list[Chunk] = []
    for rows in make_input(case, num_blocks, vocab_size).chunks:
        num_tokens = rows.stop - rows.start
        is_decode = num_tokens == 1 and rows.start > 0
        prompt = rng.choices(range(vocab_size), k=rows.stop - is_decode)
        request = Request(f"step-{len(chunks)}", prompt, GREEDY, max_tokens=2)
        if is_decode:
            request.output_token_ids.append(rng.randrange(vocab_size))
        request.block_table = list(rows.blocks)
        request.num_computed_tokens = rows.start
        chunks.append(Chunk(request, rows.start, num_tokens, samples=True, is_decode=is_decode))
    return Batch(tuple(chunks))


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
