"""What a forward pass in int8 is given: weights, sizes, the batch, and memory between phases.

Legend of shapes: T rows (tokens), L layers, H query heads, K key heads, D head size. Sizes are
padded with zeros, to 64 where matrices have outputs and to 16 elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

SLICE_ROWS = 2048  # at once, where a batch is longer: bounds the memory between matrices


class Product(NamedTuple):
    """Int8 matrices of all layers, (layers, ...), or one: without the leading dimension.

    Attributes:
        weights: int8 (L, panels, bytes), as `int8_matmul.pack` lays them out.
        scales: float32 (L, outputs), of each output.
        column_sums: int32 (L, outputs), what the weights of each output add up to.
        bias: float32 (L, outputs), or (L, 0).
    """

    weights: np.ndarray
    scales: np.ndarray
    column_sums: np.ndarray
    bias: np.ndarray


class Layers(NamedTuple):
    """The weights of all layers.

    Attributes:
        input_norm, mlp_norm: float32 (L, padded hidden).
        q_norm, k_norm: float32 (L, D), or (L, 0).
        qkv, output, down: products.
        gate_up: a product whose panels hold 32 outputs of the gate and the same 32 of up.
        post_attention_norm, post_mlp_norm: of what is added to the hidden states: float32 (L,
            padded hidden), or (L, 0).
        windows: int64 (L,), sliding windows in tokens, 0 for none.
        ropes: int64 (L,), which of the rotary embeddings of `Work.angles` each has.
    """

    input_norm: np.ndarray
    qkv: Product
    q_norm: np.ndarray
    k_norm: np.ndarray
    output: Product
    mlp_norm: np.ndarray
    gate_up: Product
    down: Product
    post_attention_norm: np.ndarray
    post_mlp_norm: np.ndarray
    windows: np.ndarray
    ropes: np.ndarray


class Shape(NamedTuple):
    """Sizes of the model.

    Attributes:
        hidden, width: of a row of hidden states, and padded.
        heads, kv_heads: H and K.
        depth, head_width: D, and padded.
        epsilon: of the norms.
        query_scale: what scores are multiplied by, log2(e) in it: weights are powers of 2.
        gate: what the gate of the MLP does, `layers.GATE_SILU` or `layers.GATE_GELU`.
    """

    hidden: int
    width: int
    heads: int
    kv_heads: int
    depth: int
    head_width: int
    epsilon: np.float32
    query_scale: np.float32
    gate: int


class Work(NamedTuple):
    """A batch.

    Attributes:
        token_ids, slots: int64 (T,).
        angles: float32 (ropes, T, 2, D), cosines and sines.
        groups: int64 (chunks, longest), where each 16 tokens of a chunk's context are in the cache.
        items: int64 (items, 6): chunk, first row, its position, rows (tokens), which split (or -1:
            all), and the part it goes to.
        parts: int64 (T, 2): the first part of a row's splits and how many there are; 0: none.
    """

    token_ids: np.ndarray
    slots: np.ndarray
    angles: np.ndarray
    groups: np.ndarray
    items: np.ndarray
    parts: np.ndarray


class Scratch(NamedTuple):
    """Memory between phases; `thread_*` have a row for each thread.

    Attributes:
        hidden: float32 (T * padded hidden,).
        activations: uint8, of `SLICE_ROWS` rows at most, packed.
        scales, zeros: of those rows: float32, and int32, the activation that stands for zero.
        wide: float32, of those rows: heads or inner activations.
        queries, attended: float32 (T * H * D,), padded.
        part, part_sums, part_tops: float32, outputs of single splits.
        counter: int64 (1,), units claimed by all threads.
        barrier: see `openmp.barrier`.
        thread_queries, thread_weights: float32 or bfloat16: see `attention_tiles`.
    """

    hidden: np.ndarray
    activations: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    wide: np.ndarray
    queries: np.ndarray
    attended: np.ndarray
    part: np.ndarray
    part_sums: np.ndarray
    part_tops: np.ndarray
    counter: np.ndarray
    barrier: np.ndarray
    thread_sums: np.ndarray
    thread_row: np.ndarray
    thread_queries: np.ndarray
    thread_out: np.ndarray
    thread_total: np.ndarray
    thread_stats: np.ndarray
    thread_weight_sums: np.ndarray
    thread_scores: np.ndarray
    thread_weights: np.ndarray
    thread_places: np.ndarray


class Cache(NamedTuple):
    """Keys and values of all layers (L, elements), as `kv_layout` says."""

    keys: np.ndarray
    values: np.ndarray


class Job(NamedTuple):
    """One call: everything but the weights."""

    shape: Shape
    cache: Cache
    work: Work
    scratch: Scratch


class Share(NamedTuple):
    """What one of several processes that share every layer is given too: see `shares.py`.

    Attributes:
        first_token, num_tokens: which rows of the embedding it has.
        ranges: float32, two for each row: how far its floats reach below zero, and above.
        sums: int32 (rows * padded hidden,), sums of products.
        exchange: address of a C function of two int64, what is exchanged and how many rows.
    """

    first_token: int
    num_tokens: int
    ranges: np.ndarray
    sums: np.ndarray
    exchange: int


class Team(NamedTuple):
    """A thread, and how many there are."""

    thread: int
    threads: int
