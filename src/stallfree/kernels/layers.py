"""The forward pass of a decoder of the Llama family in int8: one parallel region for all layers.

Read it from below: `_run_layer` is one layer, ten phases, or twelve where what is added is normed.
All threads run the same phases with a barrier after each (`phases.py`). What it is given, and the
legend of shapes: `shapes.py`. Where several processes share the layers: `shares.py`.

A row's result depends on that row alone, to the last bit: sums of products are integers and exact;
a sum of floats always has the same order, whoever claims the unit that it is in; attention cuts
contexts at fixed positions (`attention.py`). So greedy answers do not depend on the batch, the
token budget, the number of threads or how layers are shared.
"""

from __future__ import annotations

from stallfree.kernels.int8_matmul import PANEL
from stallfree.kernels.jit import compiled, entry
from stallfree.kernels.openmp import parallel
from stallfree.kernels.phases import (
    ADD,
    STORE,
    add_normed,
    attend,
    embed_tokens,
    multiply,
    norm_rows,
    of_layer,
    place_all,
    quantize_attended,
    quantize_rows,
)
from stallfree.kernels.shapes import SLICE_ROWS, Team


@compiled
def _multiply_and_add(team, base, rows, matrix, norm, at, job):
    """Add a product of the quantized rows, normed if there is a norm, to the hidden states."""
    shape, scratch = job.shape, job.scratch
    if norm.size:
        base = multiply(team, base, rows, matrix, STORE, scratch.wide, 0, shape.width, scratch)
        return add_normed(team, base, rows, scratch.wide, norm, scratch.hidden, at, shape, scratch)
    return multiply(team, base, rows, matrix, ADD, scratch.hidden, at, shape.width, scratch)


@compiled
def run_attention(team, base, layer, layers, job):
    """A layer's attention, up to the heads' outputs of all rows."""
    shape, scratch = job.shape, job.scratch
    all_rows, width = job.work.token_ids.size, shape.width
    qkv_width = layers.qkv.scales.shape[1]
    attended_width = layers.output.weights.shape[2] // PANEL
    qkv, norm = of_layer(layers.qkv, layer), layers.input_norm[layer]
    for first in range(0, all_rows, SLICE_ROWS):
        rows, at = min(SLICE_ROWS, all_rows - first), first * width
        base = norm_rows(team, base, rows, scratch.hidden, at, norm, shape, scratch)
        base = multiply(team, base, rows, qkv, STORE, scratch.wide, 0, qkv_width, scratch)
        base = place_all(team, base, first, rows, layers, layer, qkv_width, job)
    return attend(team, base, layer, layers.windows[layer], attended_width, job)


@compiled
def _run_layer(team, base, layer, layers, job):
    """One layer: its attention, then its MLP, each added to the hidden states."""
    shape, scratch = job.shape, job.scratch
    all_rows, width = job.work.token_ids.size, shape.width
    attended_width = layers.output.weights.shape[2] // PANEL
    inner_width = layers.down.weights.shape[2] // PANEL
    hidden, wide = scratch.hidden, scratch.wide
    output, gate_up = of_layer(layers.output, layer), of_layer(layers.gate_up, layer)
    down, norm = of_layer(layers.down, layer), layers.mlp_norm[layer]
    attention_post, mlp_post = layers.post_attention_norm[layer], layers.post_mlp_norm[layer]
    base = run_attention(team, base, layer, layers, job)
    for first in range(0, all_rows, SLICE_ROWS):
        rows, at = min(SLICE_ROWS, all_rows - first), first * width
        base = quantize_attended(team, base, first, rows, attended_width, job)
        base = _multiply_and_add(team, base, rows, output, attention_post, at, job)
        base = norm_rows(team, base, rows, hidden, at, norm, shape, scratch)
        base = multiply(team, base, rows, gate_up, shape.gate, wide, 0, inner_width, scratch)
        base = quantize_rows(team, base, rows, wide, inner_width, scratch)
        base = _multiply_and_add(team, base, rows, down, mlp_post, at, job)
    return base


@compiled
def _run(thread, threads, table, layers, job):
    team, base = Team(thread, threads), 0
    if table.scales.size:
        base = embed_tokens(team, base, table, job)
    for layer in range(layers.windows.size):
        base = _run_layer(team, base, layer, layers, job)


@entry
def run(threads, table, layers, job):
    """All layers: the hidden states of `job.work` into `job.scratch`, its KV into `job.cache`.

    Args:
        threads: that share the work.
        table: the embedding, a `Product` of one matrix; if it is empty, the hidden states that
            the layers start from are in `job.scratch` already.
        layers: `Layers`.
        job: `Job`.
    """
    job.scratch.counter[0] = 0
    parallel(_run, threads, (table, layers, job))


@compiled
def _run_logits(thread, threads, hidden, norm, head, shape, out, scratch):
    team, rows = Team(thread, threads), hidden.shape[0]
    base = norm_rows(team, 0, rows, hidden.reshape(-1), 0, norm, shape, scratch)
    multiply(team, base, rows, head, STORE, out.reshape(-1), 0, out.shape[1], scratch)


@entry
def run_logits(threads, hidden, norm, head, shape, out, scratch):
    """Logits of at most `SLICE_ROWS` rows (R, padded hidden) into `out` (R, padded vocabulary).

    Args:
        threads: that share the work.
        hidden: float32.
        norm: the last norm's weight.
        head: the output layer, a `Product` of one matrix.
        shape, scratch: as in `Job`.
        out: float32.
    """
    scratch.counter[0] = 0
    parallel(_run_logits, threads, (hidden, norm, head, shape, out, scratch))
