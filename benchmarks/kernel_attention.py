"""Attention of one layer by itself: the compiled kernel, and beside it PyTorch's.

Layers take turns as in a model, so that keys and values come from memory, not from a cache; ours
run in one parallel region. Where a model has sliding windows, they are left out.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import torch
from machine import float_rate
from steps import BLOCK, Bounds, Case, Costs, decodes, fill, make_input, seconds

from stallfree.kernels import phases, shapes
from stallfree.kernels.int8_matmul import PANEL
from stallfree.kernels.jit import compiled, entry
from stallfree.kernels.openmp import parallel
from stallfree.model.attention import attend, make_spans
from stallfree.model.int8_decoder import Int8Decoder
from stallfree.model.int8_plan import plan
from stallfree.model.kv_cache import KVCache

OURS = "bfloat16 KV"
NAMES = (OURS, "SDPA float32")
CASES = [
    decodes(8, 1000),
    decodes(8, 4000),
    decodes(1, 8000),
    Case(((4000, 64),)),
    Case(((1500, 256),)),
    Case(((0, 1500),)),
]
BURST = 8  # layers, one after the other; the time of one is the mean


@compiled
def _attend(thread, threads, first, stop, stride, job):  # type: ignore[no-untyped-def]
    team, rows = shapes.Team(thread, threads), job.work.token_ids.size
    base = 0
    for number in range(first, stop):
        layer = number % job.cache.keys.shape[0]
        base = phases.attend(team, base, layer, 0, stride, job)
        base = phases.quantize_attended(team, base, 0, rows, stride, job)


@entry
def attend_rows(threads, first, stop, stride, job):  # type: ignore[no-untyped-def]
    """Attention of a batch in some layers; parts of long contexts are merged, and rows rounded."""
    job.scratch.counter[0] = 0
    parallel(_attend, threads, (first, stop, stride, job))


def measure_attention(decoder: Int8Decoder, rounds: int, bounds: Bounds) -> list[dict[str, Any]]:
    """Time both kernels on all cases in turn.

    Returns:
        For each case and kernel: case, kernel, min_ms, median_ms, bytes of its own KV cache and
        operations of a layer, and floor_ms, at the read bandwidth or oneDNN's rate of float32.
    """
    runs = {case: _Run(decoder, case) for case in CASES}
    rate = 0.0
    for number in range(rounds + 1):
        if number:  # the first is for warming up
            bounds.measure()
            rate = max(rate, float_rate())
        for run in runs.values():
            run.measure(keep=number > 0)
    return [record for run in runs.values() for record in run.records(bounds, rate)]


class _Run:
    """One case: its caches, its queries, and the times of both kernels."""

    def __init__(self, decoder: Int8Decoder, case: Case) -> None:
        self._decoder, self._case, config = decoder, case, decoder.config
        self._cache = decoder.make_cache(case.num_blocks, BLOCK)
        self._floats = KVCache(config, case.num_blocks, BLOCK)
        fill(self._cache)
        fill(self._floats)
        self._batch = make_input(case, case.num_blocks, config.vocab_size)
        self._work, self._num_parts = plan(self._batch, BLOCK, decoder._item_tokens, decoder._ropes)
        self._queries = torch.randn(case.rows, config.num_heads, config.head_dim)
        self._spans = [
            span
            for chunk in self._batch.chunks
            for span in make_spans(
                chunk.first_row, chunk.start, chunk.stop, chunk.slots(BLOCK), None
            )
        ]
        self._next = 0
        self._times: dict[str, list[float]] = {name: [] for name in NAMES}

    def measure(self, *, keep: bool) -> None:
        """Run both on a few layers."""
        decoder = self._decoder
        decoder._reserve(self._case.rows, self._num_parts)
        queries = self._queries.reshape(-1).numpy()
        decoder._scratch.queries[: len(queries)] = queries * decoder._shape.query_scale
        job = shapes.Job(decoder._shape, self._cache.arrays(), self._work, decoder._scratch)
        stride = decoder._layers.output.weights.shape[2] // PANEL
        self._next += BURST
        first, stop, num_layers = self._next - BURST, self._next, decoder.config.num_layers

        def ours() -> None:
            attend_rows(decoder._threads, first, stop, stride, job)

        def others() -> None:
            for number in range(first, stop):
                attend(self._queries, self._floats, number % num_layers, self._spans)

        for name, call in zip(NAMES, (ours, others), strict=True):
            time_s = seconds(call) / BURST
            if keep:
                self._times[name].append(time_s)

    def records(self, bounds: Bounds, rate: float) -> list[dict[str, Any]]:
        """What was measured, and the least that was possible."""
        config = self._decoder.config
        config = replace(config, sliding_windows=(None,) * config.num_layers)
        made = []
        for (name, times), cache in zip(
            self._times.items(), (self._cache, self._floats), strict=True
        ):
            costs = Costs(config, 1, _bytes_per_token(cache))
            num_bytes = costs.kv_bytes(self._case) / config.num_layers
            operations = costs.attention_operations(self._case) / config.num_layers
            made.append(
                {
                    "case": self._case.name,
                    "kernel": name,
                    "min_ms": min(times) * 1000,
                    "median_ms": statistics.median(times) * 1000,
                    "bytes": num_bytes,
                    "operations": operations,
                    "floor_ms": max(num_bytes / bounds.read, operations / rate) * 1000,
                }
            )
        return made


def _bytes_per_token(cache: Any) -> int:
    """Of a KV cache, all its layers together."""
    total = sum(layer.nbytes for side in (cache.keys, cache.values) for layer in side)
    per_token: int = total // (cache.num_blocks * cache.block_size)
    return per_token
