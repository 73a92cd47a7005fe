"""Causal attention of a hybrid batch over the paged KV cache.

The rows of a batch are packed without padding. A `Span` is a run of them that one request's
context serves; its slots and its mask are the same in every layer, so they are made once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from stallfree.model.kv_cache import KVCache

MAX_SPAN_ROWS = 512  # longer chunks are cut, so that a mask stays small and half is not wasted


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive rows of one request and what they attend to.

    Attributes:
        first_row, num_rows: where the rows are in the batch.
        slots: int64 (n,), the KV slots they may see, in order of position.
        mask: bool (num_rows, n), True where a row sees a slot; None if all see all.
    """

    first_row: int
    num_rows: int
    slots: torch.Tensor
    mask: torch.Tensor | None


def make_spans(
    first_row: int, start: int, stop: int, slots: torch.Tensor, window: int | None
) -> Iterable[Span]:
    """Spans of a chunk at positions `start` to `stop` - 1.

    Args:
        first_row: the chunk's first row in the batch.
        start: position of the first token.
        stop: position after the last.
        slots: int64 (stop,), the slots of all positions of its context.
        window: latest tokens that a token sees, itself included, or None for all.
    """
    for low in range(start, stop, MAX_SPAN_ROWS):
        high = min(low + MAX_SPAN_ROWS, stop)
        seen_from = 0 if window is None else max(0, low - window + 1)
        mask = None
        if high - low > 1:
            row = torch.arange(low, high, device=slots.device)[:, None]
            seen = torch.arange(seen_from, high, device=slots.device)[None]
            mask = seen <= row
            if window is not None:
                mask &= seen > row - window
        yield Span(first_row + low - start, high - low, slots[seen_from:high], mask)


def attend(
    queries: torch.Tensor,
    cache: KVCache,
    layer: int,
    spans: list[Span],
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of `queries` (T, H, D) to the keys and values in `cache`; returns (T, H, D).

    Args:
        queries: of all rows.
        cache: the keys and values of the rows too.
        layer: whose.
        spans: that cover all rows.
        scale: on the products of queries and keys; by default 1 / sqrt(D).
    """
    output = torch.empty_like(queries)
    for span in spans:
        rows = slice(span.first_row, span.first_row + span.num_rows)
        keys, values = cache.read(layer, span.slots)
        output[rows] = _attend(queries[rows], keys, values, span.mask, scale)
    return output


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """Attention of q (t, H, D) to k and v (n, K, D), each key head serving H / K query heads."""
    num_rows, num_heads, head_dim = q.shape
    k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]  # (1, K, n, D)
    if num_rows == 1:  # the query heads of a group are the rows: no mask, each key is read once
        grouped = q.view(1, k.shape[1], -1, head_dim)  # (1, K, H / K, D)
        out = F.scaled_dot_product_attention(grouped, k, v, scale=scale)
        return out.view(1, num_heads, head_dim)
    rows = q.transpose(0, 1)[None]  # (1, H, t, D)
    out = F.scaled_dot_product_attention(
        rows, k, v, attn_mask=mask, scale=scale, enable_gqa=num_heads != k.shape[1]
    )
    return out[0].transpose(0, 1)
